"""Data files as bytes: opened, unpacked, told apart by format, and cut into lines of bounded length.

Must import no machine-learning library.
"""

import gzip
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO, cast

from tuneserve_pipeline.contract import FileFormat

#: Longest row of a text format (bytes). A million tokens are more than any model reads; a longer line is a broken file,
#: and must not take the memory of the pod with it.
ROW_LIMIT = 4 * 1024 * 1024
BOM = b"\xef\xbb\xbf"
#: What Python's reader raises for a gzip file that is cut off, or damaged at its start, in its middle, at its end.
BROKEN_GZIP = (EOFError, gzip.BadGzipFile, zlib.error)

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


@dataclass(frozen=True, kw_only=True)
class DataFile:
    """A file, and what its user calls it."""

    path: Path
    name: str
    """`claim reviews: train.jsonl`; a line number is put behind it."""
    format: FileFormat = FileFormat.AUTO
    source: int = 0
    """Which source of the spec it belongs to; one of a hub may have several files."""
    limit: int | None = None
    """Rows that are read of its source; none: all."""
    weight: float = 1.0
    """How often each of its training rows is learned from in an epoch."""


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


def detect_format(file: DataFile) -> FileFormat:
    """The format that is told, else by extension, else by the first bytes. `.json` often holds JSON lines."""
    if file.format is not FileFormat.AUTO:
        return file.format
    by_name = data_extension(file.name)
    if by_name is not None and by_name is not FileFormat.JSON:
        return by_name
    with open_binary(file.path) as stream:
        head = stream.read(4096)
    if head.startswith(_PARQUET_MAGIC):
        return FileFormat.PARQUET
    start = head.removeprefix(BOM).lstrip()[:1]
    if start == b"{":
        # One object over several lines can only be the start of a JSON file that is no list.
        first = head.removeprefix(BOM).lstrip().split(b"\n", 1)[0].rstrip()
        # A first line longer than the head is a long row: no one writes an object of many lines so.
        whole = first.endswith(b"}") or len(first) > 2048
        return FileFormat.JSONL if whole or by_name is None else FileFormat.JSON
    if start == b"[" or by_name is FileFormat.JSON:
        return FileFormat.JSON
    return FileFormat.CSV


@contextmanager
def open_binary(path: Path) -> Iterator[BinaryIO]:
    with path.open("rb") as plain:
        magic = plain.read(len(_GZIP_MAGIC))
        plain.seek(0)
        if magic == _GZIP_MAGIC:
            with gzip.GzipFile(fileobj=plain) as stream:
                yield cast(BinaryIO, stream)
        else:
            yield plain


def read_lines(stream: BinaryIO) -> Iterator[tuple[int, bytes | None]]:
    """Lines with their numbers, from 1; None for a line above `ROW_LIMIT`, which is passed over in pieces."""
    number = 0
    while line := stream.readline(ROW_LIMIT + 1):
        number += 1
        if len(line) <= ROW_LIMIT or line.endswith(b"\n"):
            yield number, line
            continue
        while (more := stream.readline(ROW_LIMIT)) and not more.endswith(b"\n"):
            pass
        yield number, None


def encoding_text(error: UnicodeDecodeError) -> str:
    wide = bytes(error.object[:2]) in (b"\xff\xfe", b"\xfe\xff")
    found = "it is UTF-16" if wide else f"byte 0x{error.object[error.start]:02x} at position {error.start + 1}"
    return f"not UTF-8 ({found}): save the file as UTF-8"


def too_long_text() -> str:
    return (
        f"a row of more than {ROW_LIMIT // 2**20} MiB: that is no row but a file without line ends, or quotes that do "
        "not close; write one row a line"
    )
