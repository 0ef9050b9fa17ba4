"""Reads rows out of data files: JSONL, JSON, CSV and Parquet, the text formats also gzipped.

Streams what can be streamed. Knows files and lines, nothing of tasks or labels. Must import no machine-learning
library; pyarrow is loaded only for Parquet.
"""

import csv
import gzip
import io
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, cast

from tuneserve_pipeline.contract import FileFormat

_EXTENSIONS = {
    ".jsonl": FileFormat.JSONL,
    ".ndjson": FileFormat.JSONL,
    ".json": FileFormat.JSON,
    ".csv": FileFormat.CSV,
    ".tsv": FileFormat.CSV,
    ".parquet": FileFormat.PARQUET,
}
_GZIP_MAGIC = b"\x1f\x8b"
_PARQUET_MAGIC = b"PAR1"
_BOM = b"\xef\xbb\xbf"
#: The csv module refuses fields above 128 KiB by default; documents are longer.
_FIELD_LIMIT = 16 * 1024 * 1024


@dataclass(frozen=True, kw_only=True)
class DataFile:
    """A file, and what its user calls it."""

    path: Path
    name: str
    """`claim reviews: train.jsonl`; a line number is put behind it."""
    format: FileFormat = FileFormat.AUTO


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row as it stands in its file."""

    values: Mapping[str, Any]
    place: str
    """`claim reviews: train.jsonl:17`"""


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Why a row or a file cannot be used: where, what, and what to do."""

    place: str
    text: str

    def __str__(self) -> str:
        return f"{self.place}: {self.text}"


def data_extension(name: str) -> FileFormat | None:
    """Format by the name of a file, `.gz` left aside; None if the name says nothing."""
    path = PurePosixPath(name.lower())
    if path.suffix == ".gz":
        path = path.with_suffix("")
    return _EXTENSIONS.get(path.suffix)


def read_rows(file: DataFile) -> Iterator[Row | Problem]:
    """Rows of a file in their order; a `Problem` where there should be one, at most one for the file as a whole.

    Raises nothing for what a file may contain: every defect comes out as a `Problem`.
    """
    try:
        kind = detect_format(file)
        if kind is FileFormat.PARQUET:
            yield from _read_parquet(file)
            return
        with _open_binary(file.path) as stream:
            if kind is FileFormat.JSONL:
                yield from _read_jsonl(file, stream)
            elif kind is FileFormat.JSON:
                yield from _read_json(file, stream)
            else:
                yield from _read_csv(file, stream)
    except (EOFError, gzip.BadGzipFile) as error:
        yield Problem(place=file.name, text=f"the gzip file is broken or cut off ({error}): compress it again")
    except UnicodeDecodeError as error:
        yield Problem(place=file.name, text=_encoding_text(error))
    except PermissionError:
        yield Problem(place=file.name, text="may not be read: make it readable for others (chmod a+r)")


def detect_format(file: DataFile) -> FileFormat:
    """The format that is told, else by extension, else by the first bytes. `.json` often holds JSON lines."""
    if file.format is not FileFormat.AUTO:
        return file.format
    by_name = data_extension(file.name)
    if by_name is not None and by_name is not FileFormat.JSON:
        return by_name
    with _open_binary(file.path) as stream:
        head = stream.read(4096)
    if head.startswith(_PARQUET_MAGIC):
        return FileFormat.PARQUET
    start = head.removeprefix(_BOM).lstrip()[:1]
    if start == b"{":
        # One object over several lines can only be the start of a JSON file that is no list.
        first = head.removeprefix(_BOM).lstrip().split(b"\n", 1)[0].rstrip()
        return FileFormat.JSONL if first.endswith(b"}") or by_name is None else FileFormat.JSON
    if start == b"[" or by_name is FileFormat.JSON:
        return FileFormat.JSON
    return FileFormat.CSV


@contextmanager
def _open_binary(path: Path) -> Iterator[BinaryIO]:
    with path.open("rb") as plain:
        magic = plain.read(len(_GZIP_MAGIC))
        plain.seek(0)
        if magic == _GZIP_MAGIC:
            with gzip.GzipFile(fileobj=plain) as stream:
                yield cast(BinaryIO, stream)
        else:
            yield plain


def _read_jsonl(file: DataFile, stream: BinaryIO) -> Iterator[Row | Problem]:
    for number, raw in enumerate(stream, start=1):
        place = f"{file.name}:{number}"
        try:
            text = (raw.removeprefix(_BOM) if number == 1 else raw).decode("utf-8").strip()
        except UnicodeDecodeError as error:
            yield Problem(place=place, text=_encoding_text(error))
            if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
                return  # UTF-16: every line would be reported.
            continue
        if not text:
            continue
        try:
            value = json.loads(text)
        except (json.JSONDecodeError, RecursionError) as error:
            what = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else "too deep"
            yield Problem(place=place, text=f"not valid JSON ({what}): each line must be one JSON object")
            continue
        yield _row(value, place)


def _read_json(file: DataFile, stream: BinaryIO) -> Iterator[Row | Problem]:
    text = stream.read().removeprefix(_BOM).decode("utf-8")
    if not text.strip():
        return
    try:
        values = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        line = f":{error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        what = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else "too deep"
        yield Problem(place=f"{file.name}{line}", text=f"not valid JSON ({what}): it must hold one list of objects")
        return
    if not isinstance(values, list):
        yield Problem(place=file.name, text="is no JSON list: write [{…}, {…}], or one object a line as .jsonl")
        return
    for number, value in enumerate(values, start=1):
        yield _row(value, f"{file.name}: row {number}")


def _row(value: object, place: str) -> Row | Problem:
    if isinstance(value, dict):
        return Row(values=value, place=place)
    return Problem(place=place, text=f"a row must be a JSON object such as {{…}}, this is a {type(value).__name__}")


def _read_csv(file: DataFile, stream: BinaryIO) -> Iterator[Row | Problem]:
    csv.field_size_limit(_FIELD_LIMIT)
    text = io.TextIOWrapper(stream, encoding="utf-8-sig", newline="")
    header_line = text.readline()
    if not header_line.strip():
        return
    delimiter = max(",;\t", key=header_line.count)
    # The header may go on over the line end inside quotes, so it is read as CSV together with the rest.
    reader = csv.reader(_chain(header_line, text), delimiter=delimiter, strict=True)
    try:
        header = [name.strip() for name in next(reader)]
        twice = sorted({name for name in header if header.count(name) > 1})
        if twice:
            yield Problem(
                place=f"{file.name}:1", text=f"the header names {', '.join(twice)} twice: name each column once"
            )
            return
        while True:
            number = reader.line_num + 1
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
        yield Problem(place=f"{file.name}:{reader.line_num}", text=f"not valid CSV ({error})")


def _chain(first: str, rest: Iterator[str]) -> Iterator[str]:
    yield first
    yield from rest


def _read_parquet(file: DataFile) -> Iterator[Row | Problem]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(file.path) as parquet:
            for batch in parquet.iter_batches():
                for values in batch.to_pylist():
                    number += 1
                    yield Row(values=values, place=f"{file.name}: row {number}")
    except pyarrow.ArrowException as error:
        first = (str(error).splitlines() or ["unknown format"])[0]
        yield Problem(place=file.name, text=f"not a readable Parquet file ({first})")


def _encoding_text(error: UnicodeDecodeError) -> str:
    wide = bytes(error.object[:2]) in (b"\xff\xfe", b"\xfe\xff")
    found = "it is UTF-16" if wide else f"byte 0x{error.object[error.start]:02x} at position {error.start + 1}"
    return f"not UTF-8 ({found}): save the file as UTF-8"
