"""A FineTune's life on a real node: trained, edited, deleted, found again; nothing is ever trained twice."""

from support.finetunes import artifact, finetune, training
from support.installation import OURS, TRAINED
from support.kubectl import Kubectl, condition, is_true, stage


def job_ids(kubectl: Kubectl, *, stage: str = "") -> set[str]:
    selector = OURS + (f",tuneserve.dev/stage={stage}" if stage else "")
    return {job["metadata"]["uid"] for job in kubectl.list("jobs", selector=selector)}


def test_an_edit_reruns_only_what_it_changes_and_a_new_object_finds_what_is_there(kubectl: Kubectl) -> None:
    kubectl.apply(finetune("life"))
    ready = kubectl.wait("finetune", "life", is_true("Ready"), timeout=TRAINED)

    assert condition(ready, "Reconciling")["status"] == "False"
    assert condition(ready, "DataValid")["status"] == "True"
    merged = artifact(ready, "merged")
    accuracy = next(metric for metric in merged["metrics"] if metric["name"] == "accuracy")
    assert 0 <= float(accuracy["value"]) <= 1 and 0 <= float(accuracy["base"]) <= 1
    assert merged["path"].startswith("merge/") and merged["digest"].startswith("sha256:")
    assert {name: stage(ready, name)["state"] for name in ("prepare", "train", "merge", "evaluate-merged")} == {
        "prepare": "Succeeded",
        "train": "Succeeded",
        "merge": "Succeeded",
        "evaluate-merged": "Succeeded",
    }
    first_jobs = job_ids(kubectl)

    # A second export runs only its own stage.
    exports = [{"name": "merged", "format": "Merged"}, {"name": "adapter", "format": "Adapter"}]
    kubectl.apply(finetune("life", exports=exports))
    both = kubectl.wait("finetune", "life", is_true("Ready"), timeout=TRAINED)
    assert artifact(both, "adapter")["path"].startswith("train/")
    added = [
        job["metadata"]["labels"]["tuneserve.dev/stage"]
        for job in kubectl.list("jobs", selector=OURS)
        if job["metadata"]["uid"] not in first_jobs
    ]
    assert added == ["evaluate-adapter"]

    # Another learning rate trains again, but does not prepare again.
    prepared = job_ids(kubectl, stage="prepare")
    kubectl.apply(finetune("life", training=training(steps=4, learningRate="5e-4")))
    edited = kubectl.wait("finetune", "life", is_true("Ready"), timeout=TRAINED)
    assert stage(edited, "prepare")["hash"] == stage(ready, "prepare")["hash"]
    assert stage(edited, "train")["hash"] != stage(ready, "train")["hash"]
    assert job_ids(kubectl, stage="prepare") == prepared
    assert artifact(edited, "merged")["version"] != merged["version"]

    # Deleted, only the claim is left; applied again, it is Ready at once and nothing runs.
    kubectl.delete("finetune", "life")
    kubectl.wait_gone("jobs,pods,configmaps", selector=OURS)
    assert [claim["metadata"]["name"] for claim in kubectl.list("persistentvolumeclaims", selector=OURS)] == [
        "life-artifacts"
    ]
    kubectl.apply(finetune("life"))
    again = kubectl.wait("finetune", "life", is_true("Ready"), timeout=10)
    assert artifact(again, "merged") == merged
    assert kubectl.list("jobs,pods", selector=OURS) == []


def test_an_instruction_data_set_trains_too(kubectl: Kubectl) -> None:
    dataset = {"train": [{"claim": {"name": "data", "path": "instructions.jsonl"}}]}
    kubectl.apply(finetune("copy", dataset=dataset, task={"instruction": {}}, evaluation={"maxSamples": 8}))
    ready = kubectl.wait("finetune", "copy", is_true("Ready"), timeout=TRAINED)
    assert "exactMatch" in {metric["name"] for metric in artifact(ready, "merged")["metrics"]}


def test_a_data_set_in_a_config_map_is_read_and_its_edit_prepares_again(kubectl: Kubectl) -> None:
    rows = [f'{{"text": "review {n} was {w}", "label": "{v}"}}' for n in range(30) for w, v in WORDS]
    config_map = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": "reviews"},
        "data": {"train.jsonl": "\n".join(rows)},
    }
    kubectl.apply(config_map)
    dataset = {"train": [{"configMap": {"name": "reviews", "key": "train.jsonl"}}]}
    kubectl.apply(finetune("mapped", dataset=dataset))
    first = kubectl.wait("finetune", "mapped", is_true("DataValid"), timeout=TRAINED)

    config_map["data"]["train.jsonl"] += "\n" + rows[0]
    kubectl.apply(config_map)
    kubectl.wait(
        "finetune",
        "mapped",
        lambda found: stage(found, "prepare").get("hash") != stage(first, "prepare")["hash"],
        timeout=TRAINED,
    )
    kubectl.delete("configmap", "reviews")


WORDS = [("lovely", "positive"), ("dull", "negative")]
