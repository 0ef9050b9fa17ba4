"""Reads rows out of data files: JSONL, JSON, CSV and Parquet, the text formats also gzipped.

Streams all of them: what is held is a row and a block, never a file. Knows files and lines, nothing of tasks or
labels. Must import no machine-learning library; pyarrow is loaded only for Parquet.
"""

import csv
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

from tuneserve_pipeline.contract import FileFormat
from tuneserve_pipeline.files import (
    BOM,
    BROKEN_GZIP,
    ROW_LIMIT,
    DataFile,
    Problem,
    detect_format,
    encoding_text,
    open_binary,
    read_lines,
    too_long_text,
)
from tuneserve_pipeline.jsonlist import read_json_list

#: Rows of a Parquet file that are Python objects at a time.
_PARQUET_ROWS = 512


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One row as it stands in its file."""

    values: Mapping[str, Any]
    place: str
    """`claim reviews: train.jsonl:17`"""


def read_rows(file: DataFile) -> Iterator[Row | Problem]:
    """Rows of a file in their order; a `Problem` where there should be one, at most one for the file as a whole.

    Raises nothing for what a file may contain: every defect comes out as a `Problem`.
    """
    last: str | None = None
    try:
        for found in _read(file):
            last = found.place
            yield found
    except BROKEN_GZIP as error:
        where = f"behind {last}" if last else "before its first row"
        yield Problem(place=file.name, text=f"the gzip file is broken or cut off {where} ({error}): compress it again")
    except UnicodeDecodeError as error:
        yield Problem(place=file.name, text=encoding_text(error))
    except PermissionError:
        yield Problem(place=file.name, text="may not be read: make it readable for others (chmod a+r)")


def _read(file: DataFile) -> Iterator[Row | Problem]:
    kind = detect_format(file)
    if kind is FileFormat.PARQUET:
        yield from _read_parquet(file)
        return
    with open_binary(file.path) as stream:
        if kind is FileFormat.JSONL:
            yield from _read_jsonl(file, stream)
        elif kind is FileFormat.JSON:
            for place, value in read_json_list(stream, name=file.name):
                yield value if isinstance(value, Problem) else _row(value, place)
        else:
            yield from _read_csv(file, stream)


def _read_jsonl(file: DataFile, stream: BinaryIO) -> Iterator[Row | Problem]:
    for number, raw in read_lines(stream):
        place = f"{file.name}:{number}"
        if raw is None:
            yield Problem(place=place, text=too_long_text())
            continue
        try:
            text = (raw.removeprefix(BOM) if number == 1 else raw).decode("utf-8").strip()
        except UnicodeDecodeError as error:
            yield Problem(place=place, text=encoding_text(error))
            if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
                return  # UTF-16: every line would be reported.
            continue
        if not text:
            continue
        try:
            value = json.loads(text)
        except (ValueError, RecursionError) as error:
            yield Problem(place=place, text=f"not valid JSON ({_reason(error)}): each line must be one JSON object")
            continue
        yield _row(value, place)


def _reason(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} at column {error.colno}"
    return "too deep" if isinstance(error, RecursionError) else str(error)  # a number of thousands of digits


def _row(value: object, place: str) -> Row | Problem:
    if isinstance(value, dict):
        return Row(values=value, place=place)
    return Problem(place=place, text=f"a row must be a JSON object such as {{…}}, this is a {type(value).__name__}")


class _CsvLines:
    """Lines for the csv module; a row may have many of them in quotes, but not more bytes than `ROW_LIMIT`."""

    def __init__(self, stream: BinaryIO) -> None:
        self._lines = read_lines(stream)
        self._first: str | None = None
        self.number = 0
        self.row_size = 0

    def peek(self) -> str:
        """The header's line, which is read again."""
        self._first = next(self, "")
        return self._first

    def __iter__(self) -> "_CsvLines":
        return self

    def __next__(self) -> str:
        if self._first is not None:
            line, self._first = self._first, None
            return line
        self.number, raw = next(self._lines)
        self.row_size += ROW_LIMIT + 1 if raw is None else len(raw)
        if raw is None or self.row_size > ROW_LIMIT:
            raise csv.Error(too_long_text())
        return (raw.removeprefix(BOM) if self.number == 1 else raw).decode("utf-8")


def _read_csv(file: DataFile, stream: BinaryIO) -> Iterator[Row | Problem]:
    csv.field_size_limit(ROW_LIMIT)  # the module's default is 128 KiB, documents are longer
    lines = _CsvLines(stream)
    try:
        header_line = lines.peek()
        if not header_line.strip():
            return
        delimiter = max(",;\t", key=header_line.count)
        reader = csv.reader(lines, delimiter=delimiter, strict=True)
        header = [name.strip() for name in next(reader)]
        twice = sorted({name for name in header if header.count(name) > 1})
        if twice:
            yield Problem(
                place=f"{file.name}:1", text=f"the header names {', '.join(twice)} twice: name each column once"
            )
            return
        while True:
            number = reader.line_num + 1
            lines.row_size = 0
            values = next(reader, None)
            if values is None:
                return
            if not any(values):
                continue
            place = f"{file.name}:{number}"
            if len(values) != len(header):
                yield Problem(
                    place=place,
                    text=f"has {len(values)} fields, the header has {len(header)}: put values that hold "
                    f"{delimiter!r} or a line end in double quotes",
                )
                continue
            yield Row(values=dict(zip(header, values, strict=True)), place=place)
    except csv.Error as error:
        yield Problem(place=f"{file.name}:{lines.number}", text=f"not valid CSV ({error})")
    except UnicodeDecodeError as error:
        yield Problem(place=f"{file.name}:{lines.number}", text=encoding_text(error))


def _read_parquet(file: DataFile) -> Iterator[Row | Problem]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        # Read through a buffer: else a file of one row group is in memory as a whole.
        with pyarrow.parquet.ParquetFile(file.path, buffer_size=2**20, pre_buffer=False) as parquet:
            for batch in parquet.iter_batches(batch_size=_PARQUET_ROWS):
                for values in batch.to_pylist():
                    number += 1
                    yield Row(values=values, place=f"{file.name}: row {number}")
    except (pyarrow.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the disk's error, not the file's
        first = (str(error).splitlines() or ["unknown format"])[0]
        where = f" behind row {number}" if number else ""
        yield Problem(place=file.name, text=f"not a readable Parquet file{where} ({first})")


__all__ = ["DataFile", "Problem", "Row", "detect_format", "read_rows"]
