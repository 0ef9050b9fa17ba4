"""Why a server pod does not answer, in a sentence that says what to do: pure.

Reads pods as the API server shows them. The worst of what can be seen is told, not all of it.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from tuneserve import names
from tuneserve.modelserve import server

#: Of the last words of a server that crashed, so many lines and characters are told.
_LAST_LINES = 8
_LAST_CHARACTERS = 1500

_IMAGE_REASONS = frozenset({"ErrImagePull", "ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull"})
_CONFIG_REASONS = frozenset({"CreateContainerConfigError", "CreateContainerError", "RunContainerError"})


class Trouble(NamedTuple):
    reason: str
    message: str


def diagnose(pods: Iterable[Mapping[str, Any]], *, template: str | None) -> Trouble | None:
    """What keeps pods of the current template from answering; none when they only need time."""
    current = [pod for pod in pods if _is_current(pod, template)]
    # Of several the one that tells most: a crash is a fact, a pod that waits for room may be its consequence.
    for look in (_of_container, _of_pod, _of_scheduling):
        for pod in current:
            found = look(pod)
            if found is not None:
                return found
    return None


def _is_current(pod: Mapping[str, Any], template: str | None) -> bool:
    metadata = pod["metadata"]
    annotations = metadata.get("annotations") or {}
    return not metadata.get("deletionTimestamp") and annotations.get(names.APPLIED) == template


def _of_container(pod: Mapping[str, Any]) -> Trouble | None:
    status = next(
        (item for item in _status(pod).get("containerStatuses") or () if item["name"] == server.CONTAINER), None
    )
    if status is None or status.get("ready"):
        return None
    state = status.get("state") or {}
    waiting = state.get("waiting") or {}
    reason, message = waiting.get("reason", ""), waiting.get("message") or "no details were given"
    if reason in _IMAGE_REASONS:
        return Trouble("ImagePullFailed", f"image {status.get('image') or 'of the server'} cannot be pulled: {message}")
    if reason in _CONFIG_REASONS:
        return Trouble(reason, f"the container of pod {_name(pod)} cannot be made: {message}")
    ended = state.get("terminated") or (status.get("lastState") or {}).get("terminated")
    if not ended:
        return None
    if ended.get("reason") == "OOMKilled":
        return Trouble("OutOfMemory", _out_of_memory(pod))
    restarts = int(status.get("restartCount", 0))
    return Trouble(
        "ServerCrashed",
        f"the server in pod {_name(pod)} ended with exit code {ended.get('exitCode')} "
        f"({restarts} restart{'' if restarts == 1 else 's'}); its last lines: {_last_lines(ended.get('message'))}",
    )


def _of_pod(pod: Mapping[str, Any]) -> Trouble | None:
    status = _status(pod)
    if status.get("phase") != "Failed":
        return None
    reason = status.get("reason") or "PodFailed"
    return Trouble(reason, f"pod {_name(pod)} failed: {status.get('message') or reason}")


def _of_scheduling(pod: Mapping[str, Any]) -> Trouble | None:
    for condition in _status(pod).get("conditions") or ():
        if condition.get("type") == "PodScheduled" and condition.get("status") == "False":
            message = condition.get("message") or "no node was found"
            return Trouble(condition.get("reason") or "Unschedulable", f"no node takes pod {_name(pod)}: {message}")
    return None


def _out_of_memory(pod: Mapping[str, Any]) -> str:
    containers: Sequence[Mapping[str, Any]] = (pod.get("spec") or {}).get("containers") or ()
    resources = next((item.get("resources") or {} for item in containers if item["name"] == server.CONTAINER), {})
    limit = (resources.get("limits") or {}).get("memory")
    cause = f"more memory than its limit of {limit}" if limit else "more memory than its node has"
    return (
        f"the server in pod {_name(pod)} was killed for using {cause}: set a smaller "
        "spec.engine.maxModelLength, or have the memory of the profile's server raised"
    )


def _last_lines(text: str | None) -> str:
    lines = [line.strip() for line in (text or "").splitlines() if line.strip()]
    return "\n".join(lines[-_LAST_LINES:])[-_LAST_CHARACTERS:] or "(none)"


def _status(pod: Mapping[str, Any]) -> Mapping[str, Any]:
    return pod.get("status") or {}


def _name(pod: Mapping[str, Any]) -> str:
    return str(pod["metadata"]["name"])
