"""Scores answers against what was expected. Pure; scikit-learn is loaded only where it counts."""

import re
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

#: Punctuation that can tell labels apart ("C#", "-1"), while all other around an answer says nothing.
_TELLING = frozenset("#%&@-")
#: Stands for an answer that is no label; never a label itself, those are not empty.
INVALID = ""


def normalise(answer: str) -> str:
    """An answer without case, without punctuation around it, and without runs of spaces."""
    folded = unicodedata.normalize("NFKC", answer).casefold()
    kept = [index for index, character in enumerate(folded) if not _is_frame(character)]
    return re.sub(r"\s+", " ", folded[kept[0] : kept[-1] + 1]) if kept else ""


def _is_frame(character: str) -> bool:
    """Whether a character may stand around an answer without being part of it: spaces, quotes, stops, Markdown."""
    if character in _TELLING:
        return False
    return character.isspace() or character in "`<>" or unicodedata.category(character).startswith("P")


def match_label(answer: str, labels: Sequence[str]) -> str | None:
    """The label that an answer is, or None; no guessing: "positive, I think" is no label."""
    stripped = answer.strip()
    if stripped in labels:
        return stripped
    return {normalise(label): label for label in labels}.get(normalise(answer))


@dataclass(frozen=True, kw_only=True)
class Scores:
    """`metrics` go into the outcome of a stage, `details` into its `metrics.json`."""

    metrics: Mapping[str, float]
    details: Mapping[str, object] = field(default_factory=dict)


def score_classification(*, expected: Sequence[str], answers: Sequence[str], labels: Sequence[str]) -> Scores:
    """Accuracy, macro F1 over the labels that occur in `expected`, and the share of answers that are no label."""
    from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

    found = [match_label(answer, labels) or INVALID for answer in answers]
    total = len(expected)
    present = [label for label in labels if label in set(expected)]
    precision, recall, f1, support = precision_recall_fscore_support(
        expected, found, labels=present, average=None, zero_division=0.0
    )
    matrix = confusion_matrix(expected, found, labels=[*labels, INVALID])
    return Scores(
        metrics={
            "accuracy": sum(want == have for want, have in zip(expected, found, strict=True)) / total,
            "macroF1": float(f1.mean()),
            "invalidRatio": found.count(INVALID) / total,
            "samples": float(total),
        },
        details={
            "labels": {
                label: {
                    "precision": float(precision[index]),
                    "recall": float(recall[index]),
                    "f1": float(f1[index]),
                    "support": int(support[index]),
                }
                for index, label in enumerate(present)
            },
            "confusion": {
                want: {have: int(matrix[row][column]) for column, have in enumerate(labels)}
                for row, want in enumerate(labels)
            },
            "invalid": {want: int(matrix[row][-1]) for row, want in enumerate(labels)},
        },
    )


def score_instruction(*, expected: Sequence[str], answers: Sequence[str]) -> Scores:
    """Share of answers that are the expected text, and the mean overlap of words (token F1)."""
    total = len(expected)
    pairs = [(normalise(want), normalise(have)) for want, have in zip(expected, answers, strict=True)]
    return Scores(
        metrics={
            "exactMatch": sum(want == have for want, have in pairs) / total,
            "tokenF1": sum(token_f1(want, have) for want, have in pairs) / total,
            "samples": float(total),
        }
    )


def token_f1(expected: str, answer: str) -> float:
    """Harmonic mean of the shares of words that are common; 1.0 if both are empty."""
    want, have = expected.split(), answer.split()
    if not want or not have:
        return float(want == have)
    common = sum((Counter(want) & Counter(have)).values())
    return 2 * common / (len(want) + len(have))
