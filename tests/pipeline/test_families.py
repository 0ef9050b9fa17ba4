"""Every family that is supported: prepared, trained, merged and generated from, by the real stages."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from support.families import FAMILIES, tiny_config
from support.stages import Finished, Workspace
from support.tiny import reviews, write_jsonl, write_tiny_model
from tuneserve_pipeline.contract import EvaluateSpec, EvaluationTarget, MergeSpec, Method, PrepareSpec, TrainSpec

TRAIN = TrainSpec(max_steps=3, learning_rate=2e-2, warmup_ratio=0.0, global_batch_size=8)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(os.environ, "OMP_NUM_THREADS", "1")
        yield
    torch.set_num_threads(before)


def prepare(family: str, *, root: Path, spec: PrepareSpec) -> tuple[Workspace, Finished]:
    model = write_tiny_model(root / "model", config=tiny_config(family))
    workspace = Workspace(root=root, base_model=model)
    write_jsonl(workspace.datasets / "reviews" / "train.jsonl", reviews(48))
    prepared = workspace.run_here(workspace.config(spec))
    assert prepared.code == 0, prepared.log
    return workspace, prepared


@pytest.mark.parametrize("family", FAMILIES)
def test_trained_merged_and_generated_from(family: str, classification: PrepareSpec, tmp_path: Path) -> None:
    workspace, prepared = prepare(family, root=tmp_path, spec=classification)
    parents = {"prepare": prepared}
    trained = workspace.run_here(workspace.config(TRAIN, parents=parents))
    assert trained.code == 0, trained.log
    losses = [row["loss"] for row in trained.rows("trainer_log.jsonl") if "loss" in row]
    assert trained.outcome.metrics["evalLoss"] < 0.95 * losses[0]
    adapter = load_file(trained.directory / "adapter/adapter_model.safetensors")
    assert all(value.abs().sum() > 0 for name, value in adapter.items() if "lora_B" in name)

    merged = workspace.run_here(workspace.config(MergeSpec(), parents={**parents, "train": trained}))
    assert merged.code == 0, merged.log
    assert merged.outcome.metrics["mergeTop1Agreement"] >= 0.95
    assert merged.outcome.metrics["mergeMaxLogitDifference"] < 0.1
    before = load_file(workspace.base_model / "model.safetensors")
    after = load_file(merged.directory / "model/model.safetensors")
    assert before.keys() == after.keys()
    # Each layer that was trained is changed, and no other one.
    tuned = {name.split("base_model.model.")[1].split(".lora_")[0] for name in adapter}
    changed = {name.removesuffix(".weight") for name in before if not torch.equal(before[name], after[name])}
    assert changed == tuned

    spec = EvaluateSpec(target=EvaluationTarget.MERGED, max_samples=2)
    config = workspace.config(spec, name="evaluate-merged", parents={**parents, "merge": merged})
    answered = workspace.run_here(config)
    assert answered.code == 0, answered.log
    assert len(answered.rows("predictions.jsonl")) == 2


@pytest.mark.parametrize("family", ["falcon-7b", "gpt-neox", "gpt-j", "glm-4", "qwen2"])
def test_ia3_finds_its_layers(family: str, classification: PrepareSpec, tmp_path: Path) -> None:
    workspace, prepared = prepare(family, root=tmp_path, spec=classification)
    spec = TRAIN.model_copy(update={"method": Method.IA3, "learning_rate": 0.1})
    trained = workspace.run_here(workspace.config(spec, parents={"prepare": prepared}))
    assert trained.code == 0, trained.log
    merged = workspace.run_here(workspace.config(MergeSpec(), parents={"prepare": prepared, "train": trained}))
    assert merged.code == 0, merged.log
    assert merged.outcome.metrics["mergeTop1Agreement"] >= 0.95
