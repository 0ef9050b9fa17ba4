"""Examples as tokens, and which of them the loss covers: answers and the tokens that end them, and nothing else.

Each row is proved, not assumed: what is shown must be how the whole begins, in text and in tokens, or the loss would
cover the wrong tokens; and an end of turn must follow the answer, or the model would never stop. Must import no torch.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NoReturn

from tuneserve_pipeline.errors import InvalidConfig
from tuneserve_pipeline.examples import Example, Message
from tuneserve_pipeline.templates import Template, Tokenizer

Ids = list[int]


@dataclass(frozen=True, kw_only=True, slots=True)
class Encoded:
    """A row as tokens; without any if it is so long that it was not worth finding out how long."""

    example: Example
    ids: Ids
    """Up to the token that ends the last answer: what a template puts behind it is never generated."""
    spans: Ids
    """Pairs start, end: the tokens [start, end) are learned."""
    rejected: Ids = field(default_factory=list)
    """The worse answer of a preference; the better one is the last span."""
    ends_inside: bool = False
    """Whether an end of turn stands within an answer, where the model would learn to stop."""
    last_only: bool = False
    """Whether earlier answers of a conversation are not learned, because the template renders them otherwise later."""

    @property
    def length(self) -> int:
        """Tokens that go through the model."""
        if not self.rejected:
            return len(self.ids)
        return max(len(self.ids), self.spans[-2] + len(self.rejected))


@dataclass(kw_only=True)
class Rendered:
    """A batch as text."""

    examples: Sequence[Example]
    limits: Sequence[int]
    prompts: list[str]
    wholes: list[str]
    rejected: dict[int, str] = field(default_factory=dict)
    oversized: set[int] = field(default_factory=set)


class Encoder:
    """`name`: what the user calls the template, as the subject of a sentence."""

    def __init__(self, *, template: Template, tokenizer: Tokenizer, name: str) -> None:
        self._template = template
        self._tokenizer = tokenizer
        self._name = name
        self._head: _Head | None = None
        self._tail: _Tail | None = None
        self._specials: tuple[str, ...] = ()
        self._proved = False

    def render(self, examples: Sequence[Example], *, limits: Sequence[int]) -> Rendered:
        """`limits`: tokens that each row may have, so that no work goes into one that is far too long."""
        chats = [example for example in examples if example.text is None]
        prompts = iter(self._render(chats, lambda example: example.prompt, prompt=True))
        wholes = iter(self._render(chats, lambda example: (*example.prompt, *example.completion), prompt=False))
        found = Rendered(examples=examples, limits=limits, prompts=[], wholes=[])
        for row, example in enumerate(examples):
            whole = next(wholes) if example.text is None else example.text
            prompt = next(prompts) if example.text is None else ""
            if example.text is None and len(whole) > limits[row] * self._tokenizer.longest_token:
                found.oversized.add(row)
                prompt = whole = ""
            elif not whole.startswith(prompt):
                self._no_prefix(example)
            elif example.rejected:
                found.rejected[row] = self._rejected(example, prompt)
            found.prompts.append(prompt)
            found.wholes.append(whole)
        return found

    def tokenize(self, batch: Rendered) -> list[Encoded]:
        wholes = self._encode_wholes(batch.wholes)
        starts = self._starts(batch, wholes)
        rejected = dict(zip(batch.rejected, self._tokenizer.encode(list(batch.rejected.values())), strict=True))
        found = []
        for row, (example, ids) in enumerate(zip(batch.examples, wholes, strict=True)):
            if row in batch.oversized:
                found.append(Encoded(example=example, ids=[], spans=[]))
            elif example.text is not None:
                found.append(self._text(example, ids))
            else:
                found.append(self._chat(batch, row, ids, start=starts[row], rejected=rejected.get(row)))
        return found

    def _chat(self, batch: Rendered, row: int, ids: Ids, *, start: int, rejected: Ids | None) -> Encoded:
        example = batch.examples[row]
        end = self._end(ids, start, example)
        turns = self._turns(example, batch.wholes[row], ids) if end < batch.limits[row] else []
        spans = [*(turns or ()), start, end + 1]
        worse: Ids = []
        if rejected is not None:
            if rejected[:start] != ids[:start]:
                self._no_prefix(example)
            worse = rejected[start : self._end(rejected, start, example) + 1]
        ends = self._tokenizer.end_ids
        inside = any(
            not ends.isdisjoint(ids[first : last - 1]) for first, last in zip(spans[::2], spans[1::2], strict=True)
        )
        return Encoded(
            example=example,
            ids=ids[: end + 1],
            spans=spans,
            rejected=worse,
            ends_inside=inside or not ends.isdisjoint(worse[:-1]),
            last_only=turns is None,
        )

    def _text(self, example: Example, ids: Ids) -> Encoded:
        inside = not self._tokenizer.end_ids.isdisjoint(ids)
        ids = _framed(ids, self._tokenizer)
        return Encoded(example=example, ids=ids, spans=[0, len(ids)], ends_inside=inside)

    def _encode_wholes(self, texts: Sequence[str]) -> list[Ids]:
        head = self._head
        if head is None:
            return self._tokenizer.encode(texts)
        rests = [text.removeprefix(head.text) for text in texts]
        return [
            ids if len(rest) == len(text) else head.ids + ids
            for text, rest, ids in zip(texts, rests, self._tokenizer.encode(rests), strict=True)
        ]

    def _starts(self, batch: Rendered, wholes: Sequence[Ids]) -> list[int]:
        """Where each answer begins. All prompts end alike, so mostly the end of a prompt is all that is tokenized."""
        starts = [
            -1 if self._tail is None or not self._proved else self._tail.start(prompt, whole, ids)
            for prompt, whole, ids in zip(batch.prompts, batch.wholes, wholes, strict=True)
        ]
        open_rows = [row for row, start in enumerate(starts) if start < 0]
        encoded = self._tokenizer.encode([batch.prompts[row] for row in open_rows])
        for row, prompt in zip(open_rows, encoded, strict=True):
            if wholes[row][: len(prompt)] != prompt:
                self._no_prefix(batch.examples[row])
            starts[row] = len(prompt)
        if not self._proved:
            self._prove(batch, wholes, starts)
        return starts

    def _prove(self, batch: Rendered, wholes: Sequence[Ids], starts: Sequence[int]) -> None:
        """The short ways are taken only if they gave the very same for all rows of the first batch."""
        rows = [row for row, prompt in enumerate(batch.prompts) if prompt]
        if not rows:
            return
        self._proved = True
        # Of the hundreds that some tokenizers have, those that this template uses.
        self._specials = tuple(text for text in self._tokenizer.special_texts if text in batch.wholes[rows[0]])
        tail = _Tail.of(batch.prompts[rows[0]], self._tokenizer, specials=self._specials)
        if tail is not None:
            found = [tail.start(batch.prompts[row], batch.wholes[row], wholes[row]) for row in rows]
            if all(start in (-1, starts[row]) for row, start in zip(rows, found, strict=True)):
                self._tail = tail
        head = _Head.of([batch.wholes[row] for row in rows], self._tokenizer, specials=self._specials)
        if head is not None:
            rests = self._tokenizer.encode([batch.wholes[row][len(head.text) :] for row in rows])
            if all(head.ids + rest == wholes[row] for row, rest in zip(rows, rests, strict=True)):
                self._head = head

    def _turns(self, example: Example, whole: str, ids: Ids) -> Ids | None:
        """Spans of the earlier answers. None: the template renders one otherwise when others follow, so that its place
        is not known.

        One text at a time, and of rows that fit alone: all of them together are the square of a conversation.
        """
        spans: Ids = []
        for place in example.earlier:
            before = self._render([example], lambda given, place=place: given.prompt[:place], prompt=True)[0]
            after = self._render([example], lambda given, place=place: given.prompt[: place + 1], prompt=False)[0]
            if not (whole.startswith(after) and after.startswith(before)):
                return None
            start, stop = self._place(before, whole, ids), self._place(after, whole, ids)
            end = None if start is None or stop is None else self._last_end(ids, start, stop)
            if start is None or end is None:
                return None
            spans += [start, end + 1]
        return spans

    def _place(self, text: str, whole: str, ids: Ids) -> int | None:
        """Tokens of a text that `whole`, with its `ids`, begins with; None if they are others than there."""
        tail = _Tail.of(text, self._tokenizer, specials=self._specials) if self._tail is not None else None
        place = -1 if tail is None else tail.start(text, whole, ids)
        if place >= 0:
            return place
        found = self._tokenizer.encode([text])[0]
        return len(found) if ids[: len(found)] == found else None

    def _rejected(self, example: Example, prompt: str) -> str:
        whole = self._render([example], lambda given: (*given.prompt, *given.rejected), prompt=False)[0]
        if not whole.startswith(prompt):
            self._no_prefix(example)
        return whole

    def _render(
        self, examples: Sequence[Example], messages: Callable[..., Sequence[Message]], *, prompt: bool
    ) -> list[str]:
        try:
            return self._template.render_all([messages(example) for example in examples], prompt=prompt)
        except Exception as failure:  # a template is a program: anything may come out of it
            error, guilty = failure, examples[0]
        for example in examples if len(examples) > 1 else ():
            try:
                self._template.render(messages(example), prompt=prompt)
            except Exception as failure:
                error, guilty = failure, example
                break
        number = getattr(error, "lineno", None)
        line = f" in line {number} of the template" if number else ""
        raise InvalidConfig(
            reason="TemplateFailed",
            message=f"{self._name} cannot render {guilty.source} ({type(error).__name__}{line}: {error})",
        ) from error

    def _last_end(self, ids: Ids, start: int, stop: int) -> int | None:
        ends = self._tokenizer.end_ids
        return next((place for place in range(min(stop, len(ids)) - 1, start - 1, -1) if ids[place] in ends), None)

    def _end(self, ids: Ids, start: int, example: Example) -> int:
        end = self._last_end(ids, start, len(ids))
        if end is not None:
            return end
        ends = ", ".join(self._tokenizer.end_tokens) or "none is configured"
        raise InvalidConfig(
            reason="TemplateWithoutEnd",
            message=f"{self._name} puts no end-of-turn token behind the answer of {example.source} (tokens that end "
            f"generation: {ends}), so the tuned model would never stop; end the assistant's turn with one of them, or "
            "set eos_token and eos_token_id of the model to the token that the template ends a turn with",
        )

    def _no_prefix(self, example: Example) -> NoReturn:
        raise InvalidConfig(
            reason="TemplateNotPrefix",
            message=f"{self._name} renders the prompt of {example.source} otherwise than prompt and answer together "
            "begin, in text or in tokens, so it cannot be told what to learn; use a template that renders the "
            "generation prompt as the start of the assistant's turn",
        )


def text_ids(text: str, *, tokenizer: Tokenizer) -> Ids:
    """A plain text as it is learned."""
    return _framed(tokenizer.encode([text])[0], tokenizer)


def _common(first: str, second: str) -> str:
    """What both texts begin with."""
    differ = next((place for place, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), None)
    return min(first, second, key=len) if differ is None else first[:differ]


def _framed(ids: Ids, tokenizer: Tokenizer) -> Ids:
    return [*tokenizer.start_ids, *ids, *([] if tokenizer.end_id is None else [tokenizer.end_id])]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Head:
    """How all texts begin, up to a special token: a system prompt is tokenized once, not a million times."""

    text: str
    ids: Ids

    @classmethod
    def of(cls, texts: Sequence[str], tokenizer: Tokenizer, *, specials: Sequence[str]) -> "_Head | None":
        common = _common(min(texts), max(texts))
        place = max((common.rfind(special) for special in specials), default=-1)
        return cls(text=common[:place], ids=tokenizer.encode([common[:place]])[0]) if place > 0 else None


@dataclass(frozen=True, kw_only=True, slots=True)
class _Tail:
    """How a text ends, from its last special token on: that part is tokenized alike whatever stands before it."""

    text: str
    ids: Ids
    special: str

    @classmethod
    def of(cls, text: str, tokenizer: Tokenizer, *, specials: Sequence[str]) -> "_Tail | None":
        place, special = max(((text.rfind(special), special) for special in specials), default=(-1, ""))
        if place < 0:
            return None
        return cls(text=text[place:], ids=tokenizer.encode([text[place:]])[0], special=special)

    def start(self, prompt: str, whole: str, ids: Ids) -> int:
        """Tokens of the prompt; -1: not to be had this way."""
        if not prompt.endswith(self.text):
            return -1
        behind = whole.count(self.special, len(prompt))
        first, place = self.ids[0], len(ids)
        for _ in range(behind + 1):
            place -= 1
            while place >= 0 and ids[place] != first:
                place -= 1
        end = place + len(self.ids)
        return end if place >= 0 and ids[place:end] == self.ids else -1
