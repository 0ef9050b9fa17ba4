"""The process of the operator: at rest, killed, doubled, frozen, told to stop, and given an object it cannot read."""

import json
import random
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from support.controlplane import claim, ready_modelserve
from support.finetunes import finetune, modelserve
from support.kubectl import Kubectl, KubectlError, Object, condition, is_true
from support.operators import OperatorProcess
from support.stage_player import StagePlayer

pytestmark = pytest.mark.controlplane

ROOT = Path(__file__).resolve().parents[2]
KINDS = "ftune,mserve,jobs,pods,deployments,replicasets,services,configmaps,pvc,events.events.k8s.io,endpointslices"
WRITES = ("apply", "apply_status", "create", "delete")
LEASE = "tuneserve-operator"


def tuned(kubectl: Kubectl, name: str = "mood") -> None:
    kubectl.apply(claim("tiny"), claim("data"), finetune(name), modelserve(name, finetune=name))


def versions(kubectl: Kubectl) -> dict[tuple[str, str], str]:
    """The resourceVersion of everything in the namespace."""
    items = json.loads(kubectl.run("get", KINDS, "-o", "json"))["items"]
    return {(item["kind"], item["metadata"]["name"]): item["metadata"]["resourceVersion"] for item in items}


def writes(operator: OperatorProcess) -> float:
    return sum(operator.metric("tuneserve_kube_requests_total", verb=verb) for verb in WRITES)


def lease_holder(admin: Kubectl) -> str:
    lease = admin.get("lease", LEASE)
    assert lease is not None
    return str(lease["spec"].get("holderIdentity", ""))


def wait_for_leader(admin: Kubectl, name: str, *, timeout: float = 60) -> None:
    admin.wait("lease", LEASE, lambda lease: lease["spec"].get("holderIdentity") == name, timeout=timeout)


@pytest.fixture
def second(operator: OperatorProcess, kubeconfig: Path, tmp_path: Path) -> Iterator[OperatorProcess]:
    """Another operator with the same configuration, standing by; at the end the first one leads again."""
    config = yaml.safe_load(operator.config.read_text())
    other = OperatorProcess(
        directory=tmp_path, kubeconfig=kubeconfig, config=config, lease_namespace=operator.lease_namespace, name="two"
    )
    other.start()
    other.wait_ready()
    yield other
    other.thaw()
    if other.alive():
        other.terminate()
        other.wait()


# --- at rest ----------------------------------------------------------------------------------------------------------


def test_objects_at_rest_cause_no_writes(admin: Kubectl, kubectl: Kubectl, operator: OperatorProcess) -> None:
    # The operator's writes are counted for all namespaces: those of the tests before must be gone.
    admin.wait_gone("namespaces", field="status.phase=Terminating")
    with StagePlayer(kubectl):
        tuned(kubectl)
        kubectl.apply(modelserve("lost", finetune="nobody"), modelserve("typo", finetune="mood", export="x"))
        ready_modelserve(kubectl, "mood", timeout=90)
    kubectl.wait("mserve", "lost", is_true("Reconciling"))
    kubectl.wait("mserve", "typo", is_true("Stalled"))
    time.sleep(3)  # controllers finish what the last change set off
    before, written = versions(kubectl), writes(operator)
    # Every object is looked at in that time, not only left alone.
    kubectl.run("label", "pods", "--all", "looked=at")
    labelled = versions(kubectl)
    time.sleep(20)
    after = versions(kubectl)
    assert {key for key in before if key[0] != "Pod" and after.get(key) != before[key]} == set()
    assert after == labelled
    assert writes(operator) == written


def test_its_metrics_tell_what_it_does(kubectl: Kubectl, operator: OperatorProcess) -> None:
    kubectl.apply(modelserve("lost", finetune="nobody"))
    kubectl.wait("mserve", "lost", is_true("Reconciling"))
    assert operator.get("/healthz") == (200, "ok\n")
    assert operator.metric("tuneserve_leader") == 1
    assert operator.metric("tuneserve_reconciles_total", kind="ModelServe", result="success") >= 1
    assert operator.metric("tuneserve_queue_adds_total", kind="ModelServe") >= 1
    assert operator.metric("tuneserve_watch_events_total", kind="ModelServe") >= 1
    assert operator.metric("tuneserve_kube_requests_total", verb="apply_status", kind="ModelServe", code="200") >= 1
    text = operator.get("/metrics")[1]
    for name in ("depth", "delayed", "running", "oldest_seconds", "wait_seconds_count"):
        assert f"\ntuneserve_queue_{name}" in text
    assert "\ntuneserve_reconcile_seconds_bucket" in text
    assert "\ntuneserve_event_loop_lag_seconds" in text


# --- killed, doubled, frozen ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [1, 2])
def test_kills_at_any_moment_change_nothing_in_the_end(kubectl: Kubectl, operator: OperatorProcess, seed: int) -> None:
    chance = random.Random(seed)
    with StagePlayer(kubectl) as player:
        tuned(kubectl)
        for _ in range(6):
            time.sleep(chance.uniform(0.05, 1.5))
            operator.kill()
            operator.start()
        operator.wait_ready()
        found = ready_modelserve(kubectl, "mood", timeout=120)
        assert len(player.ended) == len(set(player.ended)), "a stage ran twice"
    assert found["status"]["readyReplicas"] == 1
    jobs = [job["metadata"]["labels"]["tuneserve.dev/stage"] for job in kubectl.list("jobs")]
    assert len(jobs) == len(set(jobs)), "a stage has two Jobs"
    assert len(kubectl.list("deployments")) == 1


def test_what_changed_while_no_operator_ran_is_made_good(kubectl: Kubectl, operator: OperatorProcess) -> None:
    kubectl.apply(claim("models"), _on_claim("kept"), _on_claim("gone"))
    for name in ("kept", "gone"):
        ready_modelserve(kubectl, name)
    operator.kill()
    kubectl.delete("mserve", "gone")
    kubectl.delete("deployment", "kept")
    kubectl.apply(_on_claim("fresh"))
    operator.start()
    for name in ("kept", "fresh"):
        kubectl.wait("deployment", name, lambda body: body["status"].get("availableReplicas") == 1)
        ready_modelserve(kubectl, name)
    kubectl.wait_gone("deployments", selector="tuneserve.dev/modelserve=gone")


def _on_claim(name: str) -> Object:
    body = modelserve(name, finetune="unused")
    body["spec"]["model"] = {"claim": {"name": "models"}}
    return body


def test_of_two_operators_one_leads_and_the_other_takes_over(
    admin: Kubectl, kubectl: Kubectl, operator: OperatorProcess, second: OperatorProcess
) -> None:
    assert lease_holder(admin) == operator.name
    assert (operator.metric("tuneserve_leader"), second.metric("tuneserve_leader")) == (1, 0)
    kubectl.apply(claim("models"), _on_claim("shop"))
    ready_modelserve(kubectl, "shop")
    assert writes(second) == 0, "a standby must not act"
    operator.kill()
    wait_for_leader(admin, second.name)
    second.wait_ready()
    kubectl.run("scale", "mserve/shop", "--replicas=2")
    kubectl.wait("mserve", "shop", lambda body: body["status"].get("readyReplicas") == 2)
    operator.start()
    operator.wait_ready()
    assert operator.metric("tuneserve_leader") == 0
    second.terminate()
    assert second.wait() == 0
    wait_for_leader(admin, operator.name)


def test_a_leader_that_was_frozen_gives_up_when_it_wakes(
    admin: Kubectl, kubectl: Kubectl, operator: OperatorProcess, second: OperatorProcess
) -> None:
    operator.freeze()
    try:
        wait_for_leader(admin, second.name)
    finally:
        operator.thaw()
    assert operator.wait() == 1
    assert any("is lost" in line["message"] for line in operator.lines())
    kubectl.apply(claim("models"), _on_claim("shop"))
    ready_modelserve(kubectl, "shop")
    assert lease_holder(admin) == second.name


def test_sigterm_ends_it_cleanly_and_releases_the_lease(
    admin: Kubectl, kubectl: Kubectl, operator: OperatorProcess
) -> None:
    tuned(kubectl)
    kubectl.wait("ftune", "mood", is_true("Reconciling"))
    operator.terminate()
    assert operator.wait(timeout=30) == 0
    assert lease_holder(admin) == ""
    assert operator.lines()[-1]["message"] == "stopped"
    operator.start()
    operator.wait_ready()
    with StagePlayer(kubectl):
        ready_modelserve(kubectl, "mood", timeout=90)


def test_a_standby_ends_cleanly_too(operator: OperatorProcess, second: OperatorProcess) -> None:
    second.terminate()
    assert second.wait(timeout=30) == 0
    assert operator.alive()


# --- what it cannot read ----------------------------------------------------------------------------------------------


@pytest.fixture
def loose_schema(admin: Kubectl) -> Iterator[None]:
    """While the test stores its objects the API server takes anything, as an older or a newer CRD might have."""
    loosened = []
    for path in sorted((ROOT / "crds").glob("*.yaml")):
        crd = yaml.safe_load(path.read_text())
        spec = {"type": "object", "x-kubernetes-preserve-unknown-fields": True}
        crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"] = {"type": "object", "properties": {"spec": spec}}
        loosened.append(crd)
    admin.apply(*loosened)
    yield
    admin.run("apply", "--server-side", "--force-conflicts", "-f", str(ROOT / "crds"))


def test_a_stored_object_that_cannot_be_read_is_stalled_and_harms_nobody(
    admin: Kubectl, kubectl: Kubectl, operator: OperatorProcess, loose_schema: None
) -> None:
    baseless, modelless, mangled = finetune("broken"), _on_claim("broken"), _on_claim("mangled")
    del baseless["spec"]["baseModel"]
    del modelless["spec"]["model"]
    # Of such a one not even the status can be written: the API server itself cannot read it.
    mangled["spec"]["model"] = "?"
    _when_loose(kubectl, baseless, modelless, mangled)
    admin.run("apply", "--server-side", "--force-conflicts", "-f", str(ROOT / "crds"))
    for kind, field in (("mserve", "spec.model"), ("ftune", "spec.baseModel")):
        found = kubectl.wait(kind, "broken", is_true("Stalled"))
        assert condition(found, "Stalled")["reason"] == "InvalidSpec"
        assert field in condition(found, "Stalled")["message"]
    with StagePlayer(kubectl):
        tuned(kubectl)
        ready_modelserve(kubectl, "mood", timeout=90)
    assert operator.alive()


def _when_loose(kubectl: Kubectl, *objects: Object) -> None:
    """Store the objects, as soon as the API server works with the loosened schema."""
    deadline = time.monotonic() + 30
    while True:
        try:
            kubectl.apply(*objects)
            return
        except KubectlError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.5)


def test_a_configuration_that_is_wrong_is_said_at_once(kubeconfig: Path, tmp_path: Path) -> None:
    operator = OperatorProcess(
        directory=tmp_path, kubeconfig=kubeconfig, config={"profiles": []}, lease_namespace="default", name="wrong"
    )
    operator.start()
    assert operator.wait() == 1
    assert "exactly one profile must have default: true" in operator.lines()[-1]["message"]
