"""What the API server takes, what it refuses, and what it fills in."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from api.manifests import FINETUNE, INSTRUCTION, MODELSERVE, changed
from api.server import RefusedError, Server
from api.wrong import Wrong, WrongEdit
from api.wrong_finetunes import EDITS, FINETUNES
from api.wrong_modelserves import MODELSERVES
from support.kubectl import Kubectl, KubectlError
from tuneserve.api import FineTune, ModelServe
from tuneserve.api.schema import manifests

ROOT = Path(__file__).resolve().parents[2]
WRONG = (*FINETUNES, *MODELSERVES)
EXAMPLES = sorted((ROOT / "examples").rglob("*.yaml"))

controlplane = pytest.mark.controlplane


@controlplane
@pytest.mark.parametrize("plural", ["finetunes", "modelserves"])
def test_the_kinds_are_established_without_complaint(kubectl: Kubectl, plural: str) -> None:
    crd = kubectl.get("customresourcedefinition", f"{plural}.tuneserve.dev")
    assert crd is not None
    conditions = {item["type"]: item["status"] for item in crd["status"]["conditions"]}
    assert conditions == {"NamesAccepted": "True", "Established": "True"}


@controlplane
@pytest.mark.parametrize("wrong", WRONG, ids=lambda wrong: f"{wrong.original['kind']}: {wrong.name}")
def test_a_wrong_manifest_is_refused_with_a_sentence(server: Server, wrong: Wrong) -> None:
    with pytest.raises(RefusedError) as refusal:
        server.try_create(wrong.manifest)
    answer = str(refusal.value)
    assert wrong.sentence in answer
    assert wrong.place in answer
    assert "rule evaluation error" not in answer, "a rule must not fail on what another rule reports"


@controlplane
@pytest.mark.parametrize("edit", EDITS, ids=lambda edit: edit.name)
def test_a_wrong_edit_is_refused_with_a_sentence(kubectl: Kubectl, edit: WrongEdit) -> None:
    name = {"metadata.name": re.sub("[^a-z]", "-", edit.name)}
    kubectl.apply(changed(FINETUNE, {**name, **edit.before}))
    with pytest.raises(KubectlError) as refusal:
        kubectl.apply(changed(FINETUNE, {**name, **edit.after}))
    assert edit.sentence in str(refusal.value)
    assert edit.place in str(refusal.value)


@controlplane
def test_a_claim_may_grow(kubectl: Kubectl) -> None:
    for size in ("20Gi", "20480Mi", "1Ti"):
        kubectl.apply(changed(FINETUNE, {"metadata.name": "growing", "spec.output": {"claim": {"size": size}}}))


def test_every_rule_of_the_schemas_refuses_something() -> None:
    """A rule that no manifest meets could be wrong without anyone noticing."""
    rules = {rule["message"] for text in manifests().values() for rule in _rules(yaml.safe_load(text))}
    sentences = [*(wrong.sentence for wrong in WRONG), *(edit.sentence for edit in EDITS)]
    assert [rule for rule in sorted(rules) if not any(sentence in rule for sentence in sentences)] == []


@controlplane
@pytest.mark.parametrize(
    ("model", "manifest"),
    [
        (FineTune, FINETUNE),
        (FineTune, changed(FINETUNE, INSTRUCTION)),
        (FineTune, changed(FINETUNE, {"spec.method": "Full"})),
        (FineTune, changed(FINETUNE, {"spec.method": "LoRA", "spec.lora": {"baseBits": 8, "rankStabilized": True}})),
        (
            FineTune,
            changed(FINETUNE, {"spec.method": "PrefixTuning", "spec.exports": [{"name": "a", "format": "Adapter"}]}),
        ),
        (FineTune, changed(FINETUNE, {"spec.baseModel": {"huggingFace": {"repo": "org/model"}}})),
        (ModelServe, MODELSERVE),
    ],
)
def test_defaults_are_visible_and_the_same_as_in_python(
    server: Server, model: type[FineTune | ModelServe], manifest: dict[str, Any]
) -> None:
    stored = server.try_create(manifest)["spec"]
    parsed = model.model_validate(manifest).spec.to_body()
    assert _without_empty(stored) == _without_empty(parsed)


@controlplane
def test_the_defaults_that_a_user_sees(server: Server) -> None:
    spec = server.try_create(FINETUNE)["spec"]
    assert spec["method"] == "QLoRA"
    lora = {"rank": 16, "alpha": 32, "dropout": "0", "rankStabilized": False, "weightDecomposed": False}
    assert spec["lora"] == lora
    assert "learningRate" not in spec["training"]  # it depends on the method
    assert spec["training"]["checkpoints"] == {"steps": 50, "keep": 2}
    assert "epochs" not in spec["training"]
    assert spec["dataset"]["split"] == {"validation": "0.1", "test": "0.1", "seed": 42}
    assert spec["exports"] == [{"name": "merged", "format": "Merged"}]
    assert spec["output"] == {"claim": {}, "deletionPolicy": "Retain"}
    assert (spec["suspend"], spec["retries"], spec["ttlSecondsAfterFinished"]) == (False, 3, 86400)
    serve = server.try_create(MODELSERVE)["spec"]
    assert serve["model"]["fineTune"]["export"] == "merged"
    assert serve["engine"] == {"dtype": "Auto", "gpuMemoryUtilization": "0.90"}
    assert (serve["replicas"], serve["accelerator"]) == (1, {"count": 1})


@controlplane
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: str(path.relative_to(ROOT / "examples")))
def test_every_example_is_taken(kubectl: Kubectl, path: Path) -> None:
    kubectl.run("create", "--dry-run=server", "-f", str(path))


def test_there_are_examples_of_both_kinds() -> None:
    kinds = {document["kind"] for path in EXAMPLES for document in yaml.safe_load_all(path.read_text()) if document}
    assert {"FineTune", "ModelServe"} <= kinds


def _rules(schema: Any) -> list[dict[str, str]]:
    if isinstance(schema, list):
        return [rule for item in schema for rule in _rules(item)]
    if not isinstance(schema, dict):
        return []
    own = schema.get("x-kubernetes-validations", [])
    return [*own, *(rule for value in schema.values() for rule in _rules(value))]


def _without_empty(value: Any) -> Any:
    """`value` without what the API server leaves out: empty lists, maps of nothing, empty text."""
    if isinstance(value, dict):
        kept = {name: _without_empty(item) for name, item in value.items()}
        return {name: item for name, item in kept.items() if item not in ("", [], {})}
    if isinstance(value, list):
        return [_without_empty(item) for item in value]
    return value
