"""A tiny language model from nothing: two layers with random weights, a Llama unless said otherwise, and a tokenizer
trained on the spot.

Real in every respect that a stage looks at (safetensors, tokenizer files, ChatML template, end-of-turn token), and
small enough that a stage on it takes seconds.
"""

import json
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerFast

_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LABELS = ("negative", "neutral", "positive")
_WORDS = {
    "negative": ("awful", "broken", "sad", "slow", "useless"),
    "neutral": ("average", "ordinary", "plain", "so-so", "usual"),
    "positive": ("brilliant", "great", "lovely", "quick", "superb"),
}
_THINGS = ("battery", "book", "camera", "dinner", "film", "phone", "room", "screen", "service", "song")


def reviews(count: int) -> list[dict[str, str]]:
    """`count` different made-up reviews, each with the label that its one telling word has."""
    rows = []
    for index in range(count):
        label = LABELS[index % 3]
        word = _WORDS[label][index // 3 % 5]
        thing, other = _THINGS[index // 15 % 10], _THINGS[index // 150 % 10]
        rows.append({"text": f"The {thing} was {word} and so was the {other} number {index}.", "label": label})
    return rows


def write_jsonl(path: Path, rows: Iterable[object]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def write_tiny_model(
    directory: Path,
    *,
    seed: int = 7,
    chat_template: str | None = CHAT_TEMPLATE,
    config: "PretrainedConfig | None" = None,
) -> Path:
    """Write config, bfloat16 safetensors, tokenizer and generation config of the tiny model to `directory`.

    `config` makes it a model of another family; its vocabulary and special tokens become those of the tokenizer.
    """
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = chat_template
    special = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    config = config or tiny_llama()
    config.update({"vocab_size": len(tokenizer), **special})
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
    model.generation_config = GenerationConfig(**special)
    directory.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def tiny_llama() -> "PretrainedConfig":
    from transformers import LlamaConfig

    return LlamaConfig(
        hidden_size=128,  # heads of 64: what every inference engine knows
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=512,
        tie_word_embeddings=True,
    )


@cache
def _trained_tokenizer() -> str:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=640,
        special_tokens=list(_SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        max_token_length=9,
        show_progress=False,
    )
    chats = [f"user\n{row['text']}\nassistant\n{row['label']}" for row in reviews(300)]
    tokenizer.train_from_iterator(chats, trainer)
    return str(tokenizer.to_str())


def tiny_tokenizer() -> "PreTrainedTokenizerFast":
    """640 tokens of a byte-level BPE."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_trained_tokenizer()),
        bos_token=_SPECIAL[0],
        eos_token=_SPECIAL[2],
        pad_token=_SPECIAL[0],
    )
