"""Rows that `prepare` has tokenized, with the loss on the answers and the tokens that end them, and on nothing else.

Held as two flat arrays of numbers: a million rows are there in a second, and none is a Python object before it is
asked for. Must import no torch.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, overload

import numpy as np
from numpy.typing import NDArray

from tuneserve_pipeline.errors import InvalidData
from tuneserve_pipeline.tables import ANSWER_COLUMNS, PREFERENCE_COLUMNS

if TYPE_CHECKING:
    import pyarrow as pa

#: Label of a token that the loss leaves out.
IGNORED = -100


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    input_ids: list[int]
    labels: list[int]


@dataclass(frozen=True, kw_only=True, slots=True)
class Preference:
    """A prompt and two answers to it, each up to the token that ends it."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]


@dataclass(frozen=True, kw_only=True)
class Lists:
    """A column of lists: all their numbers one after another, and where each list begins."""

    values: NDArray[np.int32]
    offsets: NDArray[np.int64]

    def __getitem__(self, place: int) -> NDArray[np.int32]:
        found: NDArray[np.int32] = self.values[self.offsets[place] : self.offsets[place + 1]]
        return found


class Rows(Sequence[Row]):
    """Rows with answers or texts, in the order of the file."""

    def __init__(self, ids: Lists, spans: Lists) -> None:
        self._ids = ids
        self._spans = spans
        self.lengths: NDArray[np.int64] = np.diff(ids.offsets)
        """Tokens of each row."""

    def __len__(self) -> int:
        return len(self.lengths)

    @overload
    def __getitem__(self, place: int) -> Row: ...
    @overload
    def __getitem__(self, place: slice) -> list[Row]: ...
    def __getitem__(self, place: int | slice) -> Row | list[Row]:
        if isinstance(place, slice):
            return [self[number] for number in range(*place.indices(len(self)))]
        number = range(len(self))[place]
        ids = self._ids[number]
        labels = np.full(len(ids), IGNORED, dtype=np.int32)
        for start, end in self._spans[number].reshape(-1, 2):
            labels[start:end] = ids[start:end]
        return Row(input_ids=ids.tolist(), labels=labels.tolist())

    def __iter__(self) -> Iterator[Row]:
        return (self[number] for number in range(len(self)))

    def labels(self) -> NDArray[np.int32]:
        """The labels of all rows, one after another."""
        pairs = self._spans.values.reshape(-1, 2).astype(np.int64)
        pairs += np.repeat(self._ids.offsets[:-1], np.diff(self._spans.offsets) // 2)[:, None]
        learned = np.zeros(len(self._ids.values) + 1, dtype=np.int8)
        np.add.at(learned, pairs[:, 0], 1)
        np.add.at(learned, pairs[:, 1], -1)
        learned = np.cumsum(learned, dtype=np.int8)[:-1]
        return np.where(learned > 0, self._ids.values, np.int32(IGNORED))

    def arrays(self) -> list[tuple[NDArray[np.int32], NDArray[np.int32]]]:
        """Tokens and labels of each row, as views of two flat arrays."""
        labels, bounds = self.labels(), self._ids.offsets.tolist()
        return [(self._ids.values[start:end], labels[start:end]) for start, end in pairwise(bounds)]

    def to_arrow(self) -> "pa.Table":
        """`input_ids` and `labels`, without a copy of the tokens."""
        import pyarrow as pa

        offsets = pa.array(self._ids.offsets)
        return pa.table(
            {
                "input_ids": pa.LargeListArray.from_arrays(offsets, pa.array(self._ids.values)),
                "labels": pa.LargeListArray.from_arrays(offsets, pa.array(self.labels())),
            }
        )


class Preferences(Sequence[Preference]):
    """Pairs of answers, in the order of the file."""

    def __init__(self, prompts: Lists, chosen: Lists, rejected: Lists) -> None:
        self._columns = prompts, chosen, rejected
        answers = np.maximum(np.diff(chosen.offsets), np.diff(rejected.offsets))
        self.lengths: NDArray[np.int64] = np.diff(prompts.offsets) + answers
        """Tokens of each prompt with the longer of its answers."""

    def __len__(self) -> int:
        return len(self.lengths)

    @overload
    def __getitem__(self, place: int) -> Preference: ...
    @overload
    def __getitem__(self, place: slice) -> list[Preference]: ...
    def __getitem__(self, place: int | slice) -> Preference | list[Preference]:
        if isinstance(place, slice):
            return [self[number] for number in range(*place.indices(len(self)))]
        number = range(len(self))[place]
        prompt, chosen, rejected = (column[number].tolist() for column in self._columns)
        return Preference(prompt=prompt, chosen=chosen, rejected=rejected)

    def __iter__(self) -> Iterator[Preference]:
        return (self[number] for number in range(len(self)))


def read_rows(path: Path, *, limit: int | None = None, longest: int | None = None) -> Rows:
    """Rows of a file of `prepare`; of preferences the prompt with the answer that was chosen.

    `limit`: so many rows at most, evenly spread over the file, which may be sorted by whatever its user likes.
    Raises `InvalidData` when the file is not there or not whole, or when a row has more than `longest` tokens.
    """
    names = _columns_of(path)
    if names == PREFERENCE_COLUMNS:
        prompts, chosen = _read(path, names[:2], limit)
        ids = _joined(prompts, chosen)
        counts = np.diff(prompts.offsets), np.diff(ids.offsets)
        spans = Lists(
            values=np.stack(counts, axis=1).astype(np.int32).ravel(),
            offsets=np.arange(len(prompts.offsets), dtype=np.int64) * 2,
        )
    else:
        ids, spans = _read(path, names, limit)
    rows = Rows(ids, spans)
    _check_lengths(rows.lengths, longest=longest, path=path)
    return rows


def read_preferences(path: Path, *, limit: int | None = None, longest: int | None = None) -> Preferences:
    """Pairs of a file of `prepare`; `limit` and what is raised are as with `read_rows`."""
    names = _columns_of(path)
    if names != PREFERENCE_COLUMNS:
        raise InvalidData(
            reason="RowsUnsuitable",
            message=f"{path.name}: the rows have no rejected answers; set spec.task.preference, or another objective",
        )
    rows = Preferences(*_read(path, names, limit))
    _check_lengths(rows.lengths, longest=longest, path=path)
    return rows


def _columns_of(path: Path) -> tuple[str, ...]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        found = set(pq.read_schema(path).names)
    except (OSError, pa.ArrowException) as error:
        raise _damaged(path, error) from error
    for names in (ANSWER_COLUMNS, PREFERENCE_COLUMNS):
        if found.issuperset(names):
            return names
    raise _damaged(path, f"its columns are {', '.join(sorted(found))}")


def _read(path: Path, names: Sequence[str], limit: int | None) -> list[Lists]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    values: list[list[NDArray[np.int32]]] = [[] for _ in names]
    counts: list[list[NDArray[np.int64]]] = [[] for _ in names]
    try:
        with pq.ParquetFile(path) as file:
            total, rows = file.metadata.num_rows, 0
            for group in range(file.num_row_groups):
                table = file.read_row_group(group, columns=list(names))
                first, rows = rows, rows + len(table)
                if limit is not None and limit < total:
                    chosen = np.arange(limit, dtype=np.int64) * total // limit
                    table = table.take(chosen[(chosen >= first) & (chosen < rows)] - first)
                for place, name in enumerate(names):
                    for chunk in table[name].chunks:
                        values[place].append(chunk.flatten().to_numpy())
                        counts[place].append(chunk.value_lengths().to_numpy().astype(np.int64))
    except (OSError, pa.ArrowException) as error:
        raise _damaged(path, error) from error
    found = []
    for place in range(len(names)):
        lengths = np.concatenate([np.zeros(1, dtype=np.int64), *counts[place]])
        flat = np.concatenate(values[place]) if values[place] else np.empty(0, dtype=np.int32)
        values[place] = []
        found.append(Lists(values=flat, offsets=np.cumsum(lengths)))
    return found


def _joined(first: Lists, second: Lists) -> Lists:
    """Each list of `first` with that of `second` behind it."""
    parts = [part for place in range(len(first.offsets) - 1) for part in (first[place], second[place])]
    values = np.concatenate(parts) if parts else np.empty(0, dtype=np.int32)
    return Lists(values=values, offsets=first.offsets + second.offsets)


def _check_lengths(lengths: NDArray[np.int64], *, longest: int | None, path: Path) -> None:
    if longest is None or not len(lengths) or lengths.max() <= longest:
        return
    place = int(np.argmax(lengths > longest))
    raise InvalidData(
        reason="RowUnusable",
        message=f"{path.name}: row {place + 1} has {lengths[place]} tokens, more than the {longest} to train on. Make "
        "the rows again with the annotation tuneserve.dev/rebuild: prepare",
    )


def _damaged(path: Path, why: object) -> InvalidData:
    first = (str(why).splitlines() or ["unknown format"])[0]
    return InvalidData(
        reason="RowsDamaged",
        message=f"{path.name} of the prepared rows cannot be read ({first}). Make them again with the annotation "
        "tuneserve.dev/rebuild: prepare",
    )
