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
    positions = np.arange(limits.tokens, dtype=np.int64)
    begins = np.concatenate([[0], lengths.cumsum()])
    positions[:real] -= np.repeat(begins[:-1], lengths)
    positions[real:] = (positions[real:] - real) % longest
    # Attention takes rows of at most `longest` tokens; as many rows of nothing as could be needed, most of them empty.
    fillers = np.minimum(real + longest * np.arange(1, -(-limits.tokens // longest) + 1), limits.tokens)
    starts = np.concatenate([begins, np.full(limits.rows - len(rows), real), fillers]).astype(np.int32)
    labels = np.concatenate([each for _, each in rows])
    # A position predicts the token after it; the first token of a row is predicted by none.
    learned = labels != IGNORED
    learned[begins[:-1]] = False
    places = np.flatnonzero(learned)
    targets = np.full(limits.labels, IGNORED, dtype=np.int64)
    targets[: len(places)] = labels[places]
    sources = np.zeros(limits.labels, dtype=np.int64)
    sources[: len(places)] = places - 1
    assert fill >= 0 and len(rows) <= limits.rows and len(places) <= limits.labels
    batch = {
        "ids": torch.from_numpy(ids),
        "positions": torch.from_numpy(positions),
        "starts": torch.from_numpy(starts),
        "places": torch.from_numpy(sources),
        "labels": torch.from_numpy(targets),
        "weight": torch.tensor(weight, dtype=torch.float32),
    }
    return {name: value.pin_memory() for name, value in batch.items()} if pin else batch


def labels_in(labels: np.ndarray[Any, Any]) -> int:
    """Positions of a row that are learned."""
    return int((labels[1:] != IGNORED).sum())
