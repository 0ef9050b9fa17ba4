"""How well a model foresees plain texts, token by token: nothing is generated, and nothing can be told by a score of
answers.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from tuneserve_pipeline.scores import Scores

#: Tokens of a piece that is looked at as a whole: the logits of each are a number for each token of the vocabulary.
PIECE = 1024
#: Of an exponential beyond it no float is left; a model so bad needs no digits.
_WORST_LOSS = 700.0


@dataclass(frozen=True, kw_only=True)
class Foresight:
    """Of one text."""

    tokens: int
    """All but the first of each piece, before which the model has seen nothing."""
    hits: int
    """Tokens that were the model's first choice."""
    loss: float
    """Sum of the losses of all tokens."""


def foresee(
    model: Any, texts: Iterable[Sequence[Sequence[int]]], *, done: Callable[[int, int], None]
) -> list[Foresight]:
    """`texts`: tokens of each, in pieces; `done(rows, tokens)` is told after each."""
    import torch
    import torch.nn.functional as functional

    found = []
    with torch.inference_mode():
        for pieces in texts:
            tokens, hits, loss = 0, 0, 0.0
            for piece in pieces:
                ids = torch.tensor([piece], device=model.device)
                logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
                targets = ids[0, 1:]
                tokens += len(targets)
                hits += int((logits.argmax(-1) == targets).sum())
                loss += float(functional.cross_entropy(logits, targets, reduction="sum"))
            found.append(Foresight(tokens=tokens, hits=hits, loss=loss))
            done(1, tokens)
    return found


def score(found: Sequence[Foresight]) -> Scores:
    """Share of tokens that were the first choice, and the perplexity, each over all tokens alike."""
    tokens = sum(one.tokens for one in found)
    loss = sum(one.loss for one in found) / tokens
    return Scores(
        metrics={
            "tokenAccuracy": sum(one.hits for one in found) / tokens,
            "perplexity": math.exp(min(loss, _WORST_LOSS)),
            "samples": float(len(found)),
        },
        details={"tokens": tokens, "loss": loss},
    )
