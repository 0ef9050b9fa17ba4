"""Rows of `prepare` as tokens, with the loss on the answer and the token that ends it, and on nothing else.

Rendered and tokenized by the code that `prepare` measured them with. Must import no torch.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from tuneserve_pipeline.errors import InvalidData
from tuneserve_pipeline.templates import Template, Tokenizer

#: Label of a token that the loss leaves out.
IGNORED = -100
_BATCH = 1000


@dataclass(frozen=True, kw_only=True)
class Row:
    prompt: tuple[int, ...]
    completion: tuple[int, ...]
    """The answer up to the token that ends the turn: what a template puts behind it is never generated."""

    @property
    def input_ids(self) -> list[int]:
        return [*self.prompt, *self.completion]

    @property
    def labels(self) -> list[int]:
        return [IGNORED] * len(self.prompt) + list(self.completion)


def read_rows(
    path: Path, *, template: Template, tokenizer: Tokenizer, limit: int | None = None, longest: int | None = None
) -> list[Row]:
    """The first `limit` rows of a file of `prepare`.

    Raises `InvalidData`, naming the row's source, when a prompt is not how prompt and answer together begin, when no
    end of turn follows the answer, or when a row has more than `longest` tokens.
    """
    rows: list[Row] = []
    with path.open(encoding="utf-8") as file:
        given = islice(_parse(file, path.name), limit)
        while batch := list(islice(given, _BATCH)):
            rows += _tokenize(batch, template=template, tokenizer=tokenizer)
            for entry, row in zip(batch, rows[-len(batch) :], strict=True):
                if longest is not None and len(row.input_ids) > longest:
                    raise _wrong(entry, f"has {len(row.input_ids)} tokens, more than the {longest} to train on")
    return rows


def _parse(lines: Iterator[str], name: str) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(lines, start=1):
        try:
            entry = json.loads(line)
            if not entry["prompt"] or not entry["completion"]:
                raise ValueError("prompt or completion is empty")
        except (ValueError, KeyError, TypeError) as error:
            raise InvalidData(
                reason="RowsDamaged",
                message=f"{name}:{number} of the prepared rows cannot be read ({error}). Make them again with the "
                "annotation tuneserve.dev/rebuild: prepare",
            ) from error
        yield {"source": f"{name}:{number}", **entry}


def _tokenize(batch: Sequence[dict[str, Any]], *, template: Template, tokenizer: Tokenizer) -> list[Row]:
    prompts = tokenizer.encode([template.render(entry["prompt"], prompt=True) for entry in batch])
    wholes = tokenizer.encode(
        [template.render([*entry["prompt"], *entry["completion"]], prompt=False) for entry in batch]
    )
    rows = []
    for entry, prompt, whole in zip(batch, prompts, wholes, strict=True):
        if whole[: len(prompt)] != prompt:
            raise _wrong(entry, "does not begin with the tokens of its prompt, so it cannot be told what to learn")
        ends = [place for place, token in enumerate(whole) if place >= len(prompt) and token in tokenizer.end_ids]
        if not ends:
            raise _wrong(entry, "has no end-of-turn token behind its answer, so the tuned model would never stop")
        rows.append(Row(prompt=tuple(prompt), completion=tuple(whole[len(prompt) : ends[-1] + 1])))
    return rows


def _wrong(entry: dict[str, Any], what: str) -> InvalidData:
    return InvalidData(
        reason="RowUnusable",
        message=f"{entry['source']}: the row {what}. Make the rows again with the annotation "
        "tuneserve.dev/rebuild: prepare",
    )
