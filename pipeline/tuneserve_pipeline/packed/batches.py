"""Packs as tensors of fixed shapes. On the CPU, in numpy: it runs between two steps of the device."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tuneserve_pipeline.packed.engine import Limits
from tuneserve_pipeline.rows import IGNORED

Row = tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]


def make_batch(rows: Sequence[Row], *, limits: Limits, longest: int, weight: float, pin: bool) -> dict[str, Tensor]:
    """Rows of (token ids, labels) end to end, then rows of nothing up to the limits.

    `weight`: what the loss of each label is multiplied with.
    """
    lengths = np.array([len(ids) for ids, _ in rows], dtype=np.int64)
    real = int(lengths.sum())
    fill = limits.tokens - real
    ids = np.zeros(limits.tokens, dtype=np.int64)
    ids[:real] = np.concatenate([each for each, _ in rows])
    # What fills up is rows of nothing.
    filling = [longest] * (fill // longest) + [fill % longest] * (fill % longest > 0)
    sizes = np.concatenate([lengths, np.array(filling, dtype=np.int64)])
    closes = sizes.cumsum()
    begins, ends = np.repeat(closes - sizes, sizes), np.repeat(closes, sizes)
    labels = np.concatenate([each for _, each in rows])
    # A position predicts the token after it; the first token of a row is predicted by none.
    learned = labels != IGNORED
    learned[(closes - sizes)[: len(rows)]] = False
    places = np.flatnonzero(learned)
    targets = np.full(limits.labels, IGNORED, dtype=np.int64)
    targets[: len(places)] = labels[places]
    sources = np.zeros(limits.labels, dtype=np.int64)
    sources[: len(places)] = places - 1
    assert fill >= 0 and len(places) <= limits.labels
    batch = {
        "ids": torch.from_numpy(ids),
        "positions": torch.from_numpy(np.arange(limits.tokens) - begins),
        "begins": torch.from_numpy(begins.astype(np.int32)),
        "ends": torch.from_numpy(ends.astype(np.int32)),
        "places": torch.from_numpy(sources),
        "labels": torch.from_numpy(targets),
        "weight": torch.tensor(weight, dtype=torch.float32),
    }
    return {name: value.pin_memory() for name, value in batch.items()} if pin else batch


def labels_in(labels: np.ndarray[Any, Any]) -> int:
    """Positions of a row that are learned."""
    return int((labels[1:] != IGNORED).sum())
