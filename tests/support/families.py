"""Tiny configurations of the model families that are supported, each with what sets its family apart."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_SIZE: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 512,
}
_LLAMA_3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_QUARTER = {"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 0.25}
#: Family -> model type, and what differs from `_SIZE`.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-2-70b": ("llama", {"num_key_value_heads": 1}),
    "llama-3": ("llama", {"num_key_value_heads": 1, "rope_parameters": _LLAMA_3_ROPE, "tie_word_embeddings": True}),
    "mistral": ("mistral", {"num_key_value_heads": 1, "sliding_window": 32}),
    "qwen2": ("qwen2", {"num_key_value_heads": 1, "tie_word_embeddings": True}),  # Qwen2.5 too: biases on q, k, v
    "qwen3": ("qwen3", {"num_key_value_heads": 1, "head_dim": 32}),
    # Queries, keys and values in one layer: as many as there are heads, one for all, or one for each group.
    "falcon-7b": ("falcon", {"multi_query": True, "parallel_attn": True, "bias": False}),
    "falcon-40b": ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 1}),
    "falcon-rw": ("falcon", {"multi_query": False, "parallel_attn": False, "alibi": True, "bias": True}),
    "stablelm": ("stablelm", {"num_key_value_heads": 2, "rope_parameters": _QUARTER, "use_qkv_bias": True}),
    "stablelm-2-12b": (
        "stablelm",
        {"num_key_value_heads": 1, "rope_parameters": _QUARTER, "qk_layernorm": True, "use_parallel_residual": True},
    ),
    "gpt-neox": ("gpt_neox", {"rope_parameters": _QUARTER}),
    "gpt-j": (
        "gptj",
        {"n_embd": 128, "n_layer": 2, "n_head": 2, "rotary_dim": 16, "n_positions": 512},
    ),
    "glm-4": ("glm", {"num_key_value_heads": 1, "head_dim": 64}),
    "glm-4-0414": ("glm4", {"num_key_value_heads": 1, "head_dim": 64, "partial_rotary_factor": 0.5}),
}


def tiny_config(family: str) -> "PretrainedConfig":
    from transformers import CONFIG_MAPPING

    model_type, differences = FAMILIES[family]
    size = {} if model_type == "gptj" else _SIZE
    return CONFIG_MAPPING[model_type](**{**size, **differences})
