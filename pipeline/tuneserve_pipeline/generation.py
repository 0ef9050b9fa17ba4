"""Greedy answers to many prompts, in batches, as a server would give them at temperature 0.

Real generation, token by token to the end of turn: never a score of the first token alone.
What all prompts have in common at their start (system prompt, instruction) goes through the model once.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

#: Fewer common tokens than this are not worth a cache.
_SHORTEST_PREFIX = 8


@dataclass(frozen=True, kw_only=True)
class Answer:
    index: int
    """Of its prompt, in the order given."""
    tokens: list[int]
    """Without the end of turn and what follows it."""
    ended: bool
    """False: the limit came before the end of turn."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    max_new_tokens: int
    batch_size: int
    """Rows at a time; halved by itself when the GPU memory does not suffice."""
    end_ids: frozenset[int]
    pad_id: int


def generate(
    model: Any,
    prompts: Sequence[Sequence[int]],
    *,
    limits: Limits,
    done: Callable[[int, int], None],
    virtual: Any = None,
) -> list[Answer]:
    """One answer for each prompt, in the order of the prompts.

    `done(rows, tokens)` is told after each batch what it added, padding not counted. `virtual` is a cache of what
    stands before every prompt without being a token, see `virtual_tokens`.
    """
    import torch

    # Like lengths together: padding is work for nothing.
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    answers: list[Answer] = []
    size, start = limits.batch_size, 0
    with torch.inference_mode():
        if virtual is not None:
            # Tokens that are in the cache are never looked at: any do in their place.
            prompts = [[limits.pad_id] * virtual.get_seq_length() + list(prompt) for prompt in prompts]
        prefix, cache = _prefix(model, prompts) if virtual is None else (virtual.get_seq_length(), virtual)
        while start < len(order):
            batch = order[start : start + size]
            try:
                found = list(_answer(model, prompts, batch, limits=limits, prefix=prefix, cache=cache))
            except torch.OutOfMemoryError:
                if len(batch) == 1:
                    raise
                size = max(1, len(batch) // 2)
                torch.cuda.empty_cache()
                continue
            answers += found
            start += len(batch)
            tokens = sum(len(prompts[index]) for index in batch) + sum(len(answer.tokens) for answer in found)
            done(len(batch), tokens)
    return sorted(answers, key=lambda answer: answer.index)


def common_prefix(prompts: Sequence[Sequence[int]]) -> int:
    """How many first tokens all prompts share."""
    low, high = min(map(tuple, prompts)), max(map(tuple, prompts))
    return next((place for place, pair in enumerate(zip(low, high, strict=False)) if pair[0] != pair[1]), len(low))


def virtual_tokens(model: Any) -> tuple[Any, Any]:
    """The base of a PEFT model with a learned prompt or prefix, and the cache of that prompt.

    So it is generated from as from any other model; PEFT's own generation feeds the prompt in anew for each batch.
    """
    import torch
    from transformers import DynamicCache

    base, config = model.get_base_model(), model.active_peft_config
    with torch.inference_mode():
        prompt = model.get_prompt(batch_size=1)
        if config.peft_type.value == "PREFIX_TUNING":
            return base, prompt
        cache = DynamicCache(config=base.config)
        base(inputs_embeds=prompt.to(base.dtype), past_key_values=cache)
    return base, cache


def _prefix(model: Any, prompts: Sequence[Sequence[int]]) -> tuple[int, Any]:
    """How many first tokens all prompts share, and the model's cache of them; (0, None) where it is not worth it."""
    import torch
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    # One token of each prompt must remain, its logits are the start of the answer.
    shared = min(common_prefix(prompts), min(map(len, prompts)) - 1)
    cache = DynamicCache(config=model.config)
    # Windows and recurrent states do not bear padding in the middle.
    plain = all(type(layer) is DynamicLayer for layer in cache.layers)
    if shared < _SHORTEST_PREFIX or len(prompts) < 2 or not plain or not cache.layers:
        return 0, None
    model(input_ids=torch.tensor([list(prompts[0][:shared])], device=model.device), past_key_values=cache)
    return shared, cache


def _answer(
    model: Any, prompts: Sequence[Sequence[int]], batch: Sequence[int], *, limits: Limits, prefix: int, cache: Any
) -> Iterator[Answer]:
    import torch

    longest = max(len(prompts[index]) for index in batch)
    rows, masks = [], []
    for index in batch:
        prompt = list(prompts[index])
        # Padding stands behind the shared start: positions follow from the mask, so nothing is shifted.
        padding = longest - len(prompt)
        rows.append(prompt[:prefix] + [limits.pad_id] * padding + prompt[prefix:])
        masks.append([1] * prefix + [0] * padding + [1] * (len(prompt) - prefix))
    own = copy.deepcopy(cache)
    if own is not None:
        own.batch_repeat_interleave(len(batch))
    output = model.generate(
        input_ids=torch.tensor(rows, device=model.device),
        attention_mask=torch.tensor(masks, device=model.device),
        past_key_values=own,
        generation_config=_greedy(model.generation_config, limits),
    )
    for index, row in zip(batch, output[:, longest:].tolist(), strict=True):
        end = next((place for place, token in enumerate(row) if token in limits.end_ids), None)
        yield Answer(index=index, tokens=row[:end], ended=end is not None)


def _greedy(config: Any, limits: Limits) -> Any:
    """The model's own settings without sampling; a repetition penalty stays, since servers apply it too."""
    greedy = copy.deepcopy(config)
    greedy.do_sample = False
    greedy.temperature = greedy.top_p = greedy.top_k = greedy.min_p = None
    greedy.max_length = None
    greedy.max_new_tokens = limits.max_new_tokens
    greedy.eos_token_id = sorted(limits.end_ids)
    greedy.pad_token_id = limits.pad_id
    return greedy
