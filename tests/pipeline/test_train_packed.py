"""Rows end to end: how they are packed, that the packed engine computes what transformers does, and its train stage."""

import copy
import json
import random
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from support.stages import Finished, Workspace
from tuneserve_pipeline.contract import Checkpoints, LoraSpec, Method, Packing, Runtime, TrainSpec
from tuneserve_pipeline.packed.batches import labels_in, make_batch
from tuneserve_pipeline.packed.engine import Limits, PackedEngine, limits_of
from tuneserve_pipeline.packed.weights import unsupported
from tuneserve_pipeline.packing import Step, epoch_order, pack_rows, steps_of_rows, steps_of_tokens

LONGEST = 64
LENGTHS = st.lists(st.integers(1, LONGEST), min_size=1, max_size=300)

# --- packing ---------------------------------------------------------------------------------------------------------


def rows_of(steps: list[Step]) -> list[int]:
    return sorted(row for step in steps for pack in step for row in pack.rows)


@given(lengths=LENGTHS, tokens=st.integers(LONGEST, 500))
def test_steps_of_tokens_hold_each_row_once_and_no_pack_is_too_large(lengths: list[int], tokens: int) -> None:
    steps = steps_of_tokens(lengths, step_tokens=2 * tokens, device_tokens=tokens, seed=1)
    assert rows_of(steps) == list(range(len(lengths)))
    for step in steps:
        assert 1 <= len(step) <= 2
        for pack in step:
            assert pack.tokens == sum(lengths[row] for row in pack.rows) <= tokens


@given(lengths=LENGTHS, rows=st.integers(1, 40))
def test_steps_of_rows_keep_the_global_batch(lengths: list[int], rows: int) -> None:
    steps = steps_of_rows(lengths, step_rows=rows, device_tokens=100, seed=1)
    assert rows_of(steps) == list(range(len(lengths)))
    sizes = [sum(len(pack.rows) for pack in step) for step in steps]
    assert sizes[:-1] == [rows] * (len(steps) - 1) and 1 <= sizes[-1] <= rows


def test_rows_of_usual_lengths_leave_little_room() -> None:
    dice = random.Random(0)
    lengths = [max(16, min(512, int(dice.lognormvariate(4.7, 0.7)))) for _ in range(4000)]
    steps = steps_of_tokens(lengths, step_tokens=4096, device_tokens=4096, seed=3)
    assert sum(lengths) / (4096 * len(steps)) > 0.985
    small = [pack for step in steps_of_rows(lengths, step_rows=64, device_tokens=2048, seed=3) for pack in step]
    assert sum(lengths) / (2048 * len(small)) > 0.85


def test_the_seed_decides_what_is_together_and_the_epoch_in_which_order() -> None:
    lengths = [5 + row % 40 for row in range(200)]
    once, again, other = (steps_of_tokens(lengths, step_tokens=128, device_tokens=128, seed=seed) for seed in (1, 1, 2))
    assert once == again != other
    orders = [epoch_order(len(once), seed=1, epoch=epoch) for epoch in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]
    assert sorted(orders[0]) == sorted(orders[2])


@pytest.mark.parametrize(("tokens", "packs"), [(4096, 1), (4097, 2), (8000, 2), (8192, 2), (12000, 3)])
def test_a_step_is_as_large_as_it_shall_be(tokens: int, packs: int) -> None:
    steps = steps_of_tokens([20 + row % 200 for row in range(3000)], step_tokens=tokens, device_tokens=4096, seed=1)
    for step in steps[:-1]:
        assert len(step) == packs
        assert 0.97 * tokens < sum(pack.tokens for pack in step) <= tokens


def test_a_row_longer_than_a_batch_is_an_error() -> None:
    with pytest.raises(ValueError, match="row 1 has 30 tokens, more than the 20 of a batch"):
        pack_rows([5, 30], rows=[0, 1], budget=20)


# --- the engine ------------------------------------------------------------------------------------------------------

SIZES: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 256,
    "intermediate_size": 384,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
FAMILIES = {
    "llama": LlamaConfig(**SIZES),
    "llama-3": LlamaConfig(**SIZES, tie_word_embeddings=True, rope_parameters=LLAMA3_ROPE),
    "llama-2": LlamaConfig(**(SIZES | {"num_key_value_heads": 4})),
    "mistral": MistralConfig(**SIZES, sliding_window=None),
    "qwen2": Qwen2Config(**SIZES),
    "qwen3": Qwen3Config(**SIZES, head_dim=64),
}


def quantized(directory: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(
        directory,
        dtype=torch.bfloat16,
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        ),
    )


def with_adapters(model: Any, weights: dict[str, torch.Tensor]) -> Any:
    config = LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=12, target_modules="all-linear")
    adapted = get_peft_model(model, config)
    for name, parameter in adapted.named_parameters():
        if parameter.requires_grad:
            if name not in weights:
                weights[name] = torch.randn_like(parameter, dtype=torch.float32) * 0.05
            parameter.data = weights[name].clone()
    return adapted


def labelled_rows(lengths: tuple[int, ...]) -> list[tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]]:
    dice = np.random.default_rng(0)
    rows = []
    for length in lengths:
        ids = dice.integers(0, SIZES["vocab_size"], length)
        labels = ids.copy()
        labels[: length // 2] = -100
        rows.append((ids, labels))
    return rows


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_are_those_of_transformers(family: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config: PretrainedConfig = copy.deepcopy(FAMILIES[family])
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path)
    weights: dict[str, torch.Tensor] = {}
    # Two models: one that has run may hold its weights in another order on a CPU.
    plain, given_model = with_adapters(quantized(tmp_path), weights), quantized(tmp_path)
    adapted = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    assert unsupported(given_model, adapted=adapted, dropout=0.0, longest=LONGEST) is None
    packed = with_adapters(given_model, weights)

    rows = labelled_rows((20, 33, 7, 50))
    count = sum(labels_in(labels) for _, labels in rows)
    expected = torch.zeros(())
    for ids, labels in rows:
        logits = plain(input_ids=torch.tensor(ids)[None]).logits[0, :-1].float()
        expected = expected + torch.nn.functional.cross_entropy(logits, torch.tensor(labels[1:]), reduction="sum")
    (expected / count).backward()

    engine = PackedEngine(packed, longest=LONGEST)
    # In two batches, and with room that no row fills.
    engine.begin_step()
    for some in (rows[:3], rows[3:]):
        limits = limits_of([(100, count)])
        engine.accumulate(make_batch(some, limits=limits, longest=LONGEST, weight=1 / count, pin=False))
    loss = engine.end_step()

    assert loss.item() == pytest.approx(expected.item() / count, rel=2e-3)
    names = sorted(weights)
    mine, theirs = (
        torch.cat([dict(model.named_parameters())[name].grad.flatten() for name in names]) for model in (packed, plain)
    )
    assert torch.nn.functional.cosine_similarity(mine, theirs, 0) > 0.999
    assert (mine - theirs).norm() < 0.03 * theirs.norm()


@pytest.mark.parametrize("room", [0, 1, 64, 100])
def test_a_batch_is_filled_up_with_rows_of_nothing(room: int) -> None:
    rows = labelled_rows((20, 44, 64))
    limits = Limits(tokens=128 + room, labels=64)
    batch = make_batch(rows, limits=limits, longest=LONGEST, weight=1.0, pin=False)
    begins, ends, positions = (batch[name].tolist() for name in ("begins", "ends", "positions"))
    assert [begin for place, begin in enumerate(begins) if place == begin][:4] == [0, 20, 64, 128][: 3 + (room > 0)]
    assert max(end - begin for begin, end in zip(begins, ends, strict=True)) <= LONGEST
    assert [place - begin for place, begin in enumerate(begins)] == positions
    learned = [(int(place), int(label)) for place, label in zip(batch["places"], batch["labels"], strict=True)]
    assert [pair for pair in learned if pair[1] >= 0] == [
        (start + place - 1, int(labels[place]))
        for start, (_, labels) in zip((0, 20, 64), rows, strict=True)
        for place in range(1, len(labels))
        if labels[place] >= 0
    ]


@pytest.mark.parametrize("changed", ["dropout", "adapted", "window"])
def test_what_the_engine_does_not_know_is_told(changed: str, tmp_path: Path) -> None:
    config = MistralConfig(**SIZES, sliding_window=32) if changed == "window" else FAMILIES["llama"]
    AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=torch.bfloat16).save_pretrained(tmp_path)
    adapted = ["q_proj", "v_proj"] if changed == "adapted" else json.loads(LINEAR)
    reason = unsupported(
        quantized(tmp_path), adapted=adapted, dropout=0.1 if changed == "dropout" else 0.0, longest=LONGEST
    )
    expected = {
        "dropout": "adapters have dropout",
        "adapted": "k_proj, o_proj, gate_proj, up_proj, down_proj get no adapter",
        "window": "rows are longer than the attention window of 32 tokens",
    }
    assert reason == expected[changed]


LINEAR = '["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]'

# --- the stage -------------------------------------------------------------------------------------------------------

STEPS = 36
#: Steps of an epoch: eight of 96 rows each.
IN_EPOCH = 12
SPEC = TrainSpec(
    lora=LoraSpec(dropout=0.0),
    max_steps=STEPS,
    learning_rate=5e-3,
    global_batch_size=8,
    max_sequence_length=256,
    packing=Packing.ALWAYS,
)
RUNTIME = Runtime(device="cpu", checkpoints=Checkpoints(steps=4))


def losses(finished: Finished) -> list[float]:
    return [row["loss"] for row in finished.rows("trainer_log.jsonl") if "loss" in row]


def trained(spec: TrainSpec, prepared: tuple[Workspace, Finished], directory: Path) -> Finished:
    mine = Workspace(root=directory, base_model=prepared[0].base_model)
    finished = mine.run(mine.config(spec, parents={"prepare": prepared[1]}, runtime=RUNTIME))
    assert finished.code == 0, finished.log
    return finished


def test_it_learns_what_the_padded_path_learns(prepared: tuple[Workspace, Finished], tmp_path: Path) -> None:
    """Every step sees all rows, so that both paths see the same."""
    everything = SPEC.model_copy(update={"global_batch_size": 200, "max_steps": 10})
    packed = trained(everything, prepared, tmp_path / "packed")
    padded = trained(everything.model_copy(update={"packing": Packing.NEVER}), prepared, tmp_path / "padded")
    assert "end to end" in packed.log and "end to end" not in padded.log
    curve = losses(packed)
    assert curve[0] == pytest.approx(losses(padded)[0], rel=1e-3)
    assert curve == pytest.approx(losses(padded), rel=0.03)
    assert curve[-1] < 0.9 * curve[0]
    assert packed.outcome.facts["tokens"] == padded.outcome.facts["tokens"]
    assert packed.outcome.metrics["evalLoss"] == pytest.approx(padded.outcome.metrics["evalLoss"], rel=0.03)
    weights = load_file(packed.directory / "adapter/adapter_model.safetensors")
    assert all(weight.abs().sum() > 0 for weight in weights.values())


def test_sigterm_saves_and_the_next_run_goes_on_exactly(prepared: tuple[Workspace, Finished], tmp_path: Path) -> None:
    whole = trained(SPEC, prepared, tmp_path / "whole")
    assert Counter(losses(whole)).total() == STEPS
    mine = Workspace(root=tmp_path / "stopped", base_model=prepared[0].base_model)
    config = mine.config(SPEC, parents={"prepare": prepared[1]}, runtime=RUNTIME)
    process = mine.start(config)
    aside = Path(config.output + ".partial") / "checkpoints"
    # In the second epoch, which has another order.
    while not [path for path in aside.glob("step-*") if int(path.name.removeprefix("step-")) > IN_EPOCH]:
        assert process.poll() is None, process.communicate()[1]
    process.send_signal(signal.SIGTERM)
    stopped = mine.finish(config, process)
    assert (stopped.code, stopped.reason) == (75, "Interrupted"), stopped.log
    resumed = mine.run(config)
    assert resumed.code == 0, resumed.log
    assert IN_EPOCH < int(resumed.outcome.facts["resumedFromStep"]) < STEPS
    assert losses(resumed) == pytest.approx(losses(whole), abs=1e-3)
    assert resumed.outcome.digest == whole.outcome.digest


def test_tokens_as_the_global_batch(prepared: tuple[Workspace, Finished], tmp_path: Path) -> None:
    finished = trained(
        SPEC.model_copy(update={"global_batch_tokens": 600, "max_steps": 3}), prepared, tmp_path / "tokens"
    )
    assert 3 * 500 < int(finished.outcome.facts["tokens"]) <= 3 * 600


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"method": Method.IA3}, "the method is IA3"),
        ({"method": Method.FULL}, "the method is Full"),
        ({"lora": LoraSpec(weight_decomposed=True)}, "lora.weightDecomposed is set"),
        ({"neftune_alpha": 5.0}, "neftuneAlpha is set"),
    ],
)
def test_what_the_layers_do_not_compute_is_padded(
    prepared: tuple[Workspace, Finished], tmp_path: Path, change: dict[str, Any], why: str
) -> None:
    mine = Workspace(root=tmp_path, base_model=prepared[0].base_model)
    spec = SPEC.model_copy(update=change)
    refused = mine.run_here(mine.config(spec, parents={"prepare": prepared[1]}, runtime=RUNTIME))
    assert (refused.code, refused.reason) == (64, "PackingImpossible")
    assert why in refused.message


def test_the_best_weights_are_put_out(prepared: tuple[Workspace, Finished], tmp_path: Path) -> None:
    finished = trained(SPEC.model_copy(update={"evaluation_steps": 4, "max_steps": 8}), prepared, tmp_path / "best")
    measured = {row["step"]: row["evalLoss"] for row in finished.rows("trainer_log.jsonl") if "evalLoss" in row}
    assert sorted(measured) == [4, 8]
    assert finished.outcome.metrics["evalLoss"] == min(measured.values())
