"""Turns the rows of a task into examples. Pure: knows fields, columns and labels, no files and no tokens.

A file tells by the fields of its first row in which of the common forms it is written.
"""

import difflib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from tuneserve_pipeline.chats import Chat, RowError, checked_text, is_messages, parse_chat, parse_message
from tuneserve_pipeline.contract import ClassificationTask, PreferenceTask, Task, TextTask
from tuneserve_pipeline.errors import InvalidConfig
from tuneserve_pipeline.examples import Example, Message
from tuneserve_pipeline.files import Problem
from tuneserve_pipeline.formats import Row
from tuneserve_pipeline.scores import normalise

Values = Mapping[str, Any]
Build = Callable[[Values, str], Example]

#: Fields of a task, and whether a row must have each.
_FIELDS: Mapping[str, tuple[tuple[str, bool], ...]] = {
    "classification": (("text", True), ("label", True)),
    "instruction": (("instruction", True), ("input", False), ("output", True)),
    "completion": (("prompt", True), ("completion", True)),
    "conversation": (("messages", True),),
    "text": (("text", True),),
    "preference": (("prompt", False), ("chosen", True), ("rejected", True)),
}
#: Forms that mean the same to a model that answers: a file may be in any of them, whatever the task calls itself.
_ANSWERS = ("conversation", "instruction", "completion")


def fields(task: Task) -> tuple[tuple[str, bool], ...]:
    """Fields of a task, and whether a row must have each."""
    return _FIELDS[task.kind]


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
        label_map(task)


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


def label_map(task: ClassificationTask) -> dict[str, str]:
    """What may stand in the data -> its label; raises `InvalidConfig` if a value stands for two."""
    found = {label: label for label in task.labels}
    for label, values in task.label_values.items():
        if label not in task.labels:
            raise InvalidConfig(
                reason="InvalidLabel",
                message=f"spec.task.classification.labelValues: {label!r} is none of the labels "
                f"({', '.join(task.labels)})",
            )
        for value in map(str.strip, values):
            if found.setdefault(value, label) != label:
                raise InvalidConfig(
                    reason="InvalidLabel",
                    message=f"spec.task.classification.labelValues: {value!r} stands for {found[value]!r} and for "
                    f"{label!r}: name it once",
                )
    return found


def convert(rows: Iterable[Row | Problem], *, task: Task, columns: Mapping[str, str]) -> Iterator[Example | Problem]:
    """Each row of a file as an `Example`, or as the `Problem` that it has.

    A file whose first row lacks a column lacks it everywhere: that is one problem, and the end of the file.
    """
    names: Mapping[str, str] = {}
    needed: tuple[str, ...] = ()
    build: Build | None = None
    first = ""
    for row in rows:
        if isinstance(row, Problem):
            yield row
            continue
        if build is None:
            kind, names = _form(row.values, task=task, columns=columns)
            needed = tuple(field for field, must in _FIELDS[kind] if must)
            first = row.place
            if any(names[field] not in row.values for field in needed):
                yield _missing(row, needed=needed, names=names, first=None)
                return
            build = _builder(kind, task=task, names=names)
        if any(names[field] not in row.values for field in needed):
            yield _missing(row, needed=needed, names=names, first=first)
            continue
        try:
            yield build(row.values, row.place)
        except RowError as error:
            yield Problem(place=row.place, text=str(error))


def default_instruction(labels: tuple[str, ...]) -> str:
    return f"Classify the text. Answer with one of: {', '.join(labels)}."


def _form(values: Values, *, task: Task, columns: Mapping[str, str]) -> tuple[str, Mapping[str, str]]:
    """In which form a row is written, and the column of each field: the task's own form if it can be."""
    kinds = [task.kind, *(kind for kind in _ANSWERS if task.kind in _ANSWERS and kind != task.kind)]
    for kind in kinds:
        given = columns if kind == task.kind else {}
        names = {field: given.get(field, field) for field, _ in _FIELDS[kind]}
        if kind == "conversation" and names["messages"] not in values and "conversations" in values:
            names["messages"] = "conversations"
        if all(names[field] in values for field, must in _FIELDS[kind] if must):
            return kind, names
    return task.kind, {field: columns.get(field, field) for field, _ in fields(task)}


def _missing(row: Row, *, needed: Sequence[str], names: Mapping[str, str], first: str | None) -> Problem:
    missing = [field for field in needed if names[field] not in row.values]
    lacking = " and ".join(f"{names[field]!r}" for field in missing)
    there = ", ".join(map(str, row.values)) or "no field at all"
    advice = (
        f"Name the column in spec.dataset.columns ({missing[0]}: <column>)"
        if first is None
        else f"All rows of a file must be in one form, and {first} has {', '.join(names[field] for field in needed)}"
    )
    return Problem(place=row.place, text=f"has no {lacking}, it has: {there}. {advice}")


def _builder(kind: str, *, task: Task, names: Mapping[str, str]) -> Build:
    if isinstance(task, ClassificationTask):
        return _classification(task, names)
    if isinstance(task, TextTask):
        return lambda values, place: Example(text=checked_text(values[names["text"]], names["text"]), source=place)
    if isinstance(task, PreferenceTask):
        return lambda values, place: _preference(values, place, names)
    if kind == "conversation":
        return lambda values, place: _conversation(parse_chat(values[names["messages"]], names["messages"]), place)
    if kind == "completion":
        return lambda values, place: _completion(values, place, names)
    return lambda values, place: _instruction(values, place, names)


def _classification(task: ClassificationTask, names: Mapping[str, str]) -> Build:
    labels, instruction = label_map(task), task.instruction or default_instruction(task.labels)
    answers = {label: ({"role": "assistant", "content": label},) for label in task.labels}
    text_column, label_column = names["text"], names["label"]

    def build(values: Values, place: str) -> Example:
        text = checked_text(values[text_column], text_column)
        value = values[label_column]
        # Labels are often written as numbers; a text that is a number is a mistake in the columns.
        if isinstance(value, int) and not isinstance(value, bool):
            value = str(value)
        written = checked_text(value, label_column).strip()
        label = labels.get(written)
        if label is None:
            raise RowError(_unknown_label(written, tuple(labels), label_column))
        prompt = ({"role": "user", "content": f"{instruction}\n\n{text.strip()}"},)
        return Example(prompt=prompt, completion=answers[label], label=label, source=place)

    return build


def _unknown_label(label: str, labels: tuple[str, ...], column: str) -> str:
    folded = {normalise(known): known for known in labels}
    near = difflib.get_close_matches(normalise(label), folded, n=1)
    hint = f"; did you mean {folded[near[0]]!r}?" if near else ""
    return f"{column!r} is {label[:80]!r}, which is none of the labels ({', '.join(labels)}){hint}"


def _instruction(values: Values, place: str, names: Mapping[str, str]) -> Example:
    given = values.get(names["input"])
    parts = [
        checked_text(values[names["instruction"]], names["instruction"]).strip(),
        "" if given is None else checked_text(given, names["input"], empty=True).strip(),
    ]
    return Example(
        prompt=({"role": "user", "content": "\n\n".join(part for part in parts if part)},),
        completion=_answer(values[names["output"]], names["output"]),
        source=place,
    )


def _completion(values: Values, place: str, names: Mapping[str, str]) -> Example:
    return Example(
        prompt=_prompt(values[names["prompt"]], names["prompt"]),
        completion=_answer(values[names["completion"]], names["completion"]),
        source=place,
    )


def _conversation(chat: Chat, place: str) -> Example:
    *prompt, last = chat.messages
    earlier = tuple(place for place in chat.learned if place < len(prompt))
    return Example(prompt=tuple(prompt), completion=(last,), earlier=earlier, trimmed=chat.trimmed, source=place)


def _preference(values: Values, place: str, names: Mapping[str, str]) -> Example:
    columns = names["chosen"], names["rejected"]
    chats = [values[column] for column in columns]
    if all(is_messages(chat) and len(chat) > 1 for chat in chats):
        # Whole conversations, which must differ in their ends alone.
        chosen, rejected = (parse_chat(chat, column) for chat, column in zip(chats, columns, strict=True))
        if chosen.messages[:-1] != rejected.messages[:-1]:
            raise RowError(f"{columns[0]!r} and {columns[1]!r} are answers to different conversations: make them equal")
        prompt, good, bad = chosen.messages[:-1], chosen.messages[-1:], rejected.messages[-1:]
    else:
        if names["prompt"] not in values:
            raise RowError(f"has no {names['prompt']!r}, and {columns[0]!r} is no conversation that would hold it")
        prompt = _prompt(values[names["prompt"]], names["prompt"])
        good, bad = (_answer(chat, column) for chat, column in zip(chats, columns, strict=True))
    if good == bad:
        raise RowError(f"{columns[0]!r} and {columns[1]!r} are the same answer: remove the row")
    return Example(prompt=prompt, completion=good, rejected=bad, source=place)


def _prompt(value: object, column: str) -> tuple[Message, ...]:
    if is_messages(value):
        assert isinstance(value, Sequence)
        if not value:
            raise RowError(f"{column!r} is empty: fill it in, or remove the row")
        return tuple(parse_message(message, f"{column}[{place}]") for place, message in enumerate(value))
    return ({"role": "user", "content": checked_text(value, column).strip()},)


def _answer(value: object, column: str) -> tuple[Message, ...]:
    if is_messages(value):
        assert isinstance(value, Sequence)
        if len(value) != 1:
            raise RowError(f"{column!r} has {len(value)} messages: it must be one answer of the assistant")
        message = parse_message(value[0], f"{column}[0]")
        if message["role"] != "assistant":
            raise RowError(f"{column}[0] is of {message['role']}: it must be the assistant's")
        return (message,)
    return ({"role": "assistant", "content": checked_text(value, column).strip()},)


__all__ = ["Example", "check_task", "convert", "default_instruction", "fields"]
