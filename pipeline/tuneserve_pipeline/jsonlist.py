"""A JSON file that holds one list, read entry by entry: such files are as large as others, and memory is not."""

import codecs
import json
from collections.abc import Iterator
from typing import Any, BinaryIO

from tuneserve_pipeline.files import BOM, ROW_LIMIT, Problem, encoding_text, too_long_text

_BLOCK = 1 << 20
_SPACES = " \t\r\n"


def read_json_list(stream: BinaryIO, *, name: str) -> Iterator[tuple[str, Any]]:
    """Each entry with its place (`<name>: row 3`); a `Problem`, the last of all, where the file is no list."""
    window = _Window(stream)
    try:
        yield from _entries(window, name)
    except UnicodeDecodeError as error:
        place = f"{name}:{window.line_of_error(error)}"
        yield place, Problem(place=place, text=encoding_text(error))


def _entries(window: "_Window", name: str) -> Iterator[tuple[str, Any]]:
    first = window.peek()
    if not first:
        return
    if first != "[":
        yield name, Problem(place=name, text="is no JSON list: write [{…}, {…}], or one object a line as .jsonl")
        return
    window.skip()
    number = 0
    if window.peek() == "]":
        window.skip()
    else:
        while True:
            try:
                value = window.decode()
            except (ValueError, RecursionError) as error:
                yield name, _broken(window, error, name)
                return
            number += 1
            yield f"{name}: row {number}", value
            separator = window.peek()
            if separator not in (",", "]"):
                yield name, _wrong(window, "Expecting ',' delimiter", name)
                return
            window.skip()
            if separator == "]":
                break
            window.peek()
    if window.peek():
        yield name, _wrong(window, "Extra data", name)


def _wrong(window: "_Window", what: str, name: str) -> Problem:
    line, column = window.position(0)
    return _problem(f"{what} at column {column}", name=name, line=line)


def _broken(window: "_Window", error: Exception, name: str) -> Problem:
    if isinstance(error, json.JSONDecodeError):
        line, column = window.position(error.pos - window.start)
        if window.oversized:
            return Problem(place=f"{name}:{window.position(0)[0]}", text=too_long_text())
        return _problem(f"{error.msg} at column {column}", name=name, line=line)
    line, _ = window.position(0)
    return _problem("too deep" if isinstance(error, RecursionError) else str(error), name=name, line=line)


def _problem(what: str, *, name: str, line: int) -> Problem:
    return Problem(place=f"{name}:{line}", text=f"not valid JSON ({what}): it must hold one list of objects")


class _Window:
    """The part of the text that is looked at, and the line and column where it begins."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._json = json.JSONDecoder()
        self._text = ""
        self._line, self._column = 1, 1
        self._ended = False
        self._begun = False
        self.start = 0
        self.oversized = False
        """Whether an entry is longer than a row may be."""

    def peek(self) -> str:
        """The next character that is no space, which the window then begins with; empty at the end of the file."""
        while True:
            while self.start < len(self._text) and self._text[self.start] in _SPACES:
                self.start += 1
            if self.start < len(self._text):
                return self._text[self.start]
            if self._ended:
                return ""
            self._more()

    def skip(self) -> None:
        self.start += 1

    def decode(self) -> Any:
        """The value that the window begins with; reads on while it may be cut off."""
        while True:
            try:
                value, end = self._json.raw_decode(self._text, self.start)
            except (json.JSONDecodeError, RecursionError):
                if self._ended:
                    raise
                if len(self._text) - self.start > ROW_LIMIT:
                    self.oversized = True
                    raise
            else:
                # A number at the very end of the window may go on behind it.
                if end < len(self._text) or self._ended:
                    self.start = end
                    return value
            self._more()

    def position(self, offset: int) -> tuple[int, int]:
        """Line and column, from 1, of the character so far behind the start."""
        before = self._text[: self.start + offset]
        lines = before.count("\n")
        column = len(before) - before.rfind("\n") if lines else self._column + len(before)
        return self._line + lines, column

    def line_of_error(self, error: UnicodeDecodeError) -> int:
        return self._line + self._text.count("\n") + bytes(error.object[: error.start]).count(b"\n")

    def _more(self) -> None:
        """Drop what is behind us, and double what lies ahead, so that a long entry is parsed few times."""
        self._line, self._column = self.position(0)
        self._text, self.start = self._text[self.start :], 0
        block = self._stream.read(max(_BLOCK, len(self._text)))
        if not self._begun:
            block, self._begun = block.removeprefix(BOM), True
        self._ended = not block
        self._text += self._decoder.decode(block, final=self._ended)
