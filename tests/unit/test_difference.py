"""What counts as a difference between a wanted and a live object."""

from copy import deepcopy
from decimal import Decimal
from typing import Any

import pytest

from tuneserve import names
from tuneserve.difference import differs, quantity, with_hash

DESIRED: dict[str, Any] = {
    "apiVersion": "apps/v1",
    "kind": "Deployment",
    "metadata": {"name": "y", "namespace": "n", "labels": {"a": "b"}},
    "spec": {
        "replicas": 2,
        "template": {
            "spec": {
                "automountServiceAccountToken": False,
                "containers": [
                    {
                        "name": "server",
                        "args": ["/model", "--port", "8000"],
                        "env": [{"name": "HOME", "value": "/cache"}],
                        "resources": {"requests": {"cpu": "1", "memory": "4Gi"}},
                        "volumeMounts": [
                            {"name": "tmp", "mountPath": "/tmp"},
                            {"name": "tmp", "mountPath": "/var/tmp"},
                        ],
                    }
                ],
                "volumes": [{"name": "tmp", "emptyDir": {}}],
            }
        },
    },
}


def _live() -> dict[str, Any]:
    """As the API server gives it back: defaults filled in, quantities rewritten."""
    live = deepcopy(DESIRED)
    live["metadata"] |= {"uid": "u", "resourceVersion": "1", "managedFields": []}
    live["spec"] |= {"revisionHistoryLimit": 10}
    container = live["spec"]["template"]["spec"]["containers"][0]
    container["resources"]["requests"] = {"cpu": "1000m", "memory": "4096Mi"}
    container["terminationMessagePath"] = "/dev/termination-log"
    live["spec"]["template"]["spec"]["dnsPolicy"] = "ClusterFirst"
    live["status"] = {"replicas": 2}
    return live


def test_defaults_and_rewritten_quantities_are_no_difference() -> None:
    assert not differs(DESIRED, _live())


def test_what_others_add_is_theirs() -> None:
    live = _live()
    pod = live["spec"]["template"]["spec"]
    pod["containers"].insert(0, {"name": "sidecar", "image": "mesh"})
    pod["containers"][1]["env"].insert(0, {"name": "INJECTED", "value": "1"})
    pod["volumes"].append({"name": "mesh", "emptyDir": {}})
    live["spec"]["template"]["metadata"] = {"annotations": {"kubectl.kubernetes.io/restartedAt": "now"}}
    assert not differs(DESIRED, live)


def _container(body: dict[str, Any]) -> dict[str, Any]:
    return body["spec"]["template"]["spec"]["containers"][0]


@pytest.mark.parametrize(
    "edit",
    [
        lambda live: live["spec"].update(replicas=3),
        lambda live: live["spec"].pop("replicas"),
        lambda live: live["metadata"]["labels"].clear(),
        lambda live: _container(live)["args"].append("--enforce-eager"),
        lambda live: _container(live)["args"].pop(),
        lambda live: _container(live)["args"].reverse(),
        lambda live: _container(live)["env"].clear(),
        lambda live: _container(live)["env"][0].update(value="/root"),
        lambda live: _container(live)["volumeMounts"].pop(),
        lambda live: _container(live)["resources"]["requests"].update(memory="4G"),
        lambda live: _container(live).pop("resources"),
        lambda live: live["spec"]["template"]["spec"].pop("automountServiceAccountToken"),
        lambda live: live["spec"]["template"]["spec"].update(automountServiceAccountToken=True),
        lambda live: live["spec"]["template"]["spec"].update(volumes=[]),
    ],
)
def test_an_edit_of_what_is_wanted_is_a_difference(edit: Any) -> None:
    live = _live()
    edit(live)
    assert differs(DESIRED, live)


def test_empty_values_are_left_out_by_the_api_server() -> None:
    assert not differs({"spec": {"env": [], "nodeSelector": {}, "path": "", "size": None}}, {"spec": {}})


def test_a_number_is_no_truth_value() -> None:
    assert differs({"flag": True}, {"flag": 1})


def test_a_field_that_is_no_longer_wanted_shows_through_the_hash() -> None:
    with_selector = deepcopy(DESIRED)
    with_selector["spec"]["template"]["spec"]["nodeSelector"] = {"gpu": "4090"}
    live = with_hash(with_selector)
    assert not differs(with_hash(with_selector), live)
    assert not differs(DESIRED, live), "the subset alone does not see it"
    assert differs(with_hash(DESIRED), live)


def test_the_hash_is_of_the_content_and_keeps_other_annotations() -> None:
    body = {"metadata": {"name": "x", "annotations": {"k": "v"}}, "spec": {"a": 1, "b": 2}}
    same = {"spec": {"b": 2, "a": 1}, "metadata": {"annotations": {"k": "v"}, "name": "x"}}
    annotations = with_hash(body)["metadata"]["annotations"]
    assert annotations == with_hash(same)["metadata"]["annotations"]
    assert annotations.keys() == {"k", names.APPLIED}
    assert body["metadata"]["annotations"] == {"k": "v"}, "the argument is left alone"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1", Decimal(1)),
        (2, Decimal(2)),
        ("1500m", Decimal("1.5")),
        ("0.5", Decimal("0.5")),
        ("2Gi", Decimal(2 * 2**30)),
        ("2G", Decimal(2 * 10**9)),
        ("1e3", Decimal(1000)),
        ("100k", Decimal(100_000)),
        ("banana", None),
        ("1Zi", None),
        ("", None),
        (True, None),
        (None, None),
    ],
)
def test_quantities(text: Any, value: Decimal | None) -> None:
    assert quantity(text) == value
