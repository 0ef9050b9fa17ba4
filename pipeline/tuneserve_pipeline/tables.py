"""The files in which `prepare` leaves tokens for the stages after it: Parquet, in groups of rows.

One pair of rows and columns for answers and texts (`input_ids`, `loss_spans`), one for preferences (`prompt_ids`,
`chosen_ids`, `rejected_ids`); `source` says where a row came from.
"""

from array import array
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

TRAIN_FILE = "train.parquet"
VALIDATION_FILE = "validation.parquet"

ANSWER_COLUMNS = ("input_ids", "loss_spans")
PREFERENCE_COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids")

GROUP_ROWS = 10_000
#: A group is closed earlier when its rows are long, so that what is held stays small.
_GROUP_TOKENS = 4_000_000


class TableWriter:
    """Writes rows of lists of numbers, one list a column."""

    def __init__(self, path: Path, *, columns: Sequence[str]) -> None:
        # The items' name is that of Parquet's own schema: readers in other languages look for it.
        kind = pa.list_(pa.field("element", pa.int32(), nullable=False))
        self._columns = tuple(columns)
        self._schema = pa.schema([*((name, kind) for name in columns), ("source", pa.string())])
        self._writer = pq.ParquetWriter(
            path, self._schema, compression="zstd", use_dictionary=False, write_statistics=False
        )
        self._clear()

    def _clear(self) -> None:
        self._values = [array("i") for _ in self._columns]
        self._offsets = [array("i", [0]) for _ in self._columns]
        self._sources: list[str] = []

    def add(self, row: Sequence[Sequence[int]], *, source: str) -> None:
        for place, values in enumerate(row):
            self._values[place].extend(values)
            self._offsets[place].append(len(self._values[place]))
        self._sources.append(source)
        if len(self._sources) >= GROUP_ROWS or len(self._values[0]) >= _GROUP_TOKENS:
            self._flush()

    def _flush(self) -> None:
        if not self._sources:
            return
        kind = self._schema.field(0).type
        arrays: list[pa.Array] = [
            # Through numpy: Arrow reads other buffers number by number.
            pa.ListArray.from_arrays(
                pa.array(np.frombuffer(offsets, np.int32)), pa.array(np.frombuffer(values, np.int32)), type=kind
            )
            for values, offsets in zip(self._values, self._offsets, strict=True)
        ]
        self._writer.write_table(pa.Table.from_arrays([*arrays, pa.array(self._sources)], schema=self._schema))
        self._clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self._flush()
        self._writer.close()
