"""How conversations become the text that a model reads."""

from enum import StrEnum
from typing import Annotated

from pydantic import Field

from tuneserve.api.rules import Part, Rule


class TemplateSource(StrEnum):
    MODEL = "Model"
    INLINE = "Inline"


class Template(Part):
    """The prompt template. What trained is stored with every artifact, and is what serves it."""

    rules = (
        Rule(
            rule="(self.source == 'Inline') == has(self.inline)",
            message="must have inline, a Jinja template, if and only if source is Inline",
        ),
    )

    source: TemplateSource = TemplateSource.MODEL
    """Model: the chat template of the base model, or a plain one if it has none. Inline: the one in inline."""
    inline: Annotated[str, Field(min_length=1, max_length=16_384)] | None = None
    """A chat template in Jinja, as Hugging Face models have them: it sees messages (role, content),
    add_generation_prompt, bos_token and eos_token, and must end each turn of the assistant with a token that ends
    generation. It runs in a sandbox."""
    system_prompt: Annotated[str, Field(min_length=1, max_length=8192)] | None = None
    """System message of every conversation that has none of its own, in training, evaluation and serving alike."""
