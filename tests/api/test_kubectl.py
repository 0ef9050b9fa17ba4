"""What users see through kubectl: explanations, columns, scaling."""

import json

import pytest

from api.manifests import FINETUNE, MODELSERVE, changed
from support.kubectl import Kubectl, KubectlError
from tuneserve.api import FineTuneStatus, ModelServeStatus

pytestmark = pytest.mark.controlplane


@pytest.mark.parametrize(
    ("field", "words"),
    [
        ("finetunes", "A FineTune declares artifacts: a base model, tuned on a data set, exported, and measured."),
        ("ftune.spec.training.learningRate", 'greater than 0 and at most 1. Left out: "2e-4" for QLoRA and LoRA'),
        ("ftune.spec.training.maxGradientNorm", 'Norm to which longer gradients are cut. Default: "1.0".'),
        ("ftune.spec.training.maxSequenceLength", "Longest row in tokens, prompt and answer together. Default: 2048."),
        ("ftune.spec.method", "ENUM: QLoRA"),
        ("ftune.spec.dataset.columns", "A classification has the fields text and label"),
        ("ftune.spec.output.deletionPolicy", "ENUM: Retain Delete"),
        (
            "ftune.spec.ttlSecondsAfterFinished",
            "Seconds after which the Job and the pods of a finished stage are removed.",
        ),
        ("ftune.status.progress.etaSeconds", "Seconds until the stage is done"),
        ("ftune.status.artifacts.sizeBytes", "Size of all its files in bytes."),
        ("mserve.spec.model.fineTune.version", "Left out: the latest one that passes the gates of the FineTune."),
        ("mserve.spec.engine.maxModelLength", "Longest conversation in tokens"),
        ("mserve.status.url", "Base URL of the OpenAI-compatible API inside the cluster."),
    ],
)
def test_explain_tells_what_a_field_is(kubectl: Kubectl, field: str, words: str) -> None:
    assert words in " ".join(kubectl.run("explain", field).split())


def test_explain_knows_every_field(kubectl: Kubectl) -> None:
    text = kubectl.run("explain", "ftune", "--recursive")
    assert "checkpoints\t<Object>" in text
    assert "labels\t<[]string> -required-" in text


def test_a_finetune_is_shown_with_its_progress(kubectl: Kubectl) -> None:
    kubectl.apply(changed(FINETUNE, {"metadata.name": "shown", "spec.accelerator": {"profile": "cpu"}}))
    status = {
        "conditions": [_ready("False")],
        "stages": [{"name": "prepare", "state": "Succeeded"}, {"name": "train", "state": "Running", "attempt": 2}],
        "progress": {"stage": "train", "percent": 42, "loss": "0.4321", "etaSeconds": 95},
        "artifacts": [
            {
                "export": "merged",
                "version": "0123456789abcdef",
                "claim": "shown-artifacts",
                "path": "merge/0123456789abcdef/model",
                "metrics": [
                    {"name": "accuracy", "value": "0.8125", "base": "0.5"},
                    {"name": "macroF1", "value": "0.8"},
                ],
                "verdict": "Passed",
            }
        ],
    }
    kubectl.patch("finetune", "shown", {"status": status}, subresource="status")
    assert _row(kubectl, "finetune", "shown") == {
        "NAME": "shown",
        "READY": "False",
        "STAGE": "train",
        "PROGRESS": "42",
        "LOSS": "0.4321",
        "BEST METRIC": "0.8125",
        "METHOD": "QLoRA",
        "PROFILE": "cpu",
        "ATTEMPT": "2",
        "ETA": "95",
    }


def test_every_field_of_a_status_can_be_written(kubectl: Kubectl) -> None:
    artifact = {"version": "0" * 16, "claim": "full-artifacts", "path": "merge/0/model", "digest": "sha256:" + "0" * 64}
    reason = {"reason": "Tested", "message": "x" * 4096}
    finetune = {
        "observedGeneration": 2**53,
        "conditions": [{**_ready("Unknown"), "observedGeneration": 2**53}],
        "resolved": {"revision": "0" * 40, "datasetDigest": "sha256:" + "0" * 64, "templateHash": "0" * 64},
        "stages": [
            {
                "name": "evaluate-merged",
                "hash": "0" * 16,
                "state": "Failed",
                "attempt": 4,
                "job": "full-evaluate-merged-0000000000",
                "node": "node",
                "startTime": "2026-11-22T08:30:15Z",
                "completionTime": "2026-11-22T08:30:16Z",
                **reason,
            }
        ],
        "progress": {
            "stage": "train",
            "percent": 100,
            "etaSeconds": 0,
            "step": 1,
            "totalSteps": 2,
            "loss": "-1.5e-05",
            "tokensPerSecond": "1234.5",
        },
        "artifacts": [
            {
                **artifact,
                "export": "merged",
                "sizeBytes": 2**53,
                "metrics": [{"name": "accuracy", "value": "0.8125", "base": "0"}],
                "verdict": "Failed",
                "reason": "x" * 4096,
            }
        ],
    }
    version = {**artifact, "since": "2026-11-22T08:30:15Z"}
    modelserve = {
        "observedGeneration": 2**53,
        "conditions": [_ready("False")],
        "replicas": 3,
        "readyReplicas": 2,
        "selector": "a=b",
        "url": "http://full.api-tests.svc/v1",
        "served": version,
        "candidate": version,
    }
    assert FineTuneStatus.model_validate(finetune).to_body() == finetune
    assert ModelServeStatus.model_validate(modelserve).to_body() == modelserve
    for original, status, model in (
        (FINETUNE, finetune, FineTuneStatus),
        (MODELSERVE, modelserve, ModelServeStatus),
    ):
        assert set(status) == {field.alias for field in model.model_fields.values()}, "every field is tried"
        kubectl.apply(changed(original, {"metadata.name": "full"}))
        kubectl.patch(original["kind"].lower(), "full", {"status": status}, subresource="status")
        stored = kubectl.get(original["kind"].lower(), "full")
        assert stored is not None and stored["status"] == status


def test_a_new_finetune_has_a_row_too(kubectl: Kubectl) -> None:
    kubectl.apply(changed(FINETUNE, {"metadata.name": "new"}))
    row = _row(kubectl, "ftune", "new")
    assert (row["NAME"], row["METHOD"]) == ("new", "QLoRA")


@pytest.mark.parametrize("model", [{"fineTune": {"name": "shown"}}, {"claim": {"name": "shown"}}])
def test_a_modelserve_is_shown_with_its_address(kubectl: Kubectl, model: dict[str, object]) -> None:
    name = "of-" + next(iter(model)).lower()
    kubectl.apply(changed(MODELSERVE, {"metadata.name": name, "spec.model": model}))
    url = f"http://{name}.api-tests.svc/v1"
    served = {"version": "0123456789abcdef", "claim": "shown-artifacts", "path": "merge/0123456789abcdef/model"}
    status = {"conditions": [_ready("True")], "replicas": 1, "readyReplicas": 1, "url": url, "served": served}
    kubectl.patch("modelserve", name, {"status": status}, subresource="status")
    row = _row(kubectl, "mserve", name)
    assert row == {
        "NAME": name,
        "READY": "True",
        "MODEL": "shown",
        "VERSION": "0123456789abcdef",
        "REPLICAS": "1",
        "URL": url,
        "PROFILE": "",
    }


def test_both_kinds_are_listed_by_their_category(kubectl: Kubectl) -> None:
    kubectl.apply(changed(FINETUNE, {"metadata.name": "listed"}), changed(MODELSERVE, {"metadata.name": "listed"}))
    names = kubectl.run("get", "tuneserve", "-o", "name").split()
    assert {"finetune.tuneserve.dev/listed", "modelserve.tuneserve.dev/listed"} <= set(names)


def test_a_modelserve_is_scaled(kubectl: Kubectl) -> None:
    kubectl.apply(changed(MODELSERVE, {"metadata.name": "scaled"}))
    kubectl.patch("modelserve", "scaled", {"status": {"replicas": 1, "selector": "a=b"}}, subresource="status")
    kubectl.run("scale", "modelserve/scaled", "--replicas=3")
    scale = json.loads(kubectl.run("get", "modelserve", "scaled", "--subresource=scale", "-o", "json"))
    assert (scale["spec"]["replicas"], scale["status"]["replicas"], scale["status"]["selector"]) == (3, 1, "a=b")
    with pytest.raises(KubectlError, match="less than or equal to 1000"):
        kubectl.run("scale", "modelserve/scaled", "--replicas=1001")


def _ready(status: str) -> dict[str, str]:
    time = "2026-11-22T08:30:15Z"
    return {"type": "Ready", "status": status, "reason": "Tested", "message": "Said.", "lastTransitionTime": time}


def _row(kubectl: Kubectl, kind: str, name: str) -> dict[str, str]:
    """The cells of `kubectl get -o wide`, by column, without the age."""
    header, line = kubectl.run("get", kind, name, "-o", "wide").splitlines()
    starts = [0] + [i for i in range(2, len(header)) if header[i] != " " and header[i - 2 : i] == "  "]
    ends = [*starts[1:], None]
    cells = {header[a:b].strip(): line[a:b].strip() for a, b in zip(starts, ends, strict=True)}
    del cells["AGE"]
    return cells
