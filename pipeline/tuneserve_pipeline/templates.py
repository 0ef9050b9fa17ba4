"""The chat template that conversations are rendered with, and the tokenizer behind it.

Rendered by the very function that transformers (and so the server) uses; text and tokens only, no torch.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, Protocol

from tuneserve_pipeline.base import read_json
from tuneserve_pipeline.contract import TemplateSpec
from tuneserve_pipeline.errors import InvalidConfig
from tuneserve_pipeline.examples import Message


class Encode(Protocol):
    """Texts to token ids, adding no special tokens."""

    def __call__(self, texts: Sequence[str]) -> list[list[int]]: ...


@dataclass(frozen=True, kw_only=True)
class Template:
    source: str
    """`model`, `inline` (the spec's) or `default`."""
    text: str
    special_tokens: Mapping[str, str] = field(default_factory=dict)
    """`bos_token`, `eos_token`, ...: what a template may name."""

    @property
    def hash(self) -> str:
        return "sha256:" + hashlib.sha256(self.text.encode()).hexdigest()

    def render(self, messages: Sequence[Message], *, prompt: bool) -> str:
        """Text of a conversation; `prompt`: up to where the answer begins."""
        return self.render_all([messages], prompt=prompt)[0]

    def render_all(self, conversations: Sequence[Sequence[Message]], *, prompt: bool) -> list[str]:
        from transformers.utils.chat_template_utils import render_jinja_template

        variables: dict[str, Any] = dict(self.special_tokens)
        rendered = render_jinja_template(
            # Lists of dicts: what templates add to and look into.
            [list(map(dict, conversation)) for conversation in conversations],
            chat_template=self.text,
            add_generation_prompt=prompt,
            **variables,
        )
        return list(map(str, rendered[0]))


@dataclass(frozen=True, kw_only=True)
class Tokenizer:
    """What `prepare` needs of a tokenizer."""

    encode: Encode
    end_ids: frozenset[int]
    """Tokens at which generation stops."""
    end_tokens: tuple[str, ...]
    start_ids: tuple[int, ...] = ()
    """What it puts before a plain text."""
    end_id: int | None = None
    """What ends a plain text."""
    unknown_id: int | None = None
    """What stands for a piece of text that it has no token for."""
    special_texts: tuple[str, ...] = ()
    """Texts that are one token wherever they stand, and cut the text around them in two."""
    longest_token: int = 256
    """Characters: a text of n tokens has at most n times as many."""


def load_template(directory: Path, *, name: str, spec: TemplateSpec) -> Template:
    """The template of the spec, else the model's own, found where transformers looks for it, else the plain default."""
    special = load_special_tokens(directory, name=name)
    source, text = "inline", spec.inline
    if not text:
        source, text = "model", _own_template(directory, name=name)
    if not text:
        if "eos_token" not in special:
            raise InvalidConfig(
                reason="TemplateMissing",
                message=f"{name}: its tokenizer has neither a chat template nor an eos_token, so an answer could not "
                "end; give one in spec.template.inline, add chat_template.jinja beside the tokenizer, or eos_token to "
                "tokenizer_config.json",
            )
        source = "default"
        text = resources.files("tuneserve_pipeline").joinpath("default_template.jinja").read_text(encoding="utf-8")
    return Template(source=source, text=with_system_prompt(text, spec.system_prompt), special_tokens=special)


def with_system_prompt(text: str, prompt: str) -> str:
    """A template that begins each conversation with `prompt` unless it begins with a system message of its own.

    In the template, so that what trained, what is evaluated and what is served are the same without a word of any user.
    """
    if not prompt:
        return text
    # As Jinja reads a string: it knows JSON's escapes, but not its halves of characters.
    literal = json.dumps(prompt, ensure_ascii=False)
    return (
        "{%- if not messages or messages[0]['role'] != 'system' -%}"
        "{%- set messages = [{'role': 'system', 'content': " + literal + "}] + messages -%}"
        "{%- endif -%}" + text
    )


def load_special_tokens(directory: Path, *, name: str) -> dict[str, str]:
    """`bos_token`, `eos_token`, ... of a model's tokenizer."""
    return _special_tokens(read_json(directory / "special_tokens_map.json", name=name)) | _special_tokens(
        read_json(directory / "tokenizer_config.json", name=name)
    )


def _own_template(directory: Path, *, name: str) -> str:
    file = directory / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    for holder in ("tokenizer_config.json", "chat_template.json"):
        given = read_json(directory / holder, name=name).get("chat_template")
        if isinstance(given, list):  # named templates: tool use, retrieval, and the one we want
            given = {entry["name"]: entry["template"] for entry in given}.get("default")
        if given:
            return str(given)
    return ""


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """Tokens by their role; each may stand as a text or as an object with its properties."""
    found = {}
    for key, value in config.items():
        if not key.endswith("_token"):
            continue
        content = value.get("content") if isinstance(value, dict) else value
        if isinstance(content, str):
            found[key] = content
    return found


def load_tokenizer(directory: Path, *, name: str, special_tokens: Mapping[str, str]) -> Tokenizer:
    """The fast tokenizer by itself where there is `tokenizer.json`: seconds less than through transformers."""
    file = directory / "tokenizer.json"
    try:
        if file.is_file():
            from tokenizers import Tokenizer as FastTokenizer

            fast = FastTokenizer.from_file(str(file))
        else:
            from transformers import AutoTokenizer

            fast = AutoTokenizer.from_pretrained(directory, trust_remote_code=False).backend_tokenizer
    except Exception as error:  # the library raises bare exceptions for a broken file
        raise InvalidConfig(
            reason="TokenizerBroken", message=f"{name}: the tokenizer cannot be loaded ({error}): copy its files again"
        ) from error
    fast.no_truncation()
    fast.no_padding()

    def encode(texts: Sequence[str]) -> list[list[int]]:
        return [found.ids for found in fast.encode_batch_fast(list(texts), add_special_tokens=False)]

    ids: set[int] = set()
    for config in ("config.json", "generation_config.json"):
        told = read_json(directory / config, name=name).get("eos_token_id")
        ids.update(told if isinstance(told, list) else [told] if isinstance(told, int) else [])
    known = {role: fast.token_to_id(token) for role, token in special_tokens.items()}
    end = known.get("eos_token")
    ids.update([end] if end is not None else [])
    # Around nothing it puts what it puts before and behind a text; only what begins one is wanted.
    around = fast.encode("", add_special_tokens=True).ids
    return Tokenizer(
        encode=encode,
        end_ids=frozenset(ids),
        end_tokens=tuple(str(fast.id_to_token(number)) for number in sorted(ids)),
        start_ids=tuple(number for number in around if number not in ids),
        end_id=end if end is not None else min(ids, default=None),
        unknown_id=known.get("unk_token"),
        special_texts=tuple(
            token.content
            for token in fast.get_added_tokens_decoder().values()
            if token.special and not (token.lstrip or token.rstrip or token.normalized or token.single_word)
        ),
        longest_token=max(map(len, fast.get_vocab()), default=1),
    )
