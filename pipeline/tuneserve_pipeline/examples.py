"""One row as what is learned from it: a conversation, a pair of answers, or a plain text. Pure."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Message = Mapping[str, str]


@dataclass(frozen=True, kw_only=True, slots=True)
class Example:
    """`completion` is learned as the answer to `prompt`; a plain text has neither."""

    prompt: tuple[Message, ...] = ()
    completion: tuple[Message, ...] = ()
    source: str
    """File and line, as the user knows them."""
    label: str | None = None
    earlier: tuple[int, ...] = ()
    """Messages of the prompt that are learned too: the assistant's turns before the last."""
    rejected: tuple[Message, ...] = ()
    """The worse answer to the same prompt, of a preference."""
    text: str | None = None
    """All there is of a row of plain text."""
    trimmed: bool = False
    """Whether turns behind the last answer were cut off: nobody answers them."""

    def to_json(self) -> dict[str, Any]:
        if self.text is not None:
            return {"text": self.text, "source": self.source}
        row: dict[str, Any] = {"prompt": list(self.prompt), "completion": list(self.completion)}
        if self.rejected:
            row["rejected"] = list(self.rejected)
        if self.label is not None:
            row["label"] = self.label
        return {**row, "source": self.source}

    @property
    def key(self) -> str:
        """What makes two rows the same question."""
        return self.text if self.text is not None else _joined(self.prompt)

    @property
    def answer(self) -> str:
        """What makes two answers to it the same."""
        return _joined((*self.completion, *self.rejected))


def _joined(messages: tuple[Message, ...]) -> str:
    return "\x1e".join([f"{message['role']}\x1f{message['content']}" for message in messages])
