"""`report.json` of `prepare`: what the data looks like, and what is odd about it. Pure."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tuneserve_pipeline.splits import Keys, Side, contradicting, overlap, repeated
from tuneserve_pipeline.tokenized import Oddity, Tally

#: Upper bounds (tokens) of the length histogram.
_BOUNDS = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768)
#: A label of more tokens than this is easily got wrong by one of them.
_LABEL_TOKENS = 8
#: The most frequent label has more rows than this many times the rarest one: the model may learn to say it always.
_IMBALANCE = 10


@dataclass(frozen=True, kw_only=True)
class Kept:
    """The rows of one side, without repetitions by weight."""

    keys: Keys
    answers: Keys
    labels: NDArray[np.int16]


@dataclass(frozen=True, kw_only=True)
class LabelTokens:
    tokens: int
    unknown: bool
    """Whether the tokenizer has no token for a part of it."""


def build_report(
    *,
    tallies: Mapping[Side, Tally],
    kept: Mapping[Side, Kept],
    limits: Mapping[Side, int],
    labels: Mapping[str, LabelTokens],
    template: Mapping[str, str],
    sources: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """The report; lengths and `limits` are tokens of a row with its answer."""
    train = kept[Side.TRAIN]
    report: dict[str, Any] = {
        "rows": {name(side): tally.kept for side, tally in tallies.items()},
        "trainRowsByWeight": tallies[Side.TRAIN].written,
        "tooLong": {name(side): {**_odd(tally.too_long), "limit": limits[side]} for side, tally in tallies.items()},
        "tokens": {name(side): summarise(tally.lengths) for side, tally in tallies.items()},
        "learnedTokens": {name(side): tally.learned_tokens for side, tally in tallies.items()},
        "cutTexts": {name(side): _odd(tally.cut) for side, tally in tallies.items()},
        "endsInsideAnswers": {name(side): _odd(tally.ends_inside) for side, tally in tallies.items()},
        "lastAnswerOnly": {name(side): _odd(tally.last_only) for side, tally in tallies.items()},
        "turnsWithoutAnswer": {name(side): _odd(tally.trimmed) for side, tally in tallies.items()},
        "duplicates": repeated(train.keys, train.answers),
        "contradictions": contradicting(train.keys, train.answers),
        "overlap": {name(side): overlap(train.keys, kept[side].keys) for side in (Side.VALIDATION, Side.TEST)},
        "template": dict(template),
        "sources": list(sources),
    }
    if labels:
        report["labels"] = {
            name(side): dict(zip(labels, np.bincount(rows.labels, minlength=len(labels)).tolist(), strict=True))
            for side, rows in kept.items()
        }
        report["labelTokens"] = {label: found.tokens for label, found in labels.items()}
        report["unknownLabels"] = [label for label, found in labels.items() if found.unknown]
    report["warnings"] = warnings(report)
    return report


def name(side: Side) -> str:
    return side.name.lower()


def _odd(found: Oddity) -> dict[str, Any]:
    return {"rows": found.rows, "first": found.places} if found.rows else {"rows": 0}


def summarise(lengths: Sequence[int]) -> dict[str, Any]:
    """Spread of row lengths, in tokens."""
    if not len(lengths):
        return {"rows": 0, "total": 0}
    ordered = np.sort(np.asarray(lengths, dtype=np.int64))
    bounds = (0, *_BOUNDS, max(int(ordered[-1]), _BOUNDS[-1] + 1))
    places = np.searchsorted(ordered, bounds, side="right").tolist()
    return {
        "rows": len(ordered),
        "total": int(ordered.sum()),
        "shortest": int(ordered[0]),
        "median": int(ordered[len(ordered) // 2]),
        "percentile95": int(ordered[min(len(ordered) - 1, len(ordered) * 95 // 100)]),
        "longest": int(ordered[-1]),
        "histogram": [
            {"from": low + 1, "to": high, "rows": above - below}
            for (low, high), (below, above) in zip(pairwise(bounds), pairwise(places), strict=True)
            if above > below
        ],
    }


def warnings(report: Mapping[str, Any]) -> list[str]:
    """What does not stop the run, but what its owner wants to know."""
    found: list[str] = []
    for split, entry in report["tooLong"].items():
        if entry["rows"]:
            found.append(f"{entry['rows']} rows of {split} are longer than {entry['limit']} tokens and were left out")
    for key, text in (
        ("cutTexts", "texts of {split} are longer than a row and were cut into pieces"),
        ("endsInsideAnswers", "answers of {split} hold a token that ends generation: the model learns to stop there"),
        (
            "lastAnswerOnly",
            "conversations of {split} teach their last answer only: the template renders earlier ones otherwise when "
            "others follow",
        ),
        ("turnsWithoutAnswer", "conversations of {split} end with turns that nobody answers: those were cut off"),
    ):
        for split, entry in report[key].items():
            if entry["rows"]:
                found.append(f"{entry['rows']} {text.format(split=split)} (first: {entry['first'][0]})")
    if report["contradictions"]:
        found.append(f"{report['contradictions']} prompts of the training rows have more than one answer")
    if report["duplicates"]:
        found.append(f"{report['duplicates']} training rows stand there more than once")
    for split, count in report["overlap"].items():
        if count:
            found.append(f"{count} rows of {split} are in the training rows too: their score says little")
    if "labels" in report:
        found += _label_warnings(report)
    if report["template"]["source"] == "default":
        found.append("the base model has no chat template: a plain one is used for training and serving")
    return found


def brief(warnings: Sequence[str], *, length: int) -> str:
    """Warnings as one text of at most `length` characters, as many as fit."""
    text = "; ".join(warnings)
    return text if len(text) <= length else text[: length - 1] + "…"


def _label_warnings(report: Mapping[str, Any]) -> list[str]:
    found = []
    counts = report["labels"]["train"]
    absent = [label for label, count in counts.items() if not count]
    if absent:
        found.append(f"no training row has the label {', '.join(absent)}: the model will hardly answer it")
    present = {label: count for label, count in counts.items() if count}
    most, least = max(present, key=present.__getitem__), min(present, key=present.__getitem__)
    if present[most] > _IMBALANCE * present[least]:
        found.append(
            f"the label {most} has {present[most]} training rows and {least} has {present[least]}: the model may "
            "answer the frequent one always; give the rare one more rows, and gate on macroF1"
        )
    untested = [label for label, count in report["labels"]["test"].items() if not count]
    if untested:
        found.append(f"no test row has the label {', '.join(untested)}: no score tells how well it is answered")
    for label in report["unknownLabels"]:
        found.append(f"the tokenizer has no token for a part of the label {label}: rename it")
    for label, tokens in report["labelTokens"].items():
        if tokens > _LABEL_TOKENS:
            found.append(f"the label {label} takes {tokens} tokens: a short word is learned faster and answered sooner")
    return found
