"""Conversations as data sets write them: OpenAI's `messages`, ShareGPT's `conversations`. Pure."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tuneserve_pipeline.examples import Message
from tuneserve_pipeline.files import ROW_LIMIT

ASSISTANT = "assistant"
#: How data sets call the speakers -> how templates do.
_ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": ASSISTANT,
    "gpt": ASSISTANT,
    "chatgpt": ASSISTANT,
    "bing": ASSISTANT,
    "bard": ASSISTANT,
    "model": ASSISTANT,
    "bot": ASSISTANT,
    "tool": "tool",
}


class RowError(ValueError):
    """What is wrong with a row, and what to do, without its place."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Chat:
    messages: tuple[Message, ...]
    """The last one is an answer."""
    learned: tuple[int, ...]
    """Answers that are learned, by their place; the last is always among them."""
    trimmed: bool


def checked_text(value: object, column: str, *, empty: bool = False) -> str:
    """A text that a tokenizer can read; raises `RowError` for anything else."""
    if not isinstance(value, str):
        found = "empty" if value is None else f"a {type(value).__name__}"
        raise RowError(f"{column!r} is {found}: it must be a text")
    if not empty and not value.strip():
        raise RowError(f"{column!r} is empty: fill it in, or remove the row")
    if len(value) > ROW_LIMIT:
        raise RowError(f"{column!r} has {len(value)} characters, more than {ROW_LIMIT}: cut the text into rows")
    if "\x00" in value:
        raise RowError(f"{column!r} holds a NUL character (position {value.index(chr(0)) + 1}): remove it")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise RowError(
                f"{column!r} holds half a character (U+{ord(value[error.start]):04X} at position {error.start + 1}): "
                "write the whole character"
            ) from error
    return value


def is_messages(value: object) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def parse_chat(value: object, column: str) -> Chat:
    """A whole conversation; turns behind its last answer are cut off."""
    if not is_messages(value):
        raise RowError(f"{column!r} is a {type(value).__name__}: it must be a list of messages")
    assert isinstance(value, Sequence)
    parsed = [parse_message(message, f"{column}[{place}]") for place, message in enumerate(value)]
    answers = [place for place, message in enumerate(parsed) if message["role"] == ASSISTANT]
    if not answers:
        raise RowError(f"{column!r} has no message of the assistant, so there is nothing to learn: remove the row")
    last = answers[-1]
    if last == 0 or all(message["role"] == "system" for message in parsed[:last]):
        raise RowError(f"{column!r} has no message of the user before the answer: put the question before it")
    learned = tuple(place for place in answers if _is_learned(value[place]))
    if last not in learned:
        raise RowError(f"{column!r} ends with an answer of weight 0: remove that message, or give it weight 1")
    # A chat may open with a greeting: nobody asks for it, so there is no prompt to learn it for.
    first = next(place for place, message in enumerate(parsed) if message["role"] != "system")
    learned = tuple(place for place in learned if place > first)
    return Chat(messages=tuple(parsed[: last + 1]), learned=learned, trimmed=last + 1 < len(parsed))


def parse_message(value: object, column: str) -> Message:
    if not isinstance(value, Mapping):
        raise RowError(f"{column} is a {type(value).__name__}: a message has role and content")
    role_field = "role" if "role" in value else "from"
    content_field = "content" if "content" in value else "value"
    told = value.get(role_field)
    role = _ROLES.get(told.lower()) if isinstance(told, str) else None
    if role is None:
        raise RowError(
            f"{column}.{role_field} is {str(told)[:40]!r}: it must be one of system, user, assistant and tool"
        )
    if value.get("tool_calls") or value.get("function_call"):
        raise RowError(f"{column} calls a tool: such turns cannot be learned yet; remove the row")
    content = _text_of(value.get(content_field))
    return {"role": role, "content": checked_text(content, f"{column}.{content_field}", empty=role != ASSISTANT)}


def _text_of(content: object) -> object:
    """OpenAI writes a content also as a list of parts; of text alone they are one text."""
    if not is_messages(content):
        return content
    assert isinstance(content, Sequence)
    parts: list[Any] = [part.get("text") if isinstance(part, Mapping) else part for part in content]
    return "".join(parts) if all(isinstance(part, str) for part in parts) else content


def _is_learned(message: Any) -> bool:
    """OpenAI's `weight`: 0 for an answer that is shown but not learned. Parquet writes an absent one as None."""
    weight = message.get("weight")
    return weight is None or bool(weight)
