"""Turns the rows of a task into conversations: a prompt, and the completion to learn.

Pure: knows fields, columns and labels, no files and no tokens.
"""

import difflib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from tuneserve_pipeline.contract import ClassificationTask, InstructionTask, Task
from tuneserve_pipeline.errors import InvalidConfig
from tuneserve_pipeline.formats import Problem, Row
from tuneserve_pipeline.scores import normalise

Message = Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class Example:
    """One row as a conversation."""

    prompt: tuple[Message, ...]
    completion: tuple[Message, ...]
    source: str
    """File and line, as the user knows them."""
    label: str | None = None

    def to_json(self) -> dict[str, Any]:
        row: dict[str, Any] = {
            "prompt": [dict(message) for message in self.prompt],
            "completion": [dict(message) for message in self.completion],
        }
        if self.label is not None:
            row["label"] = self.label
        return {**row, "source": self.source}

    @property
    def key(self) -> str:
        """What makes two rows the same question."""
        return "\x1e".join(f"{message['role']}\x1f{message['content']}" for message in self.prompt)


def fields(task: Task) -> tuple[tuple[str, bool], ...]:
    """Fields of a task, and whether a row must have each."""
    if isinstance(task, ClassificationTask):
        return (("text", True), ("label", True))
    return (("instruction", True), ("input", False), ("output", True))


def check_task(task: Task, columns: Mapping[str, str]) -> None:
    """Raises `InvalidConfig` for what no data could make work."""
    known = [name for name, _ in fields(task)]
    unknown = sorted(set(columns) - set(known))
    if unknown:
        raise InvalidConfig(
            reason="UnknownColumn",
            message=f"spec.dataset.columns: {', '.join(unknown)} is no field of the task "
            f"{task.kind}, which has {', '.join(known)}; write <field>: <column of the file>",
        )
    if isinstance(task, ClassificationTask):
        _check_labels(task.labels)


def _check_labels(labels: tuple[str, ...]) -> None:
    seen: dict[str, str] = {}
    for label in labels:
        plain = normalise(label)
        if not plain or label != label.strip():
            raise InvalidConfig(
                reason="InvalidLabel",
                message=f"spec.task.classification.labels: {label!r} must be a word or phrase without spaces around it",
            )
        if plain in seen:
            raise InvalidConfig(
                reason="InvalidLabel",
                message=f"spec.task.classification.labels: {seen[plain]!r} and {label!r} differ in case or punctuation "
                "only, and an answer could not be told apart: give them different names",
            )
        seen[plain] = label


def convert(rows: Iterable[Row | Problem], *, task: Task, columns: Mapping[str, str]) -> Iterator[Example | Problem]:
    """Each row as an `Example`, or as the `Problem` that it has.

    A file whose first row lacks a column lacks it everywhere: that is one problem, and the end of the file.
    """
    names = {field: columns.get(field, field) for field, _ in fields(task)}
    build: Callable[[Mapping[str, str], str], Example | Problem]
    if isinstance(task, ClassificationTask):
        allowed, instruction = task.labels, task.instruction or default_instruction(task.labels)

        def build(values: Mapping[str, str], place: str) -> Example | Problem:
            return _classification(values, place, labels=allowed, instruction=instruction, column=names["label"])
    else:
        build = _instruction
    first = True
    for row in rows:
        if isinstance(row, Problem):
            yield row
            continue
        missing = [field for field, needed in fields(task) if needed and names[field] not in row.values]
        if missing:
            yield _missing(row, missing, names)
            if first:
                return
        else:
            values = _strings(row, task=task, names=names)
            yield values if isinstance(values, Problem) else build(values, row.place)
        first = False


def default_instruction(labels: tuple[str, ...]) -> str:
    return f"Classify the text. Answer with one of: {', '.join(labels)}."


def _missing(row: Row, missing: list[str], names: Mapping[str, str]) -> Problem:
    lacking = " and ".join(f"{names[field]!r}" for field in missing)
    there = ", ".join(map(str, row.values)) or "no field at all"
    return Problem(
        place=row.place,
        text=f"has no {lacking}, it has: {there}. Name the column in spec.dataset.columns ({missing[0]}: <column>)",
    )


def _strings(row: Row, *, task: Task, names: Mapping[str, str]) -> dict[str, str] | Problem:
    values: dict[str, str] = {}
    for field, needed in fields(task):
        column = names[field]
        value = row.values.get(column)
        if value is None and not needed:
            continue
        # Labels are often written as numbers; a text that is a number is a mistake in the columns.
        if field == "label" and isinstance(value, int) and not isinstance(value, bool):
            value = str(value)
        if not isinstance(value, str):
            found = "empty" if value is None else f"a {type(value).__name__}"
            return Problem(place=row.place, text=f"{column!r} is {found}: it must be a text")
        if needed and not value.strip():
            return Problem(place=row.place, text=f"{column!r} is empty: fill it in, or remove the row")
        values[field] = value
    return values


def _classification(
    values: Mapping[str, str], place: str, *, labels: tuple[str, ...], instruction: str, column: str
) -> Example | Problem:
    label = values["label"].strip()
    if label not in labels:
        folded = {normalise(known): known for known in labels}
        near = difflib.get_close_matches(normalise(label), folded, n=1)
        hint = f"; did you mean {folded[near[0]]!r}?" if near else ""
        return Problem(
            place=place, text=f"{column!r} is {label[:80]!r}, which is none of the labels ({', '.join(labels)}){hint}"
        )
    return Example(
        prompt=({"role": "user", "content": f"{instruction}\n\n{values['text'].strip()}"},),
        completion=({"role": "assistant", "content": label},),
        label=label,
        source=place,
    )


def _instruction(values: Mapping[str, str], place: str) -> Example:
    parts = [values["instruction"].strip(), values.get("input", "").strip()]
    return Example(
        prompt=({"role": "user", "content": "\n\n".join(part for part in parts if part)},),
        completion=({"role": "assistant", "content": values["output"].strip()},),
        source=place,
    )


__all__ = ["Example", "InstructionTask", "check_task", "convert", "default_instruction", "fields"]
