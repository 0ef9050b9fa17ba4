"""The chat template of a base model, and the proof that it can be trained with and served with.

Rendered by the very function that transformers (and so the server) uses; text and tokens only, no torch.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, Protocol

from tuneserve_pipeline.base import read_json
from tuneserve_pipeline.errors import InvalidConfig
from tuneserve_pipeline.tasks import Example, Message

_BATCH = 1000


class Encode(Protocol):
    """Texts to token ids, adding no special tokens."""

    def __call__(self, texts: Sequence[str]) -> list[list[int]]: ...


@dataclass(frozen=True, kw_only=True)
class Template:
    source: str
    """`model` or `default`."""
    text: str
    special_tokens: Mapping[str, str] = field(default_factory=dict)
    """`bos_token`, `eos_token`, ...: what a template may name."""

    @property
    def hash(self) -> str:
        return "sha256:" + hashlib.sha256(self.text.encode()).hexdigest()

    def render(self, messages: Sequence[Message], *, prompt: bool) -> str:
        """Text of a conversation; `prompt`: up to where the answer begins."""
        from transformers.utils.chat_template_utils import render_jinja_template

        variables: dict[str, Any] = dict(self.special_tokens)
        rendered = render_jinja_template(
            [[dict(message) for message in messages]],
            chat_template=self.text,
            add_generation_prompt=prompt,
            **variables,
        )
        return str(rendered[0][0])


@dataclass(frozen=True, kw_only=True)
class Tokenizer:
    """What `prepare` needs of a tokenizer."""

    encode: Encode
    end_ids: frozenset[int]
    """Tokens at which generation stops."""
    end_tokens: tuple[str, ...]


def load_template(directory: Path, *, name: str) -> Template:
    """The model's own chat template, found where transformers looks for it, else the plain default."""
    config = read_json(directory / "tokenizer_config.json", name=name)
    special = _special_tokens(read_json(directory / "special_tokens_map.json", name=name)) | _special_tokens(config)
    text = _own_template(directory, config, name=name)
    if text is not None:
        return Template(source="model", text=text, special_tokens=special)
    if "eos_token" not in special:
        raise InvalidConfig(
            reason="TemplateMissing",
            message=f"{name}: its tokenizer has neither a chat template nor an eos_token, so an answer could not end; "
            "add chat_template.jinja beside the tokenizer, or eos_token to tokenizer_config.json",
        )
    default = resources.files("tuneserve_pipeline").joinpath("default_template.jinja").read_text(encoding="utf-8")
    return Template(source="default", text=default, special_tokens=special)


def _own_template(directory: Path, config: Mapping[str, Any], *, name: str) -> str | None:
    file = directory / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    for holder in (config, read_json(directory / "chat_template.json", name=name)):
        given = holder.get("chat_template")
        if isinstance(given, list):  # named templates: tool use, retrieval, and the one we want
            given = {entry["name"]: entry["template"] for entry in given}.get("default")
        if given:
            return str(given)
    return None


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
        return [list(found.ids) for found in fast.encode_batch(list(texts), add_special_tokens=False)]

    ids: set[int] = set()
    for config in ("config.json", "generation_config.json"):
        told = read_json(directory / config, name=name).get("eos_token_id")
        ids.update(told if isinstance(told, list) else [told] if isinstance(told, int) else [])
    if "eos_token" in special_tokens:
        known = fast.token_to_id(special_tokens["eos_token"])
        ids.update([known] if known is not None else [])
    tokens = tuple(str(fast.id_to_token(number)) for number in sorted(ids))
    return Tokenizer(encode=encode, end_ids=frozenset(ids), end_tokens=tokens)


def measure(examples: Iterable[Example], *, template: Template, tokenizer: Tokenizer, name: str) -> list[int]:
    """Tokens of each row, and the proof for each that it can be learned.

    Raises `InvalidConfig` if the template cannot render a row, if the prompt is not how the whole begins, in text or
    in tokens (the loss would cover the wrong tokens), or if no end of turn follows the answer (it would never stop).
    """
    lengths: list[int] = []
    batch: list[Example] = []
    for example in examples:
        batch.append(example)
        if len(batch) == _BATCH:
            lengths += _measure(batch, template=template, tokenizer=tokenizer, name=name)
            batch = []
    return lengths + _measure(batch, template=template, tokenizer=tokenizer, name=name)


def _measure(batch: Sequence[Example], *, template: Template, tokenizer: Tokenizer, name: str) -> list[int]:
    prompts, wholes = [], []
    for example in batch:
        try:
            prompts.append(template.render(example.prompt, prompt=True))
            wholes.append(template.render((*example.prompt, *example.completion), prompt=False))
        except Exception as error:  # a template is a program: anything may come out of it
            raise InvalidConfig(
                reason="TemplateFailed",
                message=f"{name}: its chat template cannot render {example.source} ({type(error).__name__}: {error})",
            ) from error
    prompt_ids = tokenizer.encode(prompts)
    whole_ids = tokenizer.encode(wholes)
    for index, example in enumerate(batch):
        prompt, whole = prompt_ids[index], whole_ids[index]
        if not wholes[index].startswith(prompts[index]) or whole[: len(prompt)] != prompt:
            raise InvalidConfig(
                reason="TemplateNotPrefix",
                message=f"{name}: with its chat template the prompt of {example.source} is not how prompt and answer "
                "together begin, so it cannot be told what to learn; use a model whose template renders the "
                "generation prompt as the start of the assistant's turn",
            )
        if not tokenizer.end_ids.intersection(whole[len(prompt) :]):
            ends = ", ".join(tokenizer.end_tokens) or "none is configured"
            raise InvalidConfig(
                reason="TemplateWithoutEnd",
                message=f"{name}: its chat template puts no end-of-turn token behind an answer (tokens that end "
                f"generation: {ends}), so the tuned model would never stop; set eos_token and eos_token_id of the "
                "model to the token that its template ends a turn with",
            )
    return [len(ids) for ids in whole_ids]
