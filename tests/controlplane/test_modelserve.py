"""What a ModelServe becomes, how it follows its FineTune, and what it says when it cannot serve."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from support.controlplane import claim, ready_modelserve
from support.finetunes import finetune, modelserve
from support.kubectl import Kubectl, Object, condition, is_true
from support.operators import OperatorProcess
from support.stage_player import StagePlayer, succeed

pytestmark = [pytest.mark.controlplane, pytest.mark.usefixtures("operator")]


def on_claim(name: str, **spec: Any) -> Object:
    """A ModelServe of a model that lies on the claim `models`."""
    body = modelserve(name, finetune="unused", **spec)
    body["spec"]["model"] = {"claim": {"name": "models", "path": "llama/7b"}}
    return body


def container(deployment: Object) -> Object:
    return deployment["spec"]["template"]["spec"]["containers"][0]


def pods(kubectl: Kubectl, name: str) -> set[str]:
    found = kubectl.list("pods", selector=f"tuneserve.dev/modelserve={name}")
    return {pod["metadata"]["uid"] for pod in found if not pod["metadata"].get("deletionTimestamp")}


def says(type: str, reason: str, *words: str) -> Any:
    """Whether a condition holds for this reason, with these words in its message."""

    def check(found: Object) -> bool:
        seen = condition(found, type)
        return (
            seen.get("status") == "True"
            and seen.get("reason") == reason
            and all(word in seen.get("message", "") for word in words)
        )

    return check


# --- a model on a claim -----------------------------------------------------------------------------------------------


@pytest.fixture
def served(kubectl: Kubectl) -> Object:
    """A ModelServe `shop` that answers."""
    kubectl.apply(claim("models"), on_claim("shop", servedName="shop-assistant"))
    return ready_modelserve(kubectl, "shop")


def test_it_gets_a_deployment_and_a_service(kubectl: Kubectl, served: Object) -> None:
    deployment, service = kubectl.get("deployment", "shop"), kubectl.get("service", "shop")
    assert deployment is not None and service is not None
    for child in (deployment, service):
        [owner] = child["metadata"]["ownerReferences"]
        assert (owner["kind"], owner["uid"], owner["controller"]) == ("ModelServe", served["metadata"]["uid"], True)
        assert child["metadata"]["labels"]["tuneserve.dev/modelserve"] == "shop"
    arguments = container(deployment)["args"]
    assert arguments[0] == "/model/llama/7b"
    assert arguments[arguments.index("--served-model-name") + 1] == "shop-assistant"
    assert arguments[arguments.index("--dtype") + 1] == "float32", "of the profile"
    assert "--chat-template" not in arguments, "nothing is known about a model on a claim"
    assert service["spec"]["ports"][0]["port"] == 80
    assert service["spec"]["selector"].items() <= deployment["spec"]["template"]["metadata"]["labels"].items()
    assert "publishNotReadyAddresses" not in service["spec"]
    endpoints = kubectl.list("endpointslices", selector="kubernetes.io/service-name=shop")
    assert [port["port"] for port in endpoints[0]["ports"]] == [8000]

    status = served["status"]
    assert status["url"] == f"http://shop.{kubectl.namespace}.svc/v1"
    assert (status["replicas"], status["readyReplicas"]) == (1, 1)
    assert status["served"]["claim"] == "models" and status["served"]["path"] == "llama/7b"
    assert "candidate" not in status
    assert condition(served, "Available")["status"] == "True"
    selected = kubectl.list("pods", selector=status["selector"])
    assert {pod["metadata"]["uid"] for pod in selected} == pods(kubectl, "shop")


def test_its_events_are_told_once(kubectl: Kubectl, served: Object) -> None:
    found = [event for event in kubectl.list("events.events.k8s.io") if event["regarding"]["name"] == "shop"]
    ours = sorted(event["reason"] for event in found if event["reportingController"] == "tuneserve.dev/operator")
    assert ours == ["ModelRolloutStarted", "ModelServed"]


def test_kubectl_scale_sets_the_replicas(kubectl: Kubectl, served: Object) -> None:
    kubectl.run("scale", "mserve/shop", "--replicas=3")
    found = kubectl.wait("mserve", "shop", lambda body: body["status"].get("readyReplicas") == 3)
    assert found["spec"]["replicas"] == 3
    kubectl.run("scale", "mserve/shop", "--replicas=0")
    found = kubectl.wait("mserve", "shop", lambda body: condition(body, "Ready").get("reason") == "ScaledToZero")
    assert condition(found, "Available")["status"] == "False"
    assert found["status"]["served"]["path"] == "llama/7b"


@pytest.mark.parametrize(
    ("kind", "patch", "path", "expected"),
    [
        ("deployment", {"spec": {"replicas": 5}}, ("spec", "replicas"), 1),
        ("deployment", {"metadata": {"labels": {"tuneserve.dev/modelserve": "other"}}}, ("metadata", "labels"), None),
        (
            "deployment",
            {"spec": {"template": {"spec": {"automountServiceAccountToken": True}}}},
            ("spec", "template", "spec", "automountServiceAccountToken"),
            False,
        ),
        ("service", {"spec": {"selector": {"tuneserve.dev/modelserve": "x"}}}, ("spec", "selector"), None),
    ],
)
def test_an_edit_by_hand_is_repaired(
    kubectl: Kubectl, served: Object, kind: str, patch: Object, path: tuple[str, ...], expected: Any
) -> None:
    def value(body: Object) -> Any:
        for step in path:
            body = body[step]
        return body

    before = kubectl.get(kind, "shop")
    assert before is not None
    wanted = value(before) if expected is None else expected
    kubectl.patch(kind, "shop", patch)
    if kind == "service":
        # Services are not watched: any event of the ModelServe brings the look that repairs it.
        kubectl.run("annotate", "mserve/shop", "touched=1")
    kubectl.wait(kind, "shop", lambda body: value(body) == wanted, timeout=30)


def test_deleted_children_are_made_again(kubectl: Kubectl, served: Object) -> None:
    before = kubectl.get("deployment", "shop")
    assert before is not None
    kubectl.delete("deployment", "shop")
    kubectl.wait("deployment", "shop", lambda body: body["metadata"]["uid"] != before["metadata"]["uid"])
    ready_modelserve(kubectl, "shop")


def test_a_deleted_modelserve_takes_all_with_it_but_the_claim(kubectl: Kubectl, served: Object) -> None:
    kubectl.delete("mserve", "shop")
    for kind in ("deployments", "services", "pods"):
        kubectl.wait_gone(kind, selector="tuneserve.dev/modelserve=shop")
    assert kubectl.get("pvc", "models") is not None


def test_a_missing_claim_is_waited_for(kubectl: Kubectl) -> None:
    kubectl.apply(on_claim("early"))
    kubectl.wait("mserve", "early", says("Reconciling", "ClaimNotFound", '"models"'))
    assert kubectl.get("deployment", "early") is None
    kubectl.apply(claim("models"))
    ready_modelserve(kubectl, "early")


def test_a_deployment_of_somebody_else_is_left_alone(kubectl: Kubectl) -> None:
    labels = {"app": "mine"}
    foreign = {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": "taken"},
        "spec": {
            "replicas": 0,
            "selector": {"matchLabels": labels},
            "template": {"metadata": {"labels": labels}, "spec": {"containers": [{"name": "c", "image": "i"}]}},
        },
    }
    kubectl.apply(foreign, claim("models"), on_claim("taken"))
    kubectl.wait("mserve", "taken", says("Stalled", "NameTaken", 'Deployment "taken"', "not made by TuneServe"))
    left = kubectl.get("deployment", "taken")
    assert left is not None
    assert container(left)["image"] == "i"
    assert "ownerReferences" not in left["metadata"]
    assert kubectl.get("service", "taken") is None
    kubectl.delete("deployment", "taken")
    ready_modelserve(kubectl, "taken")


def test_a_profile_that_does_not_exist_is_named_with_those_that_do(kubectl: Kubectl) -> None:
    kubectl.apply(claim("models"), on_claim("wrong", accelerator={"profile": "a100"}))
    kubectl.wait("mserve", "wrong", says("Stalled", "ProfileNotFound", "a100", "rtx-4090"))
    kubectl.patch("mserve", "wrong", {"spec": {"accelerator": {"profile": "rtx-4090"}}})
    ready_modelserve(kubectl, "wrong")
    deployment = kubectl.get("deployment", "wrong")
    assert deployment is not None
    assert container(deployment)["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert container(deployment)["image"] == "vllm/vllm-openai:v0.33.0"


def test_a_pod_that_finds_no_node_says_what_is_missing(kubectl: Kubectl) -> None:
    kubectl.apply(claim("models"), on_claim("big", accelerator={"profile": "rtx-4090", "count": 2}))
    found = kubectl.wait("mserve", "big", says("Reconciling", "Unschedulable", "Insufficient nvidia.com/gpu"))
    assert condition(found, "Available")["status"] == "False"
    assert condition(found, "Ready")["message"] == condition(found, "Reconciling")["message"]


def test_a_server_that_crashes_is_quoted(kubectl: Kubectl, served: Object) -> None:
    [pod] = kubectl.list("pods", selector="tuneserve.dev/modelserve=shop")
    words = "INFO loading\nValueError: max_model_len (8192) is larger than the KV cache\n"
    ended = {"exitCode": 1, "reason": "Error", "message": words}
    status = {
        "containerStatuses": [
            {
                **pod["status"]["containerStatuses"][0],
                "ready": False,
                "restartCount": 3,
                "state": {"waiting": {"reason": "CrashLoopBackOff", "message": "back-off 40s"}},
                "lastState": {"terminated": ended},
            }
        ],
        "conditions": [{"type": kind, "status": "False"} for kind in ("Ready", "ContainersReady")],
    }
    kubectl.patch("pod", pod["metadata"]["name"], {"status": status}, subresource="status")
    found = kubectl.wait(
        "mserve", "shop", says("Reconciling", "ServerCrashed", "exit code 1", "larger than the KV cache")
    )
    assert condition(found, "Ready")["status"] == "False"
    kubectl.delete("pod", pod["metadata"]["name"], wait=False)
    ready_modelserve(kubectl, "shop")


def test_a_refusal_of_the_api_server_reaches_the_object(kubectl: Kubectl) -> None:
    quota = {
        "apiVersion": "v1",
        "kind": "ResourceQuota",
        "metadata": {"name": "none"},
        "spec": {"hard": {"count/deployments.apps": "0"}},
    }
    kubectl.apply(quota, claim("models"))
    kubectl.wait("resourcequota", "none", lambda body: "hard" in body.get("status", {}))
    kubectl.apply(on_claim("poor"))
    kubectl.wait("mserve", "poor", says("Reconciling", "Refused", "exceeded quota"))
    kubectl.delete("resourcequota", "none")
    ready_modelserve(kubectl, "poor")


# --- a model of a FineTune --------------------------------------------------------------------------------------------


@dataclass
class Tuned:
    """A FineTune `mood` with a ModelServe of the same name."""

    kubectl: Kubectl
    player: StagePlayer
    served: Object

    def train_again(self, *, steps: int) -> None:
        self.kubectl.patch("ftune", "mood", {"spec": {"training": {"maxSteps": steps}}})


@pytest.fixture
def tuned(kubectl: Kubectl) -> Iterator[Tuned]:
    with StagePlayer(kubectl) as player:
        gates = [{"metric": "accuracy", "atLeast": "0.80"}]
        kubectl.apply(claim("tiny"), claim("data"), finetune("mood", gates=gates), modelserve("mood", finetune="mood"))
        yield Tuned(kubectl=kubectl, player=player, served=ready_modelserve(kubectl, "mood", timeout=90))


def test_the_artifact_is_served_with_the_template_of_its_training(kubectl: Kubectl, tuned: Tuned) -> None:
    tuning, deployment = kubectl.get("ftune", "mood"), kubectl.get("deployment", "mood")
    assert tuning is not None and deployment is not None
    [artifact] = tuning["status"]["artifacts"]
    served = tuned.served["status"]["served"]
    assert {key: served[key] for key in ("version", "digest", "claim", "path")} == {
        key: artifact[key] for key in ("version", "digest", "claim", "path")
    }
    arguments = container(deployment)["args"]
    assert arguments[0] == "/model"
    assert arguments[arguments.index("--chat-template") + 1] == "/model/chat_template.jinja"
    [mount] = [item for item in container(deployment)["volumeMounts"] if item["name"] == "model"]
    assert (mount["mountPath"], mount["subPath"], mount["readOnly"]) == ("/model", artifact["path"], True)


def test_a_deleted_finetune_is_not_missed(kubectl: Kubectl, tuned: Tuned) -> None:
    before = pods(kubectl, "mood")
    kubectl.delete("ftune", "mood")
    found = kubectl.wait("mserve", "mood", lambda body: "is gone" in condition(body, "Ready").get("message", ""))
    assert condition(found, "Ready")["status"] == "True"
    kubectl.patch("mserve", "mood", {"spec": {"replicas": 2}})
    kubectl.wait("mserve", "mood", lambda body: body["status"].get("readyReplicas") == 2)
    assert before < pods(kubectl, "mood")
    kubectl.delete("deployment", "mood")
    found = ready_modelserve(kubectl, "mood")
    assert found["status"]["served"]["version"] == tuned.served["status"]["served"]["version"]


def test_a_new_version_replaces_the_old_one_when_it_is_finished(kubectl: Kubectl, tuned: Tuned) -> None:
    old = tuned.served["status"]["served"]["version"]
    tuned.player.play = lambda stage, hash: None if stage == "evaluate-merged" else succeed(stage, hash)
    tuned.train_again(steps=8)
    kubectl.wait("ftune", "mood", lambda body: any(s.get("state") == "Running" for s in body["status"]["stages"]))
    found = kubectl.get("mserve", "mood")
    assert found is not None
    assert found["status"]["served"]["version"] == old, "an artifact that is not measured is not served"
    tuned.player.play = succeed
    found = kubectl.wait("mserve", "mood", lambda body: body["status"]["served"]["version"] != old, timeout=90)
    found = ready_modelserve(kubectl, "mood")
    assert "candidate" not in found["status"]
    kubectl.wait("deployment", "mood", lambda body: body["status"].get("replicas") == 1)


def test_a_version_that_fails_its_gates_is_not_served(kubectl: Kubectl, tuned: Tuned) -> None:
    old, before = tuned.served["status"]["served"]["version"], pods(kubectl, "mood")
    tuned.player.play = lambda stage, hash: succeed(stage, hash, accuracy=0.5)
    tuned.train_again(steps=8)
    found = kubectl.wait(
        "mserve", "mood", lambda body: "does not pass" in condition(body, "Ready").get("message", ""), timeout=90
    )
    assert found["status"]["served"]["version"] == old
    assert condition(found, "Ready")["status"] == "True"
    assert pods(kubectl, "mood") == before


def test_a_pinned_version_stays(kubectl: Kubectl, tuned: Tuned) -> None:
    old = tuned.served["status"]["served"]["version"]
    kubectl.patch("mserve", "mood", {"spec": {"model": {"fineTune": {"version": old}}}})
    tuned.train_again(steps=8)
    found = kubectl.wait(
        "mserve", "mood", lambda body: "holds this one" in condition(body, "Ready").get("message", ""), timeout=90
    )
    assert found["status"]["served"]["version"] == old
    kubectl.patch("mserve", "mood", {"spec": {"model": {"fineTune": {"version": None}}}})
    kubectl.wait("mserve", "mood", lambda body: body["status"]["served"]["version"] != old)


def test_an_export_that_does_not_exist_is_named_with_those_that_do(kubectl: Kubectl, tuned: Tuned) -> None:
    kubectl.apply(modelserve("typo", finetune="mood", export="mergd"))
    kubectl.wait("mserve", "typo", says("Stalled", "ExportNotFound", '"mergd"', "one of: merged"))


def test_a_finetune_that_comes_later_is_noticed(kubectl: Kubectl) -> None:
    kubectl.apply(modelserve("first", finetune="later"))
    kubectl.wait("mserve", "first", says("Reconciling", "FineTuneNotFound", '"later"'))
    with StagePlayer(kubectl):
        kubectl.apply(claim("tiny"), claim("data"), finetune("later"))
        kubectl.wait("mserve", "first", says("Reconciling", "FineTuneNotReady"))
        ready_modelserve(kubectl, "first", timeout=90)


def test_serving_goes_on_without_the_operator(kubectl: Kubectl, tuned: Tuned, operator: OperatorProcess) -> None:
    before = pods(kubectl, "mood")
    operator.kill()
    kubectl.delete("ftune", "mood")
    assert pods(kubectl, "mood") == before
    operator.start()
    operator.wait_ready()
    found = kubectl.wait("mserve", "mood", lambda body: "is gone" in condition(body, "Ready").get("message", ""))
    assert is_true("Ready")(found)
    assert pods(kubectl, "mood") == before
