"""Evaluation on the way, early stopping, the best weights, and a loss that is lost."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from support.stages import Finished, Workspace
from support.tiny import reviews, write_jsonl
from tuneserve_pipeline import course
from tuneserve_pipeline.contract import (
    Checkpoints,
    ClaimFile,
    EarlyStopping,
    PrepareSpec,
    Runtime,
    Scheduler,
    Split,
    TrainSpec,
)
from tuneserve_pipeline.course import Evaluation

SPEC = TrainSpec(max_steps=12, learning_rate=0.05, scheduler=Scheduler.CONSTANT, warmup_ratio=0.0, global_batch_size=8)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(os.environ, "OMP_NUM_THREADS", "1")
        yield
    torch.set_num_threads(before)


def train(
    prepared: tuple[Workspace, Finished], root: Path, spec: TrainSpec, *, checkpoints: Checkpoints | None = None
) -> Finished:
    mine = Workspace(root=root, base_model=prepared[0].base_model)
    mine.root.mkdir(exist_ok=True)
    runtime = Runtime(device="cpu", checkpoints=checkpoints or Checkpoints())
    return mine.run_here(mine.config(spec, parents={"prepare": prepared[1]}, runtime=runtime))


def found(*losses: float) -> list[Evaluation]:
    return [Evaluation(step=10 * number, loss=loss) for number, loss in enumerate(losses, start=1)]


def test_best_is_the_earliest_of_the_lowest() -> None:
    assert course.best(found(3.0, 1.0, 2.0, 1.0)) == Evaluation(step=20, loss=1.0)
    assert course.best([]) is None


@pytest.mark.parametrize(
    ("losses", "minimum", "exhausted"),
    [
        ((3.0,), 0.0, False),
        ((3.0, 3.0), 0.0, False),
        ((3.0, 3.0, 3.1), 0.0, True),
        ((3.0, 3.1, 2.9, 3.0), 0.0, False),
        ((3.0, 2.95, 2.9), 0.1, True),
        ((3.0, 2.95, 2.8), 0.1, False),  # against the last improvement, not against the evaluation before
    ],
)
def test_patience_counts_evaluations_without_an_improvement(
    losses: tuple[float, ...], minimum: float, exhausted: bool
) -> None:
    stopping = EarlyStopping(patience=2, minimum_improvement=minimum)
    assert course.is_exhausted(found(*losses), stopping=stopping) is exhausted
    assert not course.is_exhausted(found(*losses), stopping=None)


@pytest.mark.parametrize(
    ("losses", "exploded"),
    [
        ([2.0] * 5 + [9.0] * 3, True),
        ([2.0] * 5 + [9.0] * 2, False),  # bad batches
        ([2.0] + [9.0] * 4, False),  # not for long enough
        ([2.0, 9.0, 3.0, 8.0, 30.0, 4.0], True),  # up and down, but mostly up
        ([0.1] * 5 + [0.9] * 5, False),
    ],
)
def test_an_explosion_is_high_and_lasts(losses: list[float], exploded: bool) -> None:
    assert course.has_exploded(losses) is exploded


@given(st.lists(st.floats(0.01, 10.0), max_size=5))
def test_a_short_training_never_explodes(losses: list[float]) -> None:
    assert not course.has_exploded(losses)


@given(
    history=st.lists(
        st.sampled_from(["loss", "eval_loss"]).flatmap(lambda name: st.fixed_dictionaries({name: st.floats(0, 9)}))
    )
)
def test_the_ends_of_a_history_tell_as_much_of_an_explosion_as_all_of_it(history: list[dict[str, float]]) -> None:
    ends, every = course.ends(history), course.losses(history)
    assert ends == every[:1] + every[1:][-course.EXPLOSION_STEPS :]
    assert course.has_exploded(ends) is course.has_exploded(every)


@pytest.fixture
def contrary(tmp_path: Path, tiny_model: Path, classification: PrepareSpec) -> tuple[Workspace, Finished]:
    """Rows of one label to learn from, and of another to validate on: the surer the model gets, the worse it is."""
    workspace = Workspace(root=tmp_path / "contrary", base_model=tiny_model)
    rows = reviews(120)
    by_label = {label: [row for row in rows if row["label"] == label] for label in ("positive", "negative", "neutral")}
    for name, label in (("train", "positive"), ("validation", "negative"), ("test", "neutral")):
        write_jsonl(workspace.datasets / "reviews" / f"{name}.jsonl", by_label[label])
    sources = {name: (ClaimFile(claim="reviews", path=f"{name}.jsonl"),) for name in ("validation", "test")}
    parent = workspace.run_here(workspace.config(classification.model_copy(update=sources)))
    assert parent.code == 0, parent.log
    return workspace, parent


def test_the_best_weights_are_put_out_whatever_is_kept(contrary: tuple[Workspace, Finished], tmp_path: Path) -> None:
    prepared = contrary
    spec = SPEC.model_copy(update={"evaluation_steps": 2, "learning_rate": 0.02})
    finished = train(prepared, tmp_path / "long", spec, checkpoints=Checkpoints(steps=1, keep=1))
    assert finished.code == 0, finished.log
    measured = {row["step"]: row["evalLoss"] for row in finished.rows("trainer_log.jsonl") if "evalLoss" in row}
    assert sorted(measured) == [2, 4, 6, 8, 10, 12]
    lowest = min(measured, key=measured.__getitem__)
    assert lowest < 12, measured
    assert finished.outcome.facts["bestStep"] == str(lowest)
    assert finished.outcome.metrics["evalLoss"] == measured[lowest]

    # A constant learning rate: a training that ends at that step has the very same weights.
    short = train(prepared, tmp_path / "short", spec.model_copy(update={"max_steps": lowest}))
    assert short.code == 0, short.log
    weights = "adapter/adapter_model.safetensors"
    assert (finished.directory / weights).read_bytes() == (short.directory / weights).read_bytes()
    assert not (finished.directory / "checkpoints").exists()


def test_early_stopping_ends_the_training_and_survives_a_new_start(
    prepared: tuple[Workspace, Finished], tmp_path: Path
) -> None:
    stopping = EarlyStopping(patience=2, minimum_improvement=100.0)
    spec = SPEC.model_copy(update={"evaluation_steps": 2, "early_stopping": stopping, "learning_rate": 1e-3})
    mine = Workspace(root=tmp_path, base_model=prepared[0].base_model)
    config = mine.config(spec, parents={"prepare": prepared[1]}, runtime=Runtime(device="cpu"))
    # What follows the steps fails once: a file lies where the adapter's directory shall be.
    blocker = Path(config.output + ".partial") / "adapter"
    blocker.parent.mkdir(parents=True)
    blocker.write_text("")
    assert mine.run_here(config).code == 1
    blocker.unlink()
    finished = mine.run_here(config)
    assert finished.code == 0, finished.log
    assert (finished.outcome.facts["steps"], finished.outcome.facts["resumedFromStep"]) == ("6", "6")
    assert len([row for row in finished.rows("trainer_log.jsonl") if "loss" in row]) == 6


def test_validation_loss_is_one_over_tokens_however_rows_are_batched(
    prepared: tuple[Workspace, Finished], tmp_path: Path
) -> None:
    spec = SPEC.model_copy(update={"max_steps": 1, "learning_rate": 1e-6})
    losses = []
    for micro in (8, 1):
        mine = Workspace(root=tmp_path / str(micro), base_model=prepared[0].base_model)
        mine.root.mkdir()
        runtime = Runtime(device="cpu", micro_batch_size=micro)
        finished = mine.run_here(mine.config(spec, parents={"prepare": prepared[1]}, runtime=runtime))
        losses.append(finished.outcome.metrics["evalLoss"])
    assert losses[0] == pytest.approx(losses[1], rel=2e-3)  # bfloat16 rounds otherwise in another batch


def test_no_validation_rows_to_evaluate_on(
    prepared: tuple[Workspace, Finished], classification: PrepareSpec, tmp_path: Path
) -> None:
    mine = Workspace(root=tmp_path, base_model=prepared[0].base_model)
    os.symlink(prepared[0].datasets, mine.datasets)
    parent = mine.run_here(mine.config(classification.model_copy(update={"split": Split(validation=0.0)})))
    assert parent.code == 0, parent.log
    failed = train((mine, parent), tmp_path / "train", SPEC.model_copy(update={"evaluation_steps": 2}))
    assert (failed.code, failed.reason) == (64, "NoValidationRows"), failed.log


@pytest.mark.parametrize(
    ("scheduler", "rates"),
    [
        (Scheduler.COSINE, [0.5, 1, 0.963, 0.0]),
        (Scheduler.COSINE_WITH_MINIMUM, [0.5, 1, 0.967, 0.1]),
        (Scheduler.LINEAR, [0.5, 1, 0.875, 0.0]),
        (Scheduler.CONSTANT, [0.5, 1, 1, 1]),
        (Scheduler.INVERSE_SQUARE_ROOT, [0.5, 1, (2 / 3) ** 0.5, (2 / 10) ** 0.5]),
        (Scheduler.WARMUP_STABLE_DECAY, [0.5, 1, 1, 0.0]),
    ],
)
def test_schedulers(scheduler: Scheduler, rates: list[float]) -> None:
    """The learning rate in the steps 1, 2, 3 and after the last of ten, two of them warm-up."""
    import torch
    from transformers import get_scheduler

    from tuneserve_pipeline.recipe import make_recipe
    from tuneserve_pipeline.trainer import SCHEDULERS, scheduler_options

    recipe = make_recipe(TrainSpec(max_steps=10, warmup_ratio=0.2, scheduler=scheduler), lengths=[9], device="cpu")
    assert (recipe.warmup_steps, recipe.decay_steps) == (2, 1)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    course_of = get_scheduler(
        SCHEDULERS[scheduler],
        optimizer,
        num_warmup_steps=recipe.warmup_steps,
        num_training_steps=recipe.steps,
        scheduler_specific_kwargs=scheduler_options(scheduler, recipe=recipe),
    )
    seen: list[Any] = []
    for _ in range(10):
        optimizer.step()
        course_of.step()
        seen.append(course_of.get_last_lr()[0])
    assert [seen[0], seen[1], seen[2], seen[9]] == pytest.approx(rates, abs=2e-3)


def test_noise_on_the_embeddings_changes_the_training(prepared: tuple[Workspace, Finished], tmp_path: Path) -> None:
    spec = SPEC.model_copy(update={"max_steps": 3, "learning_rate": 1e-3})
    curves = []
    for alpha in (0.0, 20.0):
        finished = train(prepared, tmp_path / str(alpha), spec.model_copy(update={"neftune_alpha": alpha}))
        assert finished.code == 0, finished.log
        curves.append([row["loss"] for row in finished.rows("trainer_log.jsonl") if "loss" in row])
        state = json.loads((finished.directory / "adapter/adapter_config.json").read_text())
        assert state["peft_type"] == "LORA"
    assert curves[0][0] != pytest.approx(curves[1][0], abs=1e-3)


@pytest.mark.parametrize("batch", [{"global_batch_size": 8}, {"global_batch_tokens": 300}])
def test_a_step_is_the_same_on_any_card(
    prepared: tuple[Workspace, Finished], tmp_path: Path, batch: dict[str, int]
) -> None:
    spec = SPEC.model_copy(update={**batch, "max_steps": 4, "learning_rate": 1e-3})
    runs = []
    for micro in (None, 3):
        mine = Workspace(root=tmp_path / str(micro), base_model=prepared[0].base_model)
        mine.root.mkdir()
        runtime = Runtime(device="cpu", micro_batch_size=micro)
        finished = mine.run_here(mine.config(spec, parents={"prepare": prepared[1]}, runtime=runtime))
        assert finished.code == 0, finished.log
        runs.append(finished)
    curves = [[row["loss"] for row in run.rows("trainer_log.jsonl") if "loss" in row] for run in runs]
    assert curves[0] == pytest.approx(curves[1], abs=2e-2)
    tokens = {int(run.outcome.facts["tokens"]) for run in runs}
    assert len(tokens) == 1
    if "global_batch_tokens" in batch:
        assert 4 * 200 < tokens.pop() <= 4 * 340
