"""Each method as users get it: it learns, goes on exactly where it was interrupted, and what it puts out works."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from support.stages import Finished, Workspace
from tuneserve_pipeline.contract import (
    Checkpoints,
    EvaluateSpec,
    EvaluationTarget,
    LoraSpec,
    MergeSpec,
    Method,
    PromptSpec,
    Runtime,
    StageConfig,
    TrainSpec,
)
from tuneserve_pipeline.fidelity import answer_logits, compare
from tuneserve_pipeline.generation import Limits, generate, virtual_tokens
from tuneserve_pipeline.rows import IGNORED, Row

BASE = TrainSpec(max_steps=8, learning_rate=5e-3, warmup_ratio=0.0, global_batch_size=8)
LORA = BASE.model_copy(update={"method": Method.LORA})
SPECS = {
    "qlora": BASE,
    "lora": LORA,
    "rslora": LORA.model_copy(update={"lora": LoraSpec(rank=8, alpha=8, rank_stabilized=True, dropout=0.05)}),
    "lora-8bit": LORA.model_copy(update={"lora": LoraSpec(base_bits=8)}),
    "dora": LORA.model_copy(update={"lora": LoraSpec(weight_decomposed=True)}),
    "qdora": BASE.model_copy(update={"lora": LoraSpec(weight_decomposed=True)}),
    "ia3": BASE.model_copy(update={"method": Method.IA3, "learning_rate": 0.1}),
    "full": BASE.model_copy(update={"method": Method.FULL, "learning_rate": 1e-3}),
    "prompt": BASE.model_copy(
        update={"method": Method.PROMPT_TUNING, "learning_rate": 0.1, "prompt": PromptSpec(virtual_tokens=7)}
    ),
    "prefix": BASE.model_copy(
        update={"method": Method.PREFIX_TUNING, "learning_rate": 0.1, "prompt": PromptSpec(virtual_tokens=7)}
    ),
}
PROMPTS = ("prompt", "prefix")
MERGED = ("rslora", "lora-8bit", "dora", "qdora", "ia3")
RUNTIME = Runtime(device="cpu", checkpoints=Checkpoints(steps=2, keep=2))


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(os.environ, "OMP_NUM_THREADS", "1")
        yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def runs(prepared: tuple[Workspace, Finished], tmp_path_factory: pytest.TempPathFactory) -> "Runs":
    return Runs(prepared=prepared, root=tmp_path_factory.mktemp("methods"))


class Runs:
    """The undisturbed training by each method, made when it is first asked for."""

    def __init__(self, *, prepared: tuple[Workspace, Finished], root: Path) -> None:
        self.prepared = prepared
        self._root = root
        self._done: dict[str, Finished] = {}

    def workspace(self, name: str) -> Workspace:
        mine = Workspace(root=self._root / name, base_model=self.prepared[0].base_model)
        mine.root.mkdir(exist_ok=True)
        return mine

    def config(self, name: str, *, at: str) -> StageConfig:
        return self.workspace(at).config(SPECS[name], parents={"prepare": self.prepared[1]}, runtime=RUNTIME)

    def trained(self, name: str) -> Finished:
        if name not in self._done:
            finished = self.workspace(name).run_here(self.config(name, at=name))
            assert finished.code == 0, finished.log
            self._done[name] = finished
        return self._done[name]


def losses(finished: Finished) -> list[float]:
    return [float(row["loss"]) for row in finished.rows("trainer_log.jsonl") if "loss" in row]


@pytest.mark.parametrize("name", SPECS)
def test_it_learns(runs: Runs, name: str) -> None:
    curve = losses(runs.trained(name))
    assert len(curve) == 8
    assert curve[-1] < 0.95 * curve[0], curve
    assert runs.trained(name).outcome.metrics["evalLoss"] < curve[0]


@pytest.mark.parametrize("name", SPECS)
def test_an_interrupted_run_goes_on_exactly(runs: Runs, name: str) -> None:
    config = runs.config(name, at=f"{name}-again")
    mine = runs.workspace(f"{name}-again")
    partial = Path(config.output + ".partial")

    def interrupt() -> None:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and not list(partial.glob("checkpoints/step-*")):
            time.sleep(0.002)
        os.kill(os.getpid(), signal.SIGTERM)

    # Should the run be over by then, the signal must not end the tests.
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    thread = threading.Thread(target=interrupt)
    thread.start()
    try:
        stopped = mine.run_here(config)
    finally:
        thread.join()
        signal.signal(signal.SIGTERM, before)
    assert (stopped.code, stopped.reason) == (75, "Interrupted")
    resumed = mine.run_here(config)
    assert resumed.code == 0, resumed.log
    assert 2 <= int(resumed.outcome.facts["resumedFromStep"]) < 8
    assert losses(resumed) == pytest.approx(losses(runs.trained(name)), abs=1e-3)
    assert resumed.outcome.digest == runs.trained(name).outcome.digest


@pytest.mark.parametrize("name", MERGED)
def test_what_changes_weights_is_merged(runs: Runs, name: str) -> None:
    trained = runs.trained(name)
    config = runs.workspace(name).config(MergeSpec(), parents={"prepare": runs.prepared[1], "train": trained})
    merged = runs.workspace(name).run_here(config)
    assert merged.code == 0, merged.log
    assert merged.outcome.metrics["mergeTop1Agreement"] >= 0.97
    before = load_file(runs.prepared[0].base_model / "model.safetensors")
    after = load_file(merged.directory / "model/model.safetensors")
    changed = {key for key, value in before.items() if not torch.equal(value, after[key])}
    wanted = ("k_proj", "v_proj", "down_proj") if name == "ia3" else ("_proj",)
    assert changed == {key for key in before if any(part in key for part in wanted)}


@pytest.mark.parametrize("name", PROMPTS)
def test_what_changes_no_weight_is_not_merged(runs: Runs, name: str) -> None:
    mine = runs.workspace(name)
    parents = {"prepare": runs.prepared[1], "train": runs.trained(name)}
    refused = mine.run_here(mine.config(MergeSpec(), parents=parents))
    assert (refused.code, refused.reason) == (64, "NothingToMerge")
    assert "export the format Adapter" in refused.message


@pytest.mark.parametrize("name", ["lora", "ia3", *PROMPTS])
def test_adapter_is_evaluated(runs: Runs, name: str) -> None:
    mine = runs.workspace(name)
    spec = EvaluateSpec(target=EvaluationTarget.ADAPTER, max_samples=4)
    parents = {"prepare": runs.prepared[1], "train": runs.trained(name)}
    done = mine.run_here(mine.config(spec, name="evaluate-adapter", parents=parents, runtime=RUNTIME))
    assert done.code == 0, done.log
    assert len(done.rows("predictions.jsonl")) == 4


def test_full_training_puts_out_the_model_itself(runs: Runs) -> None:
    trained = runs.trained("full")
    before = load_file(runs.prepared[0].base_model / "model.safetensors")
    after = load_file(trained.directory / "model/model.safetensors")
    assert after.keys() == before.keys()
    assert all(value.dtype == torch.bfloat16 for value in after.values())
    assert not any(torch.equal(after[key], value) for key, value in before.items() if "norm" not in key)
    files = {path.name for path in (trained.directory / "model").iterdir()}
    assert {"config.json", "generation_config.json", "chat_template.jinja", "tokenizer.json"} <= files
    assert not (trained.directory / "adapter").exists()
    mine = runs.workspace("full")
    spec = EvaluateSpec(target=EvaluationTarget.MERGED, max_samples=4)
    parents = {"prepare": runs.prepared[1], "train": trained}
    done = mine.run_here(mine.config(spec, name="evaluate-merged", parents=parents, runtime=RUNTIME))
    assert done.code == 0, done.log


@pytest.mark.parametrize("name", PROMPTS)
def test_virtual_tokens_answer_as_in_training(runs: Runs, name: str) -> None:
    """Generation goes on from a cache of them; what counts is what PEFT's own forward pass says."""
    model = AutoModelForCausalLM.from_pretrained(runs.prepared[0].base_model, dtype=torch.float32)
    adapted = PeftModel.from_pretrained(model, str(runs.trained(name).directory / "adapter")).eval()
    prompts = [[5, 6, 7, 8], [9, 10, 11, 12, 13, 14]]
    expected = []
    with torch.inference_mode():
        for prompt in prompts:
            tokens = list(prompt)
            for _ in range(4):
                ids = torch.tensor([tokens])
                logits = adapted(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
                tokens.append(int(logits[0, -1].argmax()))
            expected.append(tokens[len(prompt) :])
    base, cache = virtual_tokens(adapted)
    assert cache.get_seq_length() == 7
    limits = Limits(max_new_tokens=4, batch_size=2, end_ids=frozenset({639}), pad_id=0)
    found = generate(base, prompts, limits=limits, done=lambda rows, tokens: None, virtual=cache)
    assert [answer.tokens for answer in found] == expected


def test_merging_is_rounded_once_for_each_kind(runs: Runs) -> None:
    """In fp32 nothing is rounded away: merged and unmerged answer alike."""
    from tuneserve_pipeline.merge import merge

    answer = [40, 41, 2]
    rows = [Row(input_ids=[*range(at, at + 9), *answer], labels=[IGNORED] * 9 + answer) for at in range(5, 300, 31)]
    for name in ("dora", "ia3", "rslora"):
        model = AutoModelForCausalLM.from_pretrained(runs.prepared[0].base_model, dtype=torch.float32)
        adapted = PeftModel.from_pretrained(model, str(runs.trained(name).directory / "adapter"))
        reference = answer_logits(adapted, rows)
        figures = compare(reference, answer_logits(merge(adapted), rows))
        assert (figures.max_logit_difference < 1e-4, figures.top1_agreement) == (True, 1.0), name


def test_loss_that_explodes_is_told_with_the_checkpoint_that_is_kept(runs: Runs) -> None:
    spec = SPECS["full"].model_copy(update={"learning_rate": 0.5, "max_gradient_norm": 1000.0, "max_steps": 40})
    mine = runs.workspace("explosion")
    config = mine.config(spec, parents={"prepare": runs.prepared[1]}, runtime=RUNTIME)
    failed = mine.run_here(config)
    assert (failed.code, failed.reason) == (64, "LossExploded"), failed.log
    assert "lower spec.training.learningRate" in failed.message
    kept = [path.name.removeprefix("step-") for path in Path(config.output + ".partial").glob("checkpoints/step-*")]
    assert any(f"The checkpoint of step {step} is kept" in failed.message for step in kept)
