"""Holds out rows for validation and test, seeded, and finds what is in two places. Pure.

A row is known here by two numbers of 64 bits, for its prompt and for its answer, so that millions of rows are some
megabytes. Rows with the same prompt always go to the same side: else the test would ask what was learned by heart.
"""

import hashlib
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from tuneserve_pipeline.contract import Split

Keys = NDArray[np.uint64]

#: Fewest different prompts of which some can be held out.
SMALLEST = 3
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


class Side(IntEnum):
    TRAIN = 0
    VALIDATION = 1
    TEST = 2


def prompt_key(text: str, *, seed: int) -> int:
    """A prompt's number, and its rank in the order in which prompts are held out.

    Texts that differ in case and spaces alone are one prompt: a model that knows the one knows the other.
    """
    text = " ".join(text.casefold().split())
    return int.from_bytes(hashlib.sha256(f"{seed}\x00{text}".encode()).digest()[:8], "big")


def answer_key(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def hold_out(keys: Keys, *, split: Split, validation: bool, test: bool) -> NDArray[np.uint8]:
    """The `Side` of each row; `validation`, `test`: whether to hold rows out for each.

    A prompt's place follows from the seed and its text alone, so a row that is added moves few others. Each side gets
    its share of the different prompts, rounded, but at least one where there are three.
    """
    prompts = np.unique(keys)
    tested = _count(len(prompts), split.test if test else 0.0)
    validated = tested + _count(len(prompts), split.validation if validation else 0.0)
    places = np.searchsorted(prompts, keys)
    sides = np.full(len(keys), Side.TRAIN, dtype=np.uint8)
    sides[places < validated] = Side.VALIDATION
    sides[places < tested] = Side.TEST
    return sides


def _count(prompts: int, share: float) -> int:
    return max(1, round(prompts * share)) if share > 0 and prompts >= SMALLEST else 0


def copies(keys: Keys, answers: Keys, weights: NDArray[np.float64]) -> NDArray[np.uint16]:
    """How often each row is learned from, where `weights` are those of their sources: 2.5 is twice or three times.

    Which rows get the fraction follows from their content and the seed in the key, not from their place.
    """
    whole = np.floor(weights)
    # 53 bits are what a float holds.
    share = (_mix(keys ^ _mix(answers)) >> np.uint64(11)) / float(1 << 53)
    found: NDArray[np.uint16] = (whole + (share < weights - whole)).astype(np.uint16)
    return found


def repeated(keys: Keys, answers: Keys) -> int:
    """Rows whose prompt and answer stood in a row before."""
    return len(keys) - len(np.unique(_pairs(keys, answers)))


def contradicting(keys: Keys, answers: Keys) -> int:
    """Different prompts that stand there with more than one answer."""
    _, first = np.unique(_pairs(keys, answers), return_index=True)
    _, counts = np.unique(keys[first], return_counts=True)
    return int((counts > 1).sum())


def overlap(train: Keys, held_out: Keys) -> int:
    """Rows held out whose prompt is in the training rows too."""
    return int(np.isin(held_out, train).sum())


def _pairs(keys: Keys, answers: Keys) -> Keys:
    return keys ^ _mix(answers)


def _mix(values: Keys) -> Keys:
    """SplitMix64: each bit of the input changes half of those of the output."""
    values = values + _GOLDEN
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
