"""Whether a merged model still answers as the adapter on its base does: next-token logits, side by side.

Both are computed in fp32, whatever they are stored in: what differs then is what the merge has changed. In bfloat16 the
noise of the arithmetic is larger than that. A layer at a time, so that no model is in memory in 32 bits.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as functional
from transformers import PreTrainedModel

from tuneserve_pipeline.rows import IGNORED, Row

#: Below this share of equal choices a merge is broken; rounding to 16 bits leaves 0.99 and more.
LEAST_AGREEMENT = 0.95


@dataclass(frozen=True, kw_only=True)
class Fidelity:
    top1_agreement: float
    """Share of positions where both choose the same token."""
    max_logit_difference: float
    positions: int


def answer_logits(model: torch.nn.Module, rows: Sequence[Row]) -> torch.Tensor:
    """The logits that choose each token of each row's answer (positions x vocabulary), in fp32."""
    longest = max(len(row.input_ids) for row in rows)
    ids = torch.tensor([row.input_ids + [0] * (longest - len(row.input_ids)) for row in rows])
    mask = torch.tensor([[1] * len(row.input_ids) + [0] * (longest - len(row.input_ids)) for row in rows])
    labels = torch.tensor([row.labels + [IGNORED] * (longest - len(row.labels)) for row in rows])
    # A position chooses the token after it.
    chosen = functional.pad(labels[:, 1:], (0, 1), value=IGNORED) != IGNORED
    columns = chosen.any(dim=0).nonzero().squeeze(1)
    model.eval()
    with torch.inference_mode(), full_precision(model):
        logits = model(input_ids=ids, attention_mask=mask, logits_to_keep=columns, use_cache=False).logits
    return logits[chosen[:, columns]]


@contextmanager
def full_precision(model: torch.nn.Module) -> Iterator[None]:
    """Each layer's weights in fp32 while it computes; afterwards they are as they were, to the bit."""

    def widen(layer: torch.nn.Module, inputs: Any) -> None:
        for parameter in layer.parameters(recurse=False):
            parameter.data = parameter.data.float()

    def narrow(layer: torch.nn.Module, inputs: Any, output: Any) -> None:
        for parameter in layer.parameters(recurse=False):
            parameter.data = parameter.data.to(stored[parameter])

    stored = {parameter: parameter.dtype for parameter in model.parameters()}
    hooks = []
    for layer in model.modules():
        if any(True for _ in layer.parameters(recurse=False)):
            hooks += [layer.register_forward_pre_hook(widen), layer.register_forward_hook(narrow)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def compare(reference: torch.Tensor, other: torch.Tensor) -> Fidelity:
    """Raises `ValueError` for logits that are not finite."""
    if not (torch.isfinite(reference).all() and torch.isfinite(other).all()):
        raise ValueError("some logits are not finite")
    return Fidelity(
        top1_agreement=float((reference.argmax(-1) == other.argmax(-1)).float().mean()),
        max_logit_difference=float((reference - other).abs().max()),
        positions=len(reference),
    )


def same_parameters(first: PreTrainedModel, second: PreTrainedModel) -> str | None:
    """Name of the first parameter that differs in a bit; None if there is none."""
    other = second.state_dict()
    for name, value in first.state_dict().items():
        if name not in other or not torch.equal(value, other[name]):
            return name
    return None
