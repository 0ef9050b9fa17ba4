"""The graph follows from the exports, and each stage is told only what reaches it."""

import pytest

from support.specs import finetune
from tuneserve.api import ExportFormat, FineTune
from tuneserve.finetune.graph import STAGES, Stage, export_path, graph, has_form
from tuneserve.finetune.plan import rebuild_salt
from tuneserve.finetune.specs import stage_spec
from tuneserve_pipeline.contract import Method, TrainSpec, input_hash

ADAPTER, MERGED = ExportFormat.ADAPTER, ExportFormat.MERGED
BY_NAME = {stage.name: stage for stage in STAGES}


@pytest.mark.parametrize(
    ("formats", "names"),
    [
        ([MERGED], ["prepare", "train", "merge", "evaluate-base", "evaluate-merged"]),
        ([ADAPTER], ["prepare", "train", "evaluate-base", "evaluate-adapter"]),
        (
            [ADAPTER, MERGED],
            ["prepare", "train", "merge", "evaluate-base", "evaluate-adapter", "evaluate-merged"],
        ),
    ],
)
def test_exports_decide_what_runs(formats: list[ExportFormat], names: list[str]) -> None:
    assert [stage.name for stage in graph(formats)] == names


def test_a_full_training_is_merged_already() -> None:
    found = {stage.name: stage for stage in graph([MERGED], method=Method.FULL)}
    assert list(found) == ["prepare", "train", "evaluate-base", "evaluate-merged"]
    assert found["evaluate-merged"].parents == ("prepare", "train")
    path = export_path(MERGED, method=Method.FULL)
    assert (path.producer, path.directory, path.evaluation) == ("train", "model", "evaluate-merged")


@pytest.mark.parametrize(
    ("path", "format", "same"),
    [
        ("merge/0123/model", MERGED, True),
        ("train/0123/model", MERGED, True),
        ("train/0123/adapter", MERGED, False),
        ("train/0123/adapter", ADAPTER, True),
        ("merge/0123/model", ADAPTER, False),
    ],
)
def test_the_form_of_an_artifact_does_not_depend_on_the_method(path: str, format: ExportFormat, same: bool) -> None:
    assert has_form(path, format=format) is same


@pytest.mark.parametrize("method", Method)
def test_every_stage_comes_after_its_parents(method: Method) -> None:
    stages = graph(ExportFormat, method=method)
    for index, stage in enumerate(stages):
        assert set(stage.parents) <= {earlier.name for earlier in stages[:index]}


def test_only_training_and_evaluation_take_the_device() -> None:
    assert {stage.name for stage in STAGES if stage.uses_device} == {
        "train",
        "evaluate-base",
        "evaluate-adapter",
        "evaluate-merged",
    }


def hash_of(stage: Stage, **fields: object) -> str:
    parsed = FineTune.model_validate(finetune(**fields)).spec
    digests = {("rows", "train.jsonl"): "d" * 64}
    return input_hash(spec=stage_spec(stage, parsed, digests=digests), parents=dict.fromkeys(stage.parents, "sha256:1"))


def train_sources(*sources: object, **dataset: object) -> dict[str, object]:
    return {"dataset": {"train": list(sources), **dataset}}


CLAIM_SOURCE = {"claim": {"name": "data", "path": "train.jsonl"}}


@pytest.mark.parametrize(
    ("edit", "changed"),
    [
        ({"training": {"learningRate": "1e-3"}}, {"train"}),
        ({"training": {"learningRate": "0.0002"}}, set()),  # the default in other words
        ({"training": {"checkpoints": {"steps": 7, "keep": 5}}}, set()),  # how it is interrupted, not what it learns
        ({"training": {"neftuneAlpha": "5"}}, {"train"}),
        ({"training": {"globalBatchSize": 16}}, set()),  # the default
        ({"training": {"globalBatchTokens": 8192}}, {"train"}),
        ({"training": {"evaluationSteps": 10}}, {"train"}),
        ({"training": {"scheduler": "WarmupStableDecay"}}, {"train"}),
        ({"training": {"maxSequenceLength": 512}}, {"prepare", "train"}),
        ({"lora": {"rank": 8, "dropout": "0.1"}}, {"train"}),
        ({"lora": {"rankStabilized": True}}, {"train"}),
        ({"method": "LoRA"}, {"train"}),
        ({"prompt": {"virtualTokens": 9}}, set()),  # of another method
        ({"evaluation": {"maxSamples": 5}}, {"evaluate-base", "evaluate-adapter", "evaluate-merged"}),
        ({"task": {"instruction": {}}}, {"prepare"}),
        ({"baseModel": {"huggingFace": {"repo": "org/model"}}}, {"prepare"}),
        ({"baseModel": {"claim": {"name": "base", "path": "model"}, "tokenSecret": {"name": "hub"}}}, set()),
        (train_sources(CLAIM_SOURCE, revision="2"), {"prepare"}),
        (train_sources(CLAIM_SOURCE, CLAIM_SOURCE), {"prepare"}),
        (train_sources({"configMap": {"name": "rows", "key": "train.jsonl"}}), {"prepare"}),
        (train_sources({"huggingFace": {"repo": "org/rows", "split": "all"}}), {"prepare"}),
        (train_sources(CLAIM_SOURCE, split={"seed": 7}), {"prepare"}),
        (train_sources(CLAIM_SOURCE, columns={"text": "tweet"}), {"prepare"}),
        (train_sources({**CLAIM_SOURCE, "weight": "1.0"}), set()),  # the default in other words
        (train_sources({**CLAIM_SOURCE, "weight": "2"}), {"prepare"}),
        (train_sources({**CLAIM_SOURCE, "limit": 5}), {"prepare"}),
        (train_sources({"http": {"url": "https://data.example/rows.jsonl", "sha256": "0" * 64}}), {"prepare"}),
        ({"task": {"conversation": {}}}, {"prepare"}),
        (
            {
                "task": {
                    "classification": {
                        "labels": ["good", "bad"],
                        "labelValues": [{"name": "good", "values": ["1"]}],
                    }
                }
            },
            {"prepare"},
        ),
        ({"template": {"source": "Model"}}, set()),
        ({"template": {"source": "Inline", "inline": "{{ messages }}"}}, {"prepare"}),
        ({"template": {"systemPrompt": "Be brief."}}, {"prepare"}),
        ({"accelerator": {"profile": "rtx-4090"}}, set()),
        ({"retries": 9, "deadlineSeconds": 60, "suspend": True, "ttlSecondsAfterFinished": 1}, set()),
        ({"gates": [{"metric": "accuracy", "atLeast": "0.9"}]}, set()),
        ({"output": {"deletionPolicy": "Delete"}}, set()),
        ({"exports": [{"name": "a", "format": "Adapter"}]}, set()),
    ],
)
def test_an_edit_changes_the_hash_of_the_stages_that_it_reaches(edit: dict[str, object], changed: set[str]) -> None:
    before = {name: hash_of(stage) for name, stage in BY_NAME.items()}
    after = {name: hash_of(stage, **edit) for name, stage in BY_NAME.items()}
    assert {name for name in BY_NAME if before[name] != after[name]} == changed


def test_each_task_is_another_input() -> None:
    tasks = ("instruction", "completion", "conversation", "text", "preference")
    assert len({hash_of(BY_NAME["prepare"], task={task: {}}) for task in tasks}) == len(tasks)


@pytest.mark.parametrize(
    ("method", "edit", "changed"),
    [
        ("Full", {"lora": {"rank": 8}}, False),
        ("Full", {"training": {"learningRate": "2e-5"}}, False),  # the default of the method
        ("Full", {"training": {"learningRate": "2e-4"}}, True),
        ("LoRA", {"lora": {"baseBits": 16}}, False),
        ("LoRA", {"lora": {"baseBits": 8}}, True),
        ("PromptTuning", {"prompt": {"virtualTokens": 9}}, True),
        ("PromptTuning", {"lora": {"rank": 8}}, False),
        ("QLoRA", {"dpo": {"beta": "0.5"}}, False),
        ("QLoRA", {"objective": "DPO", "task": {"preference": {}}}, True),
        ("QLoRA", {"training": {"packing": "Never"}}, True),
    ],
)
def test_only_what_a_method_looks_at_is_an_input(method: str, edit: dict[str, object], changed: bool) -> None:
    train = BY_NAME["train"]
    assert (hash_of(train, method=method) != hash_of(train, method=method, **edit)) is changed


@pytest.mark.parametrize(
    ("fields", "rate"),
    [
        ({}, 2e-4),
        ({"method": "Full"}, 2e-5),
        ({"objective": "DPO"}, 1e-5),
        ({"objective": "DPO", "training": {"learningRate": "3e-4"}}, 3e-4),
    ],
)
def test_the_learning_rate_left_out_is_that_of_method_and_objective(fields: dict[str, object], rate: float) -> None:
    spec = FineTune.model_validate(finetune(task={"preference": {}}, **fields)).spec
    told = stage_spec(BY_NAME["train"], spec, digests={})
    assert isinstance(told, TrainSpec)
    assert told.learning_rate == pytest.approx(rate)


@pytest.mark.parametrize(
    ("annotation", "salt"),
    [
        ("", ""),
        ("train", "train"),
        ("train.2", "train.2"),
        ("prepare.1, train.3", "train.3"),
        ("trainer", ""),
        ("evaluate-base", ""),
    ],
)
def test_the_rebuild_annotation_salts_the_stage_that_it_names(annotation: str, salt: str) -> None:
    assert rebuild_salt(annotation, stage="train") == salt
