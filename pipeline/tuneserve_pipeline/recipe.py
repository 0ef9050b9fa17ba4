"""How a training run is cut into steps and micro-batches, and which rows each of them has. Pure.

The rows of an optimizer step depend on the spec and the seed alone. How many of them are on the device at a time
depends on its memory and changes no step: a run that resumes on another machine goes on with the same rows.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

from tuneserve_pipeline.contract import TrainSpec

DEFAULT_EPOCHS = 3.0
#: Share of the steps in which a learning rate that was held falls at the end.
DECAY_SHARE = 0.1
#: Tokens, with padding, that go through the device at once when nobody says otherwise.
TOKENS_AT_A_TIME = {"cpu": 4096, "cuda": 8192}
#: Steps among which rows of like length are brought together: little padding, and still much chance.
POOL = 16
#: Share of the free memory that activations may take before they are computed again instead of kept.
ACTIVATION_SHARE = 0.5


@dataclass(frozen=True, kw_only=True)
class Recipe:
    steps: int
    """Optimizer steps in all."""
    warmup_steps: int
    decay_steps: int
    """At the end, where the scheduler holds the learning rate until then."""
    tokens_at_a_time: int
    """On the device, with padding; a longer row comes alone."""
    rows_at_a_time: int | None = None
    """If the platform asks for it, instead."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What the memory of activations depends on."""

    layers: int
    hidden: int
    intermediate: int


def make_recipe(
    spec: TrainSpec,
    *,
    lengths: Sequence[int],
    device: str,
    micro_batch_size: int | None = None,
    epoch_steps: int | None = None,
) -> Recipe:
    """`lengths`: tokens of each row. `micro_batch_size`: what the platform asks for; none: as the device can take.

    `epoch_steps`: optimizer steps of an epoch, if they are cut already.
    """
    in_epoch = epoch_steps or steps_in_epoch(spec, lengths=lengths)
    steps = total_steps(spec, in_epoch=in_epoch)
    warmup = min(math.ceil(spec.warmup_ratio * steps), steps)
    return Recipe(
        steps=steps,
        warmup_steps=warmup,
        decay_steps=min(math.ceil(DECAY_SHARE * steps), steps - warmup),
        tokens_at_a_time=max(TOKENS_AT_A_TIME[device], max(lengths))
        if micro_batch_size is None
        else micro_batch_size * max(lengths),
        rows_at_a_time=micro_batch_size,
    )


def steps_in_epoch(spec: TrainSpec, *, lengths: Sequence[int]) -> int:
    if spec.global_batch_tokens is None:
        return math.ceil(len(lengths) / spec.global_batch_size)
    return min(len(lengths), math.ceil(sum(lengths) / spec.global_batch_tokens))


def total_steps(spec: TrainSpec, *, in_epoch: int) -> int:
    """Optimizer steps: `max_steps`, or as many as the epochs have."""
    if spec.max_steps is not None:
        return spec.max_steps
    return max(1, math.ceil((DEFAULT_EPOCHS if spec.epochs is None else spec.epochs) * in_epoch))


def micro_batches(lengths: Sequence[int], *, recipe: Recipe) -> list[list[int]]:
    """Rows of a step, by their places in `lengths`, as they go through the device: those of like length together."""
    found: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lambda row: (lengths[row], row)):
        rows = len(found[-1]) + 1 if found else 0
        fits = (
            rows * lengths[row] <= recipe.tokens_at_a_time
            if recipe.rows_at_a_time is None
            else rows <= recipe.rows_at_a_time
        )
        if found and fits:
            found[-1].append(row)
        else:
            found.append([row])
    return found


def keeps_activations(*, shape: Shape, tokens: int, free_bytes: int) -> bool:
    """Whether all activations of `tokens` fit, so that none are computed twice (a third of the time saved).

    Bytes of a token in a layer: 2 x (8 hidden + 3 intermediate); measured for a 7B Llama in NF4: 118,800 of 131,600.
    """
    needed = tokens * shape.layers * 2 * (8 * shape.hidden + 3 * shape.intermediate)
    return needed <= free_bytes * ACTIVATION_SHARE


def step_rows(spec: TrainSpec, *, lengths: Sequence[int], epoch: int) -> list[list[int]]:
    """The rows of each step of an epoch: as many as the global batch has, or about as many tokens; of like length."""
    dice = random.Random(f"{spec.seed}/{epoch}")
    rows = list(range(len(lengths)))
    dice.shuffle(rows)
    if spec.global_batch_tokens is not None:
        steps = cut(rows, lengths=lengths, parts=steps_in_epoch(spec, lengths=lengths))
        pools = [steps[start : start + POOL] for start in range(0, len(steps), POOL)]
        steps = [step for pool in pools for step in cut(_sorted(pool, lengths), lengths=lengths, parts=len(pool))]
        dice.shuffle(steps)
        return steps
    size = spec.global_batch_size
    whole = len(rows) - len(rows) % size
    steps = []
    for start in range(0, whole, size * POOL):
        together = _sorted([rows[start : min(start + size * POOL, whole)]], lengths)
        steps += [together[first : first + size] for first in range(0, len(together), size)]
    dice.shuffle(steps)
    return [*steps, rows[whole:]] if whole < len(rows) else steps


def cut(rows: Sequence[int], *, lengths: Sequence[int], parts: int) -> list[list[int]]:
    """`rows` in their order as `parts` lists of about as many tokens; none is empty, so there must be as many rows."""
    total, before, part = sum(lengths[row] for row in rows), 0, 0
    found: list[list[int]] = [[] for _ in range(parts)]
    for place, row in enumerate(rows):
        wanted = int((before + lengths[row] / 2) * parts / total)
        # Neither may a part be left out, nor may too few rows be left for those to come.
        part = max(parts - (len(rows) - place), min(wanted, part + bool(found[part]), parts - 1), part)
        found[part].append(row)
        before += lengths[row]
    return found


def _sorted(groups: Sequence[Sequence[int]], lengths: Sequence[int]) -> list[int]:
    return sorted((row for group in groups for row in group), key=lambda row: (lengths[row], row))
