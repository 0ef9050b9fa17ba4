"""How each method holds the base model, what it makes trainable, and how its weights come back from a checkpoint.

Adapters of a quantized base are bfloat16, like all that computes there; those of a base in 16 bits are fp32: the
vectors of IA3 start at 1, where bfloat16 has no room for the steps of a training.
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import (
    IA3Config,
    LoraConfig,
    PeftConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptTuningConfig,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, GenerationConfig, PreTrainedModel

from tuneserve_pipeline.contract import Method, TrainSpec
from tuneserve_pipeline.errors import InvalidConfig

#: Layers that IA3 scales the outputs of (keys and values) and the inputs of (the second half of the feed-forward
#: part), by the names that the families give them.
_ATTENTION = ("k_proj", "v_proj", "query_key_value", "qkv_proj", "c_attn", "Wqkv", "key_proj", "value_proj")
_FEED_FORWARD = ("down_proj", "dense_4h_to_h", "fc_out", "fc2", "w2", "c_proj")


def load_base(path: Path, *, spec: TrainSpec, device: str) -> PreTrainedModel:
    """The base model as `spec.method` trains it."""
    if spec.method is Method.QLORA:
        return load_quantized(path, device=device)
    if spec.method is Method.LORA and spec.lora.base_bits == 8:
        return _load(path, device=device, quantization_config=BitsAndBytesConfig(load_in_8bit=True))
    if spec.method is not Method.FULL:
        return _load(path, device=device)
    # Steps of a full training are smaller than what bfloat16 can tell apart: most weights would never move.
    model = _load(path, device=device, dtype=torch.float32)
    # The library writes no checkpoint with settings for sampling that are not in use, and many bases have such.
    model.generation_config = GenerationConfig(eos_token_id=model.generation_config.eos_token_id)
    return model


def load_quantized(path: Path, *, device: str) -> PreTrainedModel:
    """The base in NF4 with double quantization; what is not quantized, and all arithmetic, in bfloat16."""
    return _load(
        path,
        device=device,
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        ),
    )


def _load(path: Path, *, device: str, dtype: torch.dtype = torch.bfloat16, **options: Any) -> PreTrainedModel:
    # It asks for a package that would fetch compiled code from the hub.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)  # a line for each product
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        path,
        dtype=dtype,
        device_map={"": "cuda:0" if device == "cuda" else "cpu"},
        use_safetensors=True,
        trust_remote_code=False,
        **options,
    )
    return model


def adapter_config(spec: TrainSpec, *, model: PreTrainedModel) -> PeftConfig | None:
    """What PEFT adds to `model`; None where the model itself is trained."""
    if spec.method is Method.FULL:
        return None
    if spec.method is Method.IA3:
        return _ia3_config(linear_layers(model))
    if spec.method is Method.PROMPT_TUNING:
        return PromptTuningConfig(
            task_type="CAUSAL_LM",
            num_virtual_tokens=spec.prompt.virtual_tokens,
            # Of the size that embeddings have; normal random numbers are fifty times as large.
            prompt_tuning_init="SAMPLE_VOCAB",
        )
    if spec.method is Method.PREFIX_TUNING:
        return PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=spec.prompt.virtual_tokens)
    return lora_config(spec, layers=linear_layers(model))


def lora_config(spec: TrainSpec, *, layers: Sequence[str]) -> LoraConfig:
    """`layers`: names of all linear layers."""
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=spec.lora.rank,
        lora_alpha=spec.lora.alpha,
        lora_dropout=spec.lora.dropout,
        use_rslora=spec.lora.rank_stabilized,
        use_dora=spec.lora.weight_decomposed,
        # By short names, as servers know them; "all-linear" would list each layer's path.
        target_modules=list(spec.lora.target_modules or layers),
    )


def _ia3_config(layers: Sequence[str]) -> IA3Config:
    attention = [name for name in layers if name in _ATTENTION]
    feed_forward = [name for name in layers if name in _FEED_FORWARD]
    if not attention or not feed_forward:
        raise InvalidConfig(
            reason="MethodUnsupported",
            message="spec.method IA3: which layers of this model make keys, values and the output of the feed-forward "
            f"part is not known (its linear layers: {', '.join(layers)}); choose QLoRA or LoRA",
        )
    return IA3Config(
        task_type="CAUSAL_LM", target_modules=[*attention, *feed_forward], feedforward_modules=feed_forward
    )


def linear_layers(model: torch.nn.Module) -> list[str]:
    """Names that `targetModules` may hold: the last part of each linear layer's, but for the output layer."""
    output_layer = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    return sorted(
        {
            name.rsplit(".", 1)[-1]
            for name, layer in model.named_modules()
            if isinstance(layer, torch.nn.Linear) and layer is not output_layer
        }
    )


def plain_model(model: torch.nn.Module) -> PreTrainedModel:
    """The model of transformers, with whatever layers an adapter has put into it."""
    return model.get_base_model() if isinstance(model, PeftModel) else model  # type: ignore[return-value]


def load_weights(model: torch.nn.Module, checkpoint: Path) -> None:
    """What was trained, as a checkpoint has it, in the number type that it is trained in."""
    if not isinstance(model, PeftModel):
        model.load_state_dict(_load(checkpoint, device="cpu", dtype=torch.float32).state_dict())
        return
    # The library's way turns bfloat16 adapters into fp32 ones: another course than that of an undisturbed run.
    result = set_peft_model_state_dict(model, load_file(checkpoint / "adapter_model.safetensors"))
    # The library loads a learned prompt by itself, and then counts it as unknown.
    unknown = [key for key in result.unexpected_keys if key != "prompt_embeddings"]
    if unknown:
        raise ValueError(f"{checkpoint} holds weights of another adapter: {unknown[:3]}")
