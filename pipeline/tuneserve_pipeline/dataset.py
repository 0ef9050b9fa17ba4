"""The rows of a data set, one after another: read as often as needed, and never held.

The first reading (`survey`) finds all that is wrong with rows and keeps two numbers of each; from those follows where
it goes. The second one (`prepare`) tokenizes it.
"""

from array import array
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from tuneserve_pipeline import splits
from tuneserve_pipeline.contract import ClassificationTask, PrepareSpec
from tuneserve_pipeline.errors import InvalidData
from tuneserve_pipeline.examples import Example
from tuneserve_pipeline.files import DataFile, Problem
from tuneserve_pipeline.formats import read_rows
from tuneserve_pipeline.splits import Keys, Side
from tuneserve_pipeline.tasks import convert

Given = Mapping[str, Sequence[DataFile]]
"""`train`, `validation` and `test` -> the files that the spec names for it."""

#: A message names so many problems at most: enough to see the pattern, few enough for a termination message.
SHOWN_PROBLEMS = 20
#: Twenty of these, names of the stage around them, are less than a termination message.
_SHOWN_LENGTH = 170
#: So many are kept for the file beside the output.
KEPT_PROBLEMS = 1000


class Problems:
    """What is wrong with the data: the first problems, and how many there are."""

    def __init__(self) -> None:
        self.first: list[Problem] = []
        self.count = 0

    def add(self, problem: Problem) -> None:
        self.count += 1
        if len(self.first) < KEPT_PROBLEMS:
            self.first.append(problem)

    def describe(self, *, more: str = "") -> str:
        """One problem as it is; of several the first, one a line, and how many there are and where (`more`)."""
        if self.count == 1:
            return str(self.first[0])
        shown = self.first[:SHOWN_PROBLEMS]
        head = f"{self.count} problems in the data"
        head += f", the first {len(shown)}:" if len(shown) < self.count else ":"
        # Each line cut, so that a message holds all of them: the file has the whole.
        lines = [
            head,
            *(text if len(text := str(problem)) <= _SHOWN_LENGTH else f"{text[:_SHOWN_LENGTH]} …" for problem in shown),
        ]
        if len(shown) < self.count and more:
            lines.insert(1, f"(the first {len(self.first)} are in {more} on the artifacts claim)")
        return "\n".join(lines)

    def failure(self, *, more: str = "") -> InvalidData:
        return InvalidData(reason="InvalidRows" if self.count > 1 else "InvalidRow", message=self.describe(more=more))


@dataclass(kw_only=True)
class Rows:
    """What is kept of the rows of one `Given`, in their order."""

    keys: "array[int]" = field(default_factory=lambda: array("Q"))
    answers: "array[int]" = field(default_factory=lambda: array("Q"))
    files: "array[int]" = field(default_factory=lambda: array("H"))
    labels: "array[int]" = field(default_factory=lambda: array("h"))
    """Place among the task's labels; -1: the task has none."""

    def __len__(self) -> int:
        return len(self.keys)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Where each row goes, by the split that it was given for."""

    sides: Mapping[str, NDArray[np.uint8]]
    copies: Mapping[str, NDArray[np.uint16]]
    """How often it is learned from; 1 for what is held out."""


def read_examples(files: Sequence[DataFile], *, spec: PrepareSpec) -> Iterator[tuple[int, Example | Problem]]:
    """What each row of each file is, with the file's place in `files`."""
    read: Counter[int] = Counter()
    for number, file in enumerate(files):
        left = None if file.limit is None else file.limit - read[file.source]
        if left == 0:
            continue
        before = read[file.source]
        for found in convert(islice(read_rows(file), left), task=spec.task, columns=spec.columns):
            read[file.source] += 1
            yield number, found
        if read[file.source] == before:
            yield number, Problem(place=file.name, text="has no rows: fill it, or remove it from spec.dataset")


def survey(given: Given, *, spec: PrepareSpec, problems: Problems) -> dict[str, Rows]:
    """Read everything once; what is wrong is added to `problems`."""
    labels = spec.task.labels if isinstance(spec.task, ClassificationTask) else ()
    places = {label: place for place, label in enumerate(labels)}
    found: dict[str, Rows] = {}
    for name, files in given.items():
        rows = found[name] = Rows()
        for number, example in read_examples(files, spec=spec):
            if isinstance(example, Problem):
                problems.add(example)
            elif not problems.count:  # with a problem nothing follows but the search for others
                rows.keys.append(splits.prompt_key(example.key, seed=spec.split.seed))
                rows.answers.append(splits.answer_key(example.answer))
                rows.files.append(number)
                rows.labels.append(-1 if example.label is None else places[example.label])
    return found


def plan(given: Given, found: Mapping[str, Rows], *, spec: PrepareSpec) -> Plan:
    """Hold out what has no files of its own, and weigh what is trained on."""
    sides = {
        "train": splits.hold_out(
            keys_of(found["train"]), split=spec.split, validation=not spec.validation, test=not spec.test
        ),
        "validation": np.full(len(found["validation"]), Side.VALIDATION, dtype=np.uint8),
        "test": np.full(len(found["test"]), Side.TEST, dtype=np.uint8),
    }
    copies = {name: np.ones(len(rows), dtype=np.uint16) for name, rows in found.items()}
    weights = np.array([file.weight for file in given["train"]])
    if (weights != 1.0).any():
        rows = found["train"]
        weighed = splits.copies(keys_of(rows), answers_of(rows), weights[np.frombuffer(rows.files, dtype=np.uint16)])
        copies["train"] = np.where(sides["train"] == Side.TRAIN, weighed, 1).astype(np.uint16)
    return Plan(sides=sides, copies=copies)


def keys_of(rows: Rows) -> Keys:
    return np.frombuffer(rows.keys, dtype=np.uint64)


def answers_of(rows: Rows) -> Keys:
    return np.frombuffer(rows.answers, dtype=np.uint64)
