"""What the control plane and the stages agree on: identity, size of a message, forms that a file may have."""

import json
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from support.stages import ROOT
from tuneserve_pipeline import contract
from tuneserve_pipeline.contract import (
    OUTCOME_LIMIT,
    ClaimFile,
    ClassificationTask,
    ConfigMapFile,
    HubModel,
    InstructionTask,
    LocalModel,
    MergeSpec,
    Outcome,
    OutputFile,
    PrepareSpec,
    Runtime,
    StageConfig,
    StageError,
    StageInput,
    TrainSpec,
    input_hash,
    output_digest,
)

PREPARE = PrepareSpec(
    base_model=LocalModel(claim="models"),
    train=(ClaimFile(claim="reviews", path="train.jsonl"),),
    task=ClassificationTask(labels=("good", "bad")),
)


def test_a_hash_stays_what_it_is() -> None:
    """A hash that moved would train every model of every user again: change these only knowing that."""
    assert input_hash(spec=PREPARE, parents={}) == "b58d2f5da1181937"
    assert input_hash(spec=TrainSpec(learning_rate=1e-3), parents={"prepare": "sha256:1"}) == "82aac87229cfab95"


def test_a_field_at_its_default_changes_no_hash() -> None:
    explicit = TrainSpec.model_validate(TrainSpec().model_dump())
    assert input_hash(spec=explicit, parents={}) == input_hash(spec=TrainSpec(), parents={})


@pytest.mark.parametrize(
    "change",
    [
        {"base_model": HubModel(repo="a/b", revision="main")},
        {"base_model": LocalModel(claim="models", path="other")},
        {"train": (ClaimFile(claim="reviews", path="other.jsonl"),)},
        {"train": (ConfigMapFile(name="reviews", key="train.jsonl", digest="1"),)},
        {"task": InstructionTask()},
        {"task": ClassificationTask(labels=("bad", "good"))},
        {"columns": {"text": "body"}},
        {"max_sequence_length": 512},
        {"revision": "2"},
    ],
)
def test_each_input_changes_the_hash(change: dict[str, Any]) -> None:
    assert input_hash(spec=PREPARE.model_copy(update=change), parents={}) != input_hash(spec=PREPARE, parents={})


def test_parents_and_a_wish_for_a_new_run_change_the_hash() -> None:
    hashes = {
        input_hash(spec=MergeSpec(), parents=parents, rebuild=rebuild)
        for parents in ({}, {"train": "a"}, {"train": "b"}, {"prepare": "a"})
        for rebuild in ("", "merge", "merge.2")
    }
    assert len(hashes) == 12


def test_where_a_stage_runs_is_no_input() -> None:
    config = StageConfig(name="prepare", hash="0" * 16, spec=PREPARE)
    elsewhere = config.model_copy(update={"runtime": Runtime(device="cpu", micro_batch_size=1)})
    assert input_hash(spec=config.spec, parents={}) == input_hash(spec=elsewhere.spec, parents={})


@given(st.permutations([OutputFile(path=name, size=1, sha256=name * 2) for name in "abcd"]))
def test_a_digest_does_not_depend_on_order(files: list[OutputFile]) -> None:
    assert output_digest(tuple(files)) == output_digest(tuple(sorted(files, key=lambda file: file.path)))


def test_a_digest_depends_on_names_and_contents() -> None:
    one, other = OutputFile(path="a", size=1, sha256="1"), OutputFile(path="b", size=1, sha256="2")
    swapped = (one.model_copy(update={"sha256": "2"}), other.model_copy(update={"sha256": "1"}))
    assert output_digest((one, other)) != output_digest(swapped)
    assert output_digest((one, other)) != output_digest((one,))


@given(st.text(max_size=6000))
def test_an_error_of_any_text_fits_a_termination_message(text: str) -> None:
    outcome = Outcome(stage="prepare", hash="0" * 16, error=StageError(reason="InvalidRows", message=text))
    message = outcome.to_message()
    assert len(message.encode()) <= OUTCOME_LIMIT
    told = Outcome.model_validate_json(message)
    assert told.error is not None and told.error.reason == "InvalidRows"
    assert told.error.message == text or text.startswith(told.error.message.removesuffix(" …"))


def test_an_outcome_that_cannot_be_shortened_is_a_defect() -> None:
    with pytest.raises(ValueError, match="too many"):
        Outcome(stage="train", hash="0", facts={"much": "x" * 5000}).to_message()


def test_a_config_survives_its_file() -> None:
    config = StageConfig(
        name="evaluate-base",
        hash="0" * 16,
        spec=PREPARE,
        inputs={"prepare": StageInput(path="/artifacts/prepare/1", digest="sha256:1")},
        runtime=Runtime(device="cpu", hub_endpoint="http://hub"),
    )
    assert StageConfig.model_validate_json(config.model_dump_json()) == config
    assert config.output == "/artifacts/evaluate-base/" + "0" * 16


@pytest.mark.parametrize(
    "spec",
    [
        {"kind": "unknown"},
        {"kind": "merge", "extra": 1},
        {"kind": "evaluate", "target": "Merged"},
        {"kind": "train", "method": "Everything"},
        {"kind": "prepare", "base_model": {"kind": "local"}, "train": [], "task": {"kind": "instruction"}},
    ],
)
def test_what_nobody_knows_is_an_error(spec: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        StageConfig.model_validate({"name": "x", "hash": "0", "spec": spec})


def test_the_contract_loads_neither_a_learning_library_nor_a_cluster_client() -> None:
    program = "import json, sys, tuneserve_pipeline.contract; print(json.dumps(sorted(sys.modules)))"
    found = subprocess.run(
        [sys.executable, "-c", program],
        env={"PYTHONPATH": str(ROOT / "pipeline")},
        capture_output=True,
        text=True,
        check=True,
    )
    loaded = {name.partition(".")[0] for name in json.loads(found.stdout)}
    assert not loaded & {"torch", "transformers", "numpy", "kubernetes", "kopf", "prometheus_client"}


def test_metric_names_follow_the_convention() -> None:
    assert all(metric.value.startswith("tuneserve_stage_") for metric in contract.StageMetric)
