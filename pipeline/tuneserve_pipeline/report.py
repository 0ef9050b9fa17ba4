"""`report.json` of `prepare`: what the data looks like, and what is odd about it. Pure."""

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from tuneserve_pipeline.splits import Splits, contradicting, overlap, repeated

#: Upper bounds (tokens) of the length histogram.
_BOUNDS = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768)


def build_report(
    splits: Splits,
    *,
    lengths: Mapping[str, Sequence[int]],
    too_long: Mapping[str, int],
    limits: Mapping[str, int],
    labels: Sequence[str],
    template: Mapping[str, str],
    sources: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """The report; `lengths` and `limits` are tokens of a row with its answer, `too_long` rows that were left out."""
    report: dict[str, Any] = {
        "rows": {name: len(rows) for name, rows in splits.items().items()},
        "tooLong": {name: {"rows": too_long[name], "limit": limits[name]} for name in too_long},
        "tokens": {name: summarise(found) for name, found in lengths.items()},
        "duplicates": repeated(splits.train),
        "contradictions": contradicting(splits.train),
        "overlap": {
            "validation": overlap(splits.train, splits.validation),
            "test": overlap(splits.train, splits.test),
        },
        "template": dict(template),
        "sources": list(sources),
    }
    if labels:
        report["labels"] = {
            name: {label: counted[label] for label in labels}
            for name, rows in splits.items().items()
            for counted in [Counter(row.label for row in rows)]
        }
    report["warnings"] = warnings(report)
    return report


def summarise(lengths: Sequence[int]) -> dict[str, Any]:
    """Spread of row lengths, in tokens."""
    if not lengths:
        return {"rows": 0, "total": 0}
    ordered = sorted(lengths)
    return {
        "rows": len(ordered),
        "total": sum(ordered),
        "shortest": ordered[0],
        "median": ordered[len(ordered) // 2],
        "percentile95": ordered[min(len(ordered) - 1, len(ordered) * 95 // 100)],
        "longest": ordered[-1],
        "histogram": [
            {"from": low + 1, "to": high, "rows": count}
            for low, high in pairwise((0, *_BOUNDS, max(ordered[-1], _BOUNDS[-1] + 1)))
            if (count := sum(low < length <= high for length in ordered))
        ],
    }


def warnings(report: Mapping[str, Any]) -> list[str]:
    """What does not stop the run, but what its owner wants to know."""
    found: list[str] = []
    for name, entry in report["tooLong"].items():
        if entry["rows"]:
            found.append(f"{entry['rows']} rows of {name} are longer than {entry['limit']} tokens and were left out")
    if report["contradictions"]:
        found.append(f"{report['contradictions']} prompts of the training rows have more than one answer")
    if report["duplicates"]:
        found.append(f"{report['duplicates']} training rows stand there more than once")
    for name, count in report["overlap"].items():
        if count:
            found.append(f"{count} rows of {name} are in the training rows too: their score says little")
    absent = [label for label, count in report.get("labels", {}).get("train", {}).items() if not count]
    if absent:
        found.append(f"no training row has the label {', '.join(absent)}: the model will hardly answer it")
    if report["template"]["source"] == "default":
        found.append("the base model has no chat template: a plain one is used for training and serving")
    return found
