"""`evaluate` on the tiny model: real generation, checked against generating one prompt at a time."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from support.stages import Finished, Workspace
from support.tiny import LABELS, reviews, write_jsonl
from tuneserve_pipeline import output
from tuneserve_pipeline.contract import (
    ADAPTER_DIRECTORY,
    MODEL_DIRECTORY,
    ClaimFile,
    ClassificationTask,
    EvaluateSpec,
    EvaluationTarget,
    ExitCode,
    InstructionTask,
    LocalModel,
    MergeSpec,
    Outcome,
    PrepareSpec,
    Runtime,
    StageConfig,
    TextTask,
    TrainSpec,
    output_digest,
)
from tuneserve_pipeline.generation import common_prefix


def finish(workspace: Workspace, config: StageConfig, directory: Path) -> Finished:
    """Make `directory` the finished output of a stage, as the runner would."""
    files = output.digest_files(directory)
    outcome = Outcome(stage=config.name, hash=config.hash, digest=output_digest(files))
    output.write_manifest(directory, config=config, outcome=outcome, files=files)
    Path(config.output).parent.mkdir(parents=True, exist_ok=True)
    output.publish(directory, Path(config.output))
    return Finished(code=0, outcome=outcome, directory=Path(config.output), log="")


@pytest.fixture(scope="session")
def tuned(
    prepared: tuple[Workspace, Finished], tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Finished]:
    """Outputs of `train` and `merge` with an adapter of random weights, large enough to change every answer."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    workspace, prepare = prepared
    torch.manual_seed(3)
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    model = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    root = tmp_path_factory.mktemp("tuned")
    model.save_pretrained(root / "train" / ADAPTER_DIRECTORY)
    tokenizer.save_pretrained(root / "train" / ADAPTER_DIRECTORY)
    merged = model.merge_and_unload().to(torch.bfloat16)
    merged.save_pretrained(root / "merge" / MODEL_DIRECTORY)
    tokenizer.save_pretrained(root / "merge" / MODEL_DIRECTORY)
    parents = {"prepare": prepare}
    train = finish(workspace, workspace.config(TrainSpec(), name="train", parents=parents), root / "train")
    parents["train"] = train
    return {
        "prepare": prepare,
        "train": train,
        "merge": finish(workspace, workspace.config(MergeSpec(), name="merge", parents=parents), root / "merge"),
    }


PARENTS = {
    EvaluationTarget.BASE: ("prepare",),
    EvaluationTarget.ADAPTER: ("prepare", "train"),
    EvaluationTarget.MERGED: ("prepare", "merge"),
}


def load(target: EvaluationTarget, tiny_model: Path, tuned: dict[str, Finished]) -> Any:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    merged = tuned["merge"].directory / MODEL_DIRECTORY
    weights = merged if target is EvaluationTarget.MERGED else tiny_model
    model = AutoModelForCausalLM.from_pretrained(weights, dtype=torch.float32).eval()
    if target is EvaluationTarget.ADAPTER:
        model = PeftModel.from_pretrained(model, str(tuned["train"].directory / ADAPTER_DIRECTORY)).eval()
    return model


@pytest.mark.parametrize("target", EvaluationTarget)
@pytest.mark.parametrize("batch_size", [1, 4])
def test_answers_are_those_of_the_model_alone(
    prepared: tuple[Workspace, Finished],
    tuned: dict[str, Finished],
    tiny_model: Path,
    target: EvaluationTarget,
    batch_size: int,
) -> None:
    """Neither batches, padding nor the cache of the shared start may change what a model says."""
    import torch
    from transformers import AutoTokenizer

    workspace, _ = prepared
    config = workspace.config(
        EvaluateSpec(target=target, max_samples=6),
        name=f"evaluate-{target}-{batch_size}",
        parents={name: tuned[name] for name in PARENTS[target]},
        runtime=Runtime(device="cpu", micro_batch_size=batch_size),
    )
    finished = workspace.run_here(config)
    assert finished.code == 0, finished.log
    rows = finished.rows("predictions.jsonl")
    limit = finished.json("metrics.json")["maxNewTokens"]

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    model = load(target, tiny_model, tuned)
    for row in rows:
        ids = tokenizer.apply_chat_template(row["messages"], add_generation_prompt=True, return_tensors="pt")
        with torch.inference_mode():
            generated = model.generate(**ids, max_new_tokens=limit, do_sample=False)
        alone = tokenizer.decode(generated[0, ids["input_ids"].shape[1] :], skip_special_tokens=True).strip()
        assert row["answer"] == alone
    assert [row["source"] for row in rows] == [row["source"] for row in tuned["prepare"].rows("test.jsonl")[:6]]


def test_an_adapter_changes_the_answers(prepared: tuple[Workspace, Finished], tuned: dict[str, Finished]) -> None:
    """Else the test above would compare the base with itself."""
    workspace, _ = prepared
    answers = {}
    for target in EvaluationTarget:
        parents = {name: tuned[name] for name in PARENTS[target]}
        config = workspace.config(EvaluateSpec(target=target), name=f"evaluate-{target}", parents=parents)
        answers[target] = [row["answer"] for row in workspace.run_here(config).rows("predictions.jsonl")]
    assert answers[EvaluationTarget.ADAPTER] != answers[EvaluationTarget.BASE]
    assert answers[EvaluationTarget.MERGED] != answers[EvaluationTarget.BASE]


def test_scores_follow_from_the_predictions(prepared: tuple[Workspace, Finished]) -> None:
    workspace, prepare = prepared
    config = workspace.config(
        EvaluateSpec(target=EvaluationTarget.BASE), name="evaluate-base-process", parents={"prepare": prepare}
    )
    finished = workspace.run(config)
    assert finished.code == 0, finished.log
    rows = finished.rows("predictions.jsonl")
    metrics = finished.outcome.metrics
    assert metrics["samples"] == len(rows) == int(prepare.outcome.facts["testRows"])
    assert metrics["accuracy"] == sum(row["label"] == row["expected"] for row in rows) / len(rows)
    assert metrics["invalidRatio"] == sum(row["label"] is None for row in rows) / len(rows)
    assert all(row["prompt"].endswith("<|im_start|>assistant\n") for row in rows)
    report: Any = finished.json("metrics.json")
    assert report["metrics"] == metrics
    told = sum(sum(row.values()) for row in report["details"]["confusion"].values())
    assert told + sum(report["details"]["invalid"].values()) == len(rows)
    samples: Any = json.loads((finished.directory / "samples.json").read_text(encoding="utf-8"))
    assert len(samples) == 10 and all(sample in rows for sample in samples)
    again = workspace.run(config)
    assert (again.code, again.outcome) == (0, finished.outcome)


def test_a_limit_of_samples(prepared: tuple[Workspace, Finished]) -> None:
    workspace, prepare = prepared
    spec = EvaluateSpec(target=EvaluationTarget.BASE, max_samples=4)
    finished = workspace.run_here(workspace.config(spec, name="evaluate-few", parents={"prepare": prepare}))
    assert finished.outcome.metrics["samples"] == 4
    assert len(finished.rows("predictions.jsonl")) == 4


def test_instructions_are_scored_by_their_text(workspace: Workspace) -> None:
    rows = [{"instruction": f"Name number {row['text']}", "output": row["text"]} for row in reviews(30)]
    write_jsonl(workspace.datasets / "tasks" / "train.jsonl", rows)
    spec = PrepareSpec(
        base_model=LocalModel(claim="models"),
        train=(ClaimFile(claim="tasks", path="train.jsonl"),),
        task=InstructionTask(),
    )
    prepare = workspace.run_here(workspace.config(spec))
    assert prepare.code == 0, prepare.log
    config = workspace.config(
        EvaluateSpec(target=EvaluationTarget.BASE), name="evaluate-base", parents={"prepare": prepare}
    )
    finished = workspace.run_here(config)
    assert finished.code == 0, finished.log
    assert set(finished.outcome.metrics) == {"exactMatch", "tokenF1", "samples"}
    assert all("label" not in row for row in finished.rows("predictions.jsonl"))


def test_texts_are_scored_by_how_well_their_tokens_are_foreseen(workspace: Workspace, tiny_model: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    rows = [{"text": row["text"] + " Once more." * (200 * (n == 0))} for n, row in enumerate(reviews(30))]
    write_jsonl(workspace.datasets / "texts" / "train.jsonl", rows)
    source = ClaimFile(claim="texts", path="train.jsonl")
    spec = PrepareSpec(base_model=LocalModel(claim="models"), train=(source,), test=(source,), task=TextTask())
    prepare = workspace.run_here(workspace.config(spec))
    assert prepare.code == 0, prepare.log
    evaluation = EvaluateSpec(target=EvaluationTarget.BASE)
    finished = workspace.run_here(workspace.config(evaluation, name="evaluate-base", parents={"prepare": prepare}))
    assert finished.code == 0, finished.log
    assert set(finished.outcome.metrics) == {"tokenAccuracy", "perplexity", "samples"}
    found = {row["source"].rsplit(":", 1)[1]: row for row in finished.rows("predictions.jsonl")}
    assert len(found) == 30
    first, eighth = found["1"], found["8"]
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()
    ids = torch.tensor([[*tokenizer(rows[7]["text"])["input_ids"], tokenizer.eos_token_id]])
    with torch.inference_mode():
        expected = float(model(input_ids=ids, labels=ids).loss)
    assert eighth["loss"] / eighth["tokens"] == pytest.approx(expected, rel=1e-4)
    assert eighth["tokens"] == ids.shape[1] - 1
    # The model looks at 512 tokens: a longer text is foreseen piece by piece, but for the first token of each.
    long = len(tokenizer(rows[0]["text"])["input_ids"]) + 1
    assert long > 512 and first["tokens"] == long - -(-long // 512)


def test_the_default_template_is_what_the_base_is_asked_with(workspace: Workspace, tiny_model: Path) -> None:
    directory = workspace.root / "models"
    shutil.copytree(tiny_model, directory)
    (directory / "chat_template.jinja").unlink()
    workspace = Workspace(root=workspace.root, base_model=directory)
    write_jsonl(workspace.datasets / "reviews" / "train.jsonl", reviews(30))
    spec = PrepareSpec(
        base_model=LocalModel(claim="models"),
        train=(ClaimFile(claim="reviews", path="train.jsonl"),),
        task=ClassificationTask(labels=LABELS),
    )
    prepare = workspace.run_here(workspace.config(spec))
    config = workspace.config(
        EvaluateSpec(target=EvaluationTarget.BASE), name="evaluate-base", parents={"prepare": prepare}
    )
    finished = workspace.run_here(config)
    assert finished.code == 0, finished.log
    assert all(row["prompt"].endswith("### Response:\n") for row in finished.rows("predictions.jsonl"))


def test_a_missing_gpu_is_said(prepared: tuple[Workspace, Finished], monkeypatch: pytest.MonkeyPatch) -> None:
    workspace, prepare = prepared
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    config = workspace.config(
        EvaluateSpec(target=EvaluationTarget.BASE),
        name="evaluate-gpu",
        parents={"prepare": prepare},
        runtime=Runtime(device="cuda"),
    )
    finished = workspace.run_here(config)
    assert (finished.code, finished.reason) == (1, "GpuMissing")


def test_an_input_that_the_config_does_not_name(prepared: tuple[Workspace, Finished]) -> None:
    workspace, prepare = prepared
    config = workspace.config(
        EvaluateSpec(target=EvaluationTarget.MERGED), name="evaluate-merged", parents={"prepare": prepare}
    )
    finished = workspace.run_here(config)
    assert (finished.code, finished.reason) == (ExitCode.INVALID_CONFIG, "InputMissing")
    assert "inputs.merge" in finished.message


@pytest.mark.parametrize(
    ("prompts", "shared"), [([[1, 2, 3], [1, 2, 4, 5]], 2), ([[1, 2]], 2), ([[1, 2], [1, 2, 3]], 2), ([[1], [2]], 0)]
)
def test_what_prompts_share(prompts: list[list[int]], shared: int) -> None:
    assert common_prefix(prompts) == shared
