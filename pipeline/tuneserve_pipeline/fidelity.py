"""Whether a merged model still answers as the adapter on its base does: next-token logits, side by side.

Compared in the precision that both are used in; the differences that rounding makes are small and change no answer.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from tuneserve_pipeline.rows import Row

#: Below this share of equal choices a merge is broken; rounding to 16 bits leaves 0.99 and more.
LEAST_AGREEMENT = 0.95


@dataclass(frozen=True, kw_only=True)
class Fidelity:
    top1_agreement: float
    """Share of positions where both choose the same token."""
    max_logit_difference: float
    positions: int


def answer_logits(model: torch.nn.Module, rows: Sequence[Row]) -> list[torch.Tensor]:
    """For each row the logits that choose the tokens of its answer, in fp32 (tokens x vocabulary)."""
    found = []
    model.eval()
    with torch.inference_mode():
        for row in rows:
            ids = torch.tensor([row.input_ids[:-1]])
            logits = model(input_ids=ids, logits_to_keep=len(row.completion), use_cache=False).logits
            found.append(logits[0, -len(row.completion) :].float())
    return found


def compare(reference: Sequence[torch.Tensor], other: Sequence[torch.Tensor]) -> Fidelity:
    """Raises `ValueError` for logits that are not finite, or nothing to compare."""
    first, second = torch.cat(list(reference)), torch.cat(list(other))
    if not (torch.isfinite(first).all() and torch.isfinite(second).all()):
        raise ValueError("some logits are not finite")
    return Fidelity(
        top1_agreement=float((first.argmax(-1) == second.argmax(-1)).float().mean()),
        max_logit_difference=float((first - second).abs().max()),
        positions=len(first),
    )


def same_parameters(first: PreTrainedModel, second: PreTrainedModel) -> str | None:
    """Name of the first parameter that differs in a bit; None if there is none."""
    other = second.state_dict()
    for name, value in first.state_dict().items():
        if name not in other or not torch.equal(value, other[name]):
            return name
    return None
