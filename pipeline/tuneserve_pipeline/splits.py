"""Holds out rows for validation and test, seeded, and finds what is in two places. Pure.

Rows with the same prompt always go to the same side: else the test would ask what was learned by heart.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from tuneserve_pipeline.contract import Split
from tuneserve_pipeline.tasks import Example

#: Fewest different prompts of which some can be held out.
SMALLEST = 3


@dataclass(frozen=True, kw_only=True)
class Splits:
    train: Sequence[Example]
    validation: Sequence[Example]
    test: Sequence[Example]

    def items(self) -> Mapping[str, Sequence[Example]]:
        return {"train": self.train, "validation": self.validation, "test": self.test}


def hold_out(examples: Sequence[Example], *, split: Split, validation: bool, test: bool) -> Splits:
    """Split `examples`; `validation`, `test`: whether to hold rows out for each.

    A prompt's place follows from the seed and its text alone, so a row that is added moves few others. Each side gets
    its share of the different prompts, rounded, but at least one where there are three. Rows keep their order.
    """
    prompts = sorted({example.key for example in examples}, key=lambda key: _rank(key, split.seed))
    counts = [
        _count(len(prompts), share if wanted else 0.0)
        for share, wanted in ((split.test, test), (split.validation, validation))
    ]
    tested = set(prompts[: counts[0]])
    validated = set(prompts[counts[0] : sum(counts)])
    return Splits(
        train=[example for example in examples if example.key not in tested and example.key not in validated],
        validation=[example for example in examples if example.key in validated],
        test=[example for example in examples if example.key in tested],
    )


def _count(prompts: int, share: float) -> int:
    return max(1, round(prompts * share)) if share > 0 and prompts >= SMALLEST else 0


def _rank(key: str, seed: int) -> bytes:
    return hashlib.sha256(f"{seed}\x00{key}".encode()).digest()


def repeated(examples: Iterable[Example]) -> int:
    """Rows whose prompt and answer stood in a row before."""
    seen: set[tuple[str, str]] = set()
    count = 0
    for example in examples:
        pair = (example.key, example.completion[0]["content"])
        count += pair in seen
        seen.add(pair)
    return count


def contradicting(examples: Iterable[Example]) -> int:
    """Different prompts that stand there with more than one answer."""
    answers: dict[str, set[str]] = {}
    for example in examples:
        answers.setdefault(example.key, set()).add(example.completion[0]["content"])
    return sum(len(found) > 1 for found in answers.values())


def overlap(train: Iterable[Example], held_out: Iterable[Example]) -> int:
    """Rows held out whose prompt is in the training rows too."""
    known = {example.key for example in train}
    return sum(example.key in known for example in held_out)
