"""The second reading of the data: every row rendered, tokenized, proved, and put where it belongs.

Rendering holds Python's lock and tokenizing does not, so one batch is rendered while the one before it is tokenized.
"""

import json
from array import array
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np

from tuneserve_pipeline.contract import PreferenceTask, PrepareSpec, TextTask
from tuneserve_pipeline.dataset import Given, Plan, read_examples
from tuneserve_pipeline.encoding import Encoded, Encoder
from tuneserve_pipeline.errors import Unavailable
from tuneserve_pipeline.examples import Example
from tuneserve_pipeline.files import Problem
from tuneserve_pipeline.splits import Side, prompt_key
from tuneserve_pipeline.tables import ANSWER_COLUMNS, PREFERENCE_COLUMNS, TRAIN_FILE, VALIDATION_FILE, TableWriter

TEST_FILE = "test.jsonl"
FILES = {Side.TRAIN: TRAIN_FILE, Side.VALIDATION: VALIDATION_FILE, Side.TEST: TEST_FILE}

_BATCH_ROWS = 1000
_BATCH_CHARACTERS = 1_000_000
_IN_FLIGHT = 2
#: So many places of odd rows are named in the report.
_NAMED = 5


@dataclass(kw_only=True)
class Oddity:
    """Rows of one kind that are worth a look."""

    rows: int = 0
    places: list[str] = field(default_factory=list)

    def add(self, place: str) -> None:
        self.rows += 1
        if len(self.places) < _NAMED:
            self.places.append(place)


@dataclass(kw_only=True)
class Tally:
    """What was found out of the rows of one side."""

    lengths: "array[int]" = field(default_factory=lambda: array("i"))
    """Tokens of each row that was kept; of a text that was cut, of each piece."""
    kept: int = 0
    written: int = 0
    """Rows in the file: those kept as often as their source weighs."""
    learned_tokens: int = 0
    too_long: Oddity = field(default_factory=Oddity)
    cut: Oddity = field(default_factory=Oddity)
    """Texts of more than one piece."""
    ends_inside: Oddity = field(default_factory=Oddity)
    last_only: Oddity = field(default_factory=Oddity)
    trimmed: Oddity = field(default_factory=Oddity)


@dataclass(kw_only=True)
class Tokenized:
    tallies: dict[Side, Tally]
    kept: dict[str, np.ndarray[tuple[int], np.dtype[np.bool_]]]
    """By the split that rows were given for: which of them are in an output."""
    sources: dict[str, list[int]]
    """By that split: how many rows each file gave to the outputs, as often as it weighs."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Item:
    example: Example
    given: str
    row: int
    file: int
    side: Side
    copies: int


def tokenize(
    given: Given,
    *,
    plan: Plan,
    spec: PrepareSpec,
    encoder: Encoder,
    limits: Mapping[Side, int],
    directory: Path,
    report: Callable[[float], None],
) -> Tokenized:
    """Write all rows to `directory`; `limits`: tokens that a row of each side may have.

    `report` is told the share of rows that are done. Raises `Unavailable` if files are not what they were at first.
    """
    found = Tokenized(
        tallies={side: Tally() for side in Side},
        kept={name: np.zeros(len(sides), dtype=np.bool_) for name, sides in plan.sides.items()},
        sources={name: [0] * len(files) for name, files in given.items()},
    )
    total = sum(map(len, plan.sides.values())) or 1
    with _Output(directory, spec=spec, limits=limits) as output:
        for items, rows in _encode(_batches(given, plan=plan, spec=spec), encoder=encoder, limits=limits):
            for item, encoded in zip(items, rows, strict=True):
                if output.add(item, encoded, found.tallies[item.side]):
                    found.kept[item.given][item.row] = True
                    found.sources[item.given][item.file] += item.copies
            last = items[-1]
            before = sum(len(plan.sides[name]) for name in list(plan.sides)[: list(plan.sides).index(last.given)])
            report((before + last.row + 1) / total)
    return found


def _batches(given: Given, *, plan: Plan, spec: PrepareSpec) -> Iterator[list[_Item]]:
    batch: list[_Item] = []
    size = 0
    for item in _items(given, plan=plan, spec=spec):
        batch.append(item)
        size += _size(item.example)
        if len(batch) == _BATCH_ROWS or size > _BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _items(given: Given, *, plan: Plan, spec: PrepareSpec) -> Iterator[_Item]:
    for name, files in given.items():
        sides, copies = plan.sides[name].tolist(), plan.copies[name].tolist()
        row = -1
        for file, example in read_examples(files, spec=spec):
            row += 1
            if isinstance(example, Problem) or row == len(sides):
                raise _changed(files[file].name)
            if copies[row]:
                yield _Item(example=example, given=name, row=row, file=file, side=Side(sides[row]), copies=copies[row])
        if row + 1 != len(sides):
            raise _changed(files[-1].name)


def _changed(name: str) -> Unavailable:
    return Unavailable(reason="DatasetChanged", message=f"{name}: changed while it was read; the stage runs again")


def _size(example: Example) -> int:
    if example.text is not None:
        return len(example.text)
    messages = (*example.prompt, *example.completion, *example.rejected)
    # Each earlier answer is rendered with all that stands before it.
    return (1 + len(example.earlier)) * sum([len(message["content"]) for message in messages])


def _encode(
    batches: Iterator[list[_Item]], *, encoder: Encoder, limits: Mapping[Side, int]
) -> Iterator[tuple[list[_Item], list[Encoded]]]:
    waiting: deque[tuple[list[_Item], Future[list[Encoded]]]] = deque()
    with ThreadPoolExecutor(max_workers=1) as worker:
        for items in batches:
            rendered = encoder.render([item.example for item in items], limits=[limits[item.side] for item in items])
            waiting.append((items, worker.submit(encoder.tokenize, rendered)))
            if len(waiting) > _IN_FLIGHT:
                done, future = waiting.popleft()
                yield done, future.result()
        for done, future in waiting:
            yield done, future.result()


class _Output:
    """The files of the three sides."""

    def __init__(self, directory: Path, *, spec: PrepareSpec, limits: Mapping[Side, int]) -> None:
        self._directory = directory
        self._limits = limits
        self._texts = isinstance(spec.task, TextTask)
        self._columns = PREFERENCE_COLUMNS if isinstance(spec.task, PreferenceTask) else ANSWER_COLUMNS
        self._seed = spec.split.seed
        self._ranks: list[tuple[int, int]] = []
        self._stack = ExitStack()
        self._tables: dict[Side, TableWriter] = {}

    def __enter__(self) -> "_Output":
        self._test: BinaryIO = self._stack.enter_context((self._directory / TEST_FILE).open("wb"))
        for side in (Side.TRAIN, Side.VALIDATION):
            self._tables[side] = self._stack.enter_context(
                TableWriter(self._directory / FILES[side], columns=self._columns)
            )
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.__exit__(*error)  # type: ignore[arg-type]
        if error[0] is None:
            shuffle(self._directory / TEST_FILE, ranks=self._ranks)

    def add(self, item: _Item, encoded: Encoded, tally: Tally) -> bool:
        """Whether the row is kept, rather than left out because it is too long."""
        limit, example = self._limits[item.side], item.example
        pieces = list(cut(encoded.ids, limit)) if self._texts else [encoded.ids]
        if not self._texts and (not encoded.ids or encoded.length > limit):
            tally.too_long.add(example.source)
            return False
        tally.kept += 1
        tally.written += item.copies
        tally.lengths.extend(map(len, pieces) if self._texts else (encoded.length,))
        tally.learned_tokens += sum(encoded.spans[1::2]) - sum(encoded.spans[::2]) + len(encoded.rejected)
        for oddity, odd in (
            (tally.cut, len(pieces) > 1),
            (tally.ends_inside, encoded.ends_inside),
            (tally.last_only, encoded.last_only),
            (tally.trimmed, example.trimmed),
        ):
            if odd:
                oddity.add(example.source)
        if item.side is Side.TEST:
            self._ranks.append((prompt_key(example.key, seed=self._seed), self._test.tell()))
            self._test.write(json.dumps(example.to_json(), ensure_ascii=False).encode() + b"\n")
            return True
        table = self._tables[item.side]
        for _ in range(item.copies):
            for row in self._rows(encoded, pieces):
                table.add(row, source=example.source)
        return True

    def _rows(self, encoded: Encoded, pieces: Sequence[list[int]]) -> list[tuple[Sequence[int], ...]]:
        if self._texts:
            # Nothing stands before a single token that it could be learned from.
            return [(piece, (0, len(piece))) for piece in pieces if len(piece) > 1]
        if encoded.rejected:
            start = encoded.spans[-2]
            return [(encoded.ids[:start], encoded.ids[start:], encoded.rejected)]
        return [(encoded.ids, encoded.spans)]


def shuffle(path: Path, *, ranks: Sequence[tuple[int, int]]) -> None:
    """Put lines in the order of their ranks; `ranks`: of each line its rank and where it begins.

    An evaluation of the first rows must not be one of the first label, or the easiest source.
    """
    partial = path.with_name(path.name + ".partial")
    with path.open("rb") as source, partial.open("wb") as target:
        for _, place in sorted(ranks):
            source.seek(place)
            target.write(source.readline())
    partial.rename(path)


def cut(ids: list[int], limit: int) -> Iterator[list[int]]:
    """A text in pieces of at most `limit` tokens, as equal as can be: a rest of three tokens would teach nothing."""
    count = -(-len(ids) // limit)
    for piece in range(count):
        yield ids[piece * len(ids) // count : (piece + 1) * len(ids) // count]
