"""What is said of pods that do not answer."""

from typing import Any

import pytest

from tuneserve import names
from tuneserve.modelserve.trouble import Trouble, diagnose

TEMPLATE = "t1"


def _pod(*, template: str = TEMPLATE, deleted: bool = False, **status: Any) -> dict[str, Any]:
    metadata: dict[str, Any] = {"name": "y-1", "annotations": {names.APPLIED: template}}
    if deleted:
        metadata["deletionTimestamp"] = "2030-01-01T00:00:00Z"
    containers = [{"name": "server", "resources": {"limits": {"memory": "4Gi"}}}]
    return {"metadata": metadata, "spec": {"containers": containers}, "status": {"phase": "Pending", **status}}


def _container(**status: Any) -> dict[str, Any]:
    return _pod(phase="Running", containerStatuses=[{"name": "server", "image": "s:1", "ready": False, **status}])


def _waiting(reason: str, message: str = "the details") -> dict[str, Any]:
    return {"waiting": {"reason": reason, "message": message}}


def _ended(code: int, reason: str = "Error", message: str | None = None) -> dict[str, Any]:
    return {"terminated": {"exitCode": code, "reason": reason, "message": message}}


UNSCHEDULABLE = _pod(
    conditions=[
        {
            "type": "PodScheduled",
            "status": "False",
            "reason": "Unschedulable",
            "message": "0/3 nodes are available: 3 Insufficient nvidia.com/gpu.",
        }
    ]
)
CRASHED = _container(
    state=_waiting("CrashLoopBackOff"), lastState=_ended(1, message="INFO a\n\nValueError: b\n"), restartCount=2
)


@pytest.mark.parametrize(
    ("pod", "reason", "words"),
    [
        (UNSCHEDULABLE, "Unschedulable", ["3 Insufficient nvidia.com/gpu", "y-1"]),
        (_container(state=_waiting("ErrImagePull", "no such host")), "ImagePullFailed", ["s:1", "no such host"]),
        (_container(state=_waiting("ImagePullBackOff", "401")), "ImagePullFailed", ["401"]),
        (
            _container(state=_waiting("CreateContainerConfigError", "failed to prepare subPath")),
            "CreateContainerConfigError",
            ["failed to prepare subPath"],
        ),
        (CRASHED, "ServerCrashed", ["exit code 1", "2 restarts", "ValueError: b"]),
        (_container(state=_ended(2, message="bad flag"), restartCount=1), "ServerCrashed", ["1 restart)", "bad flag"]),
        (_container(state=_ended(1), restartCount=0), "ServerCrashed", ["(none)"]),
        (
            _container(state={"running": {}}, lastState=_ended(137, "OOMKilled"), restartCount=1),
            "OutOfMemory",
            ["limit of 4Gi", "maxModelLength"],
        ),
        (_pod(phase="Failed", reason="Evicted", message="low on disk"), "Evicted", ["low on disk"]),
    ],
)
def test_the_cause_is_told(pod: dict[str, Any], reason: str, words: list[str]) -> None:
    found = diagnose([pod], template=TEMPLATE)
    assert found is not None
    assert found.reason == reason
    for word in words:
        assert word in found.message


@pytest.mark.parametrize(
    "pod",
    [
        _container(state={"running": {}}, restartCount=0),
        _container(state=_waiting("ContainerCreating"), restartCount=0),
        _pod(conditions=[{"type": "PodScheduled", "status": "True"}]),
        _pod(phase="Running", containerStatuses=[{"name": "server", "ready": True, "lastState": _ended(1)}]),
    ],
)
def test_a_pod_that_only_needs_time_is_no_trouble(pod: dict[str, Any]) -> None:
    assert diagnose([pod], template=TEMPLATE) is None


def test_pods_of_an_older_template_or_on_their_way_out_do_not_count() -> None:
    old, leaving = {**CRASHED, "metadata": {"name": "y-0"}}, _pod(deleted=True, phase="Failed", reason="Evicted")
    assert diagnose([old, leaving], template=TEMPLATE) is None


def test_a_crash_tells_more_than_a_pod_that_waits() -> None:
    found = diagnose([UNSCHEDULABLE, CRASHED], template=TEMPLATE)
    assert found is not None and found.reason == "ServerCrashed"


def test_only_the_last_lines_are_told() -> None:
    log = "\n".join(f"line {number}" for number in range(100))
    found = diagnose([_container(state=_ended(1, message=log))], template=TEMPLATE)
    assert isinstance(found, Trouble)
    assert "line 99" in found.message and "line 91" not in found.message
    endless = diagnose([_container(state=_ended(1, message="x" * 9000))], template=TEMPLATE)
    assert endless is not None and len(endless.message) < 2000
