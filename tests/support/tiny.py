"""A tiny language model from nothing: a Llama of two layers with random weights and a tokenizer trained on the spot.

Real in every respect that a stage looks at (safetensors, tokenizer files, ChatML template, end-of-turn token), and
small enough that a stage on it takes seconds.
"""

import json
from collections.abc import Iterable
from pathlib import Path

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


def write_tiny_model(directory: Path, *, seed: int = 7, chat_template: str | None = CHAT_TEMPLATE) -> Path:
    """Write config, bfloat16 safetensors, tokenizer and generation config of the tiny model to `directory`."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=640,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        max_token_length=9,
        show_progress=False,
    )
    chats = [f"user\n{row['text']}\nassistant\n{row['label']}" for row in reviews(300)]
    tokenizer.train_from_iterator(chats, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=special[0], eos_token=special[2], pad_token=special[0]
    )
    fast.chat_template = chat_template

    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(fast),
            hidden_size=128,  # heads of 64: what every inference engine knows
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            bos_token_id=fast.bos_token_id,
            eos_token_id=fast.eos_token_id,
            pad_token_id=fast.pad_token_id,
        )
    ).to(torch.bfloat16)
    model.generation_config = GenerationConfig(
        bos_token_id=fast.bos_token_id, eos_token_id=fast.eos_token_id, pad_token_id=fast.pad_token_id
    )
    directory.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(directory)
    fast.save_pretrained(directory)
    return directory
