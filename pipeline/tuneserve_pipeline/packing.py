"""Which rows lie end to end on the device, and which make one optimizer step. Pure.

Attention never crosses a row (the engine is told where each begins), so rows can share a device batch without padding.
What is together depends on the lengths and the seed alone: an epoch changes the order of the steps, not what they hold,
so a run that resumes finds the same steps, and the fixed shapes that CUDA graphs want are known before the first.
"""

import random
from bisect import bisect_right, insort
from collections.abc import Sequence
from dataclasses import dataclass

#: Rows among which the one that fills a batch best is looked for: 99 % full with rows of usual lengths.
POOL = 256


@dataclass(frozen=True, kw_only=True)
class Pack:
    """Rows of one device batch, in their order."""

    rows: tuple[int, ...]
    tokens: int


Step = tuple[Pack, ...]


def steps_of_tokens(lengths: Sequence[int], *, step_tokens: int, device_tokens: int, seed: int) -> list[Step]:
    """Steps of at most `step_tokens` tokens (or of one longer row), as full as can be, in packs of at most
    `device_tokens`.

    Raises ValueError for a row that is longer than a pack may be.
    """
    # Packs of equal size make up the step: one of the device's and a small rest would be two thirds of the work alone.
    packs_of_step = -(-step_tokens // device_tokens)
    budget = max(step_tokens // packs_of_step, min(max(lengths), device_tokens))
    packs = _fill(lengths, budget=budget, seed=seed)
    each = max(1, step_tokens // budget)
    return [tuple(packs[first : first + each]) for first in range(0, len(packs), each)]


def steps_of_rows(lengths: Sequence[int], *, step_rows: int, device_tokens: int, seed: int) -> list[Step]:
    """Steps of `step_rows` rows (the last may have fewer), each in as few packs of `device_tokens` as can be."""
    rows = _shuffled(len(lengths), seed=seed)
    return [
        pack_rows(lengths, rows=rows[first : first + step_rows], budget=device_tokens)
        for first in range(0, len(rows), step_rows)
    ]


def pack_rows(lengths: Sequence[int], *, rows: Sequence[int], budget: int) -> Step:
    """Best fit, longest first: close to the fewest packs (Johnson 1974, "Fast algorithms for bin packing")."""
    free: list[tuple[int, int]] = []
    packs: list[list[int]] = []
    for row in sorted(rows, key=lambda row: (-lengths[row], row)):
        _check(lengths[row], row=row, budget=budget)
        place = bisect_right(free, (lengths[row], -1))
        if place < len(free):
            room, index = free.pop(place)
        else:
            room, index = budget, len(packs)
            packs.append([])
        packs[index].append(row)
        insort(free, (room - lengths[row], index))
    return tuple(Pack(rows=tuple(pack), tokens=sum(lengths[row] for row in pack)) for pack in packs)


def epoch_order(steps: int, *, seed: int, epoch: int) -> list[int]:
    return _shuffled(steps, seed=f"{seed}/{epoch}")


def _fill(lengths: Sequence[int], *, budget: int, seed: int) -> list[Pack]:
    waiting = iter(_shuffled(len(lengths), seed=seed))
    pool: list[tuple[int, int]] = []
    packs: list[Pack] = []
    oldest: dict[int, int] = {}
    while True:
        while len(pool) < POOL and (row := next(waiting, None)) is not None:
            _check(lengths[row], row=row, budget=budget)
            insort(pool, (lengths[row], row))
            oldest[row] = lengths[row]
        if not pool:
            return packs
        # The one that waits longest comes first, or a row of an odd length might never.
        first = next(iter(oldest))
        taken = [first]
        _take(pool, oldest, first)
        room = budget - lengths[first]
        while place := bisect_right(pool, (room, len(lengths))):
            length, row = pool[place - 1]
            taken.append(row)
            _take(pool, oldest, row)
            room -= length
        packs.append(Pack(rows=tuple(taken), tokens=budget - room))


def _take(pool: list[tuple[int, int]], oldest: dict[int, int], row: int) -> None:
    length = oldest.pop(row)
    pool.pop(bisect_right(pool, (length, row)) - 1)


def _check(length: int, *, row: int, budget: int) -> None:
    if length > budget:
        raise ValueError(f"row {row} has {length} tokens, more than the {budget} of a batch")


def _shuffled(count: int, *, seed: int | str) -> list[int]:
    order = list(range(count))
    random.Random(str(seed)).shuffle(order)
    return order
