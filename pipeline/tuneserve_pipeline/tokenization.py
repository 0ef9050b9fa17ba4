"""The tokenizer and the template that `prepare` proved, for the stages after it, and their files for what is served.

The files are copied as they are: saving them anew through a library would put its version's habits into the artifact.
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tuneserve_pipeline import base, templates
from tuneserve_pipeline.errors import InvalidConfig
from tuneserve_pipeline.templates import Template, Tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BASE_FILE = "base.json"
TEMPLATE_FILE = "chat_template.jinja"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
)


@dataclass(frozen=True, kw_only=True)
class Base:
    """The base model as `prepare` found it."""

    path: Path
    name: str
    """What the user calls it: repository at the hub, or path on the claim."""
    revision: str
    template: Template
    tokenizer: Tokenizer


def read_base(prepared: Path) -> Base:
    """Raises `InvalidConfig` if the model is not where `prepare` found it."""
    told = json.loads((prepared / BASE_FILE).read_text(encoding="utf-8"))
    source = json.loads((prepared / "manifest.json").read_text(encoding="utf-8"))["config"]["spec"]["base_model"]
    path = Path(told["path"])
    name = source.get("repo") or source.get("path") or source.get("claim") or path.name
    base.read_config(path, name=name)
    special = templates.load_special_tokens(path, name=name)
    return Base(
        path=path,
        name=name,
        revision=told["revision"],
        template=Template(
            source=told["template"],
            text=(prepared / TEMPLATE_FILE).read_text(encoding="utf-8"),
            special_tokens=special,
        ),
        tokenizer=templates.load_tokenizer(path, name=name, special_tokens=special),
    )


def load_tokenizer(model: Base) -> "PreTrainedTokenizerBase":
    """The tokenizer for a library that wants one of transformers, with a token to pad with."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model.path, trust_remote_code=False)
    tokenizer.chat_template = model.template.text
    if tokenizer.pad_token is None:
        # Padding is told apart by the attention mask, so this is no end of turn that is never learned.
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def copy_tokenizer(model: Base, target: Path) -> None:
    """The tokenizer's files and the template that was trained with, which wins over any that stands in them."""
    for name in TOKENIZER_FILES:
        source = model.path / name
        if source.is_file():
            shutil.copyfile(source, target / name)
    (target / TEMPLATE_FILE).write_text(model.template.text, encoding="utf-8")


def end_token_ids(model: Base) -> int | list[int]:
    """`eos_token_id` for a generation config: all tokens at which an answer ends."""
    ids = sorted(model.tokenizer.end_ids)
    if not ids:
        raise InvalidConfig(
            reason="TemplateWithoutEnd", message=f"{model.name}: no token ends generation; set eos_token_id"
        )
    return ids[0] if len(ids) == 1 else ids


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object of a model's directory; empty if there is no such file."""
    return base.read_json(path, name=path.parent.name)
