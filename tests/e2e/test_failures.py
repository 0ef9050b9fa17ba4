"""What goes wrong on real clusters: data, references, the operator, pods. Each ends well or says why not."""

import json
import time

import pytest

from support.finetunes import finetune, training
from support.installation import OURS, TRAINED
from support.kubectl import Kubectl, Object, condition, is_true, stage


@pytest.mark.parametrize(
    ("name", "spec", "says"),
    [
        (
            "broken-line",
            {"dataset": {"train": [{"claim": {"name": "data", "path": "broken.jsonl"}}]}},
            ["broken.jsonl:17", "not valid JSON"],
        ),
        (
            "unknown-label",
            {"task": {"classification": {"labels": ["good", "bad"]}}},
            ["reviews.jsonl:1", "positive", "good"],
        ),
        (
            "no-label-column",
            {"dataset": {"train": [{"claim": {"name": "data", "path": "unlabelled.jsonl"}}]}},
            ["unlabelled.jsonl:1", "label", "columns"],
        ),
        (
            "no-file",
            {"dataset": {"train": [{"claim": {"name": "data", "path": "nowhere.jsonl"}}]}},
            ["nowhere.jsonl", "data"],
        ),
    ],
)
def test_bad_data_stalls_before_training_and_the_message_names_the_place(
    kubectl: Kubectl, name: str, spec: Object, says: list[str]
) -> None:
    kubectl.apply(finetune(name, **spec))
    found = kubectl.wait(
        "finetune", name, lambda seen: condition(seen, "Stalled").get("status") == "True", timeout=TRAINED
    )
    message = condition(found, "Stalled")["message"]
    for part in says:
        assert part in message, message
    assert condition(found, "DataValid")["status"] == "False"
    assert kubectl.list("jobs", selector=OURS + ",tuneserve.dev/stage=train") == []


def test_a_missing_claim_is_named_and_the_run_goes_on_when_it_appears(kubectl: Kubectl) -> None:
    kubectl.apply(finetune("waiting", dataset={"train": [{"claim": {"name": "later", "path": "a.jsonl"}}]}))
    found = kubectl.wait(
        "finetune", "waiting", lambda seen: condition(seen, "Stalled").get("status") == "True", timeout=60
    )
    assert "later" in condition(found, "Stalled")["message"]
    assert kubectl.list("jobs", selector=OURS) == []

    claim_spec = {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "1Gi"}}}
    kubectl.apply(
        {"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": {"name": "later"}, "spec": claim_spec}
    )
    kubectl.wait("finetune", "waiting", lambda seen: bool(stage(seen, "prepare").get("job")), timeout=90)
    kubectl.delete("finetune", "waiting")
    kubectl.delete("persistentvolumeclaim", "later", wait=False)


def test_the_operator_killed_in_every_stage_changes_nothing(kubectl: Kubectl, system: Kubectl) -> None:
    kubectl.apply(finetune("killed", steps=30))
    names = ["prepare", "train", "merge", "evaluate-merged"]
    jobs: dict[str, set[str]] = {}
    for name in names:
        kubectl.wait("finetune", "killed", lambda seen, name=name: bool(stage(seen, name).get("job")), timeout=TRAINED)
        for pod in system.list("pods", selector="app.kubernetes.io/name=tuneserve"):
            system.delete("pod", pod["metadata"]["name"], wait=False, grace_seconds=0)
        for job in kubectl.list("jobs", selector=OURS):
            key = job["metadata"]["labels"]["tuneserve.dev/stage"]
            jobs.setdefault(key, set()).add(job["metadata"]["uid"])
    kubectl.wait("finetune", "killed", is_true("Ready"), timeout=TRAINED)
    for job in kubectl.list("jobs", selector=OURS):
        jobs.setdefault(job["metadata"]["labels"]["tuneserve.dev/stage"], set()).add(job["metadata"]["uid"])
    assert {name: len(jobs[name]) for name in names} == dict.fromkeys(names, 1)
    assert all(job["status"].get("failed", 0) == 0 for job in kubectl.list("jobs", selector=OURS))


def test_a_deleted_training_pod_resumes_from_its_checkpoint(kubectl: Kubectl) -> None:
    steps = 600  # so many that it still runs when the pod is deleted
    kubectl.apply(finetune("resumed", training=training(steps=steps, checkpoints={"steps": 5, "keep": 2})))
    kubectl.wait(
        "finetune",
        "resumed",
        lambda seen: (
            seen.get("status", {}).get("progress", {}).get("stage") == "train"
            and seen["status"]["progress"].get("step", 0) >= 10
        ),
        timeout=TRAINED,
    )
    selector = OURS + ",tuneserve.dev/stage=train"
    (pod,) = kubectl.list("pods", selector=selector)
    kubectl.delete("pod", pod["metadata"]["name"])
    trained = kubectl.wait(
        "finetune", "resumed", lambda seen: stage(seen, "train").get("state") == "Succeeded", timeout=TRAINED
    )
    (successor,) = kubectl.list("pods", selector=selector)
    assert successor["metadata"]["name"] != pod["metadata"]["name"]
    outcome = recorded_outcome(kubectl, "resumed-artifacts", stage(trained, "train"))
    assert 5 <= int(outcome["facts"]["resumedFromStep"]) < steps
    assert int(outcome["facts"]["steps"]) == steps
    assert condition(trained, "Stalled")["status"] == "False"


def recorded_outcome(kubectl: Kubectl, claim: str, run: Object) -> Object:
    """What a stage told, as the claim that holds its output records it."""
    found = kubectl.get("persistentvolumeclaim", claim)
    assert found is not None
    return json.loads(found["metadata"]["annotations"][f"outcome.tuneserve.dev/{run['name']}.{run['hash']}"])


def test_a_finetune_deleted_in_the_middle_leaves_only_its_artifacts_claim(kubectl: Kubectl) -> None:
    kubectl.apply(finetune("dropped", steps=500))
    kubectl.wait("finetune", "dropped", lambda seen: stage(seen, "train").get("state") == "Running", timeout=TRAINED)
    time.sleep(5)  # well inside the training, whatever the pod is doing
    kubectl.delete("finetune", "dropped")
    kubectl.wait_gone("jobs,pods,configmaps", selector=OURS, timeout=180)
    claims = kubectl.list("persistentvolumeclaims", selector=OURS)
    assert [claim["metadata"]["name"] for claim in claims] == ["dropped-artifacts"]
