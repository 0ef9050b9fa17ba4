"""The weights of a Llama-like transformers model under PEFT, laid out for the packed layer.

The fused buffers take the place of the model's own memory: its modules look into them, so that nothing is held twice
and the model can still be run, saved and evaluated as a model.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tuneserve_pipeline.packed.kernels import BLOCK, unpack_into
from tuneserve_pipeline.packed.layer import LayerWeights, Linear, Shape

MODEL_TYPES = frozenset({"llama", "mistral", "qwen2", "qwen3"})
#: The adapters' columns behind a weight: whole steps of the product's inner loop.
_COLUMNS = 64
_ADAPTER = "default"
_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def unsupported(model: Any, *, adapted: Collection[str], dropout: float, longest: int) -> str | None:
    """Why the packed layer cannot stand for those of this transformers model in NF4; none: it can.

    `adapted`: names of the linear layers that get an adapter. `longest`: tokens of the longest row.
    """
    config: Any = model.config.get_text_config()
    if config.model_type not in MODEL_TYPES:
        return f"layers of {config.model_type} are of another kind"
    if getattr(config, "hidden_act", "silu") != "silu":
        return f"the activation is {config.hidden_act}"
    window = getattr(config, "sliding_window", None)
    if window is not None and getattr(config, "use_sliding_window", True) and window < longest:
        return f"rows are longer than the attention window of {window} tokens"
    kind = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if kind not in ("default", "linear", "llama3", "yarn"):
        return f"the rotary embedding {kind} depends on the length of a row"
    if missing := [name for name in _LINEARS if name not in adapted]:
        return f"{', '.join(missing)} get no adapter"
    if dropout:
        return "adapters have dropout"
    for layer in model.model.layers:
        for part, name in _parts(layer):
            linear: Any = getattr(part, name)
            if type(linear).__name__ != "Linear4bit":
                return f"{name} is not in NF4"
            if linear.out_features % 64 or linear.in_features % 128:
                return f"{name} of {linear.out_features} x {linear.in_features} does not divide into tiles"
            if linear.bias is not None and name not in ("q_proj", "k_proj", "v_proj"):
                return f"{name} has a bias"
    return None


def shape_of(model: nn.Module, *, longest: int) -> Shape:
    config: Any = model.config.get_text_config()  # type: ignore[operator,union-attr]
    return Shape(
        hidden=config.hidden_size,
        intermediate=config.intermediate_size,
        layers=config.num_hidden_layers,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        eps=config.rms_norm_eps,
        longest=longest,
    )


def _layers(model: nn.Module) -> Sequence[Any]:
    return model.get_base_model().model.layers  # type: ignore[operator,union-attr,return-value]


def _parts(layer: Any) -> list[tuple[Any, str]]:
    return [(layer.self_attn if "_proj" in name and name[0] in "qkvo" else layer.mlp, name) for name in _LINEARS]


@dataclass(frozen=True, kw_only=True)
class AdapterPart:
    """The adapter of one linear layer, and where it lies in the fused one."""

    a: nn.Parameter
    b: nn.Parameter
    scaling: float
    a_rows: slice
    b_rows: slice


class FusedLinear:
    """Linear layers that have their input in common, as one product with one adapter."""

    def __init__(self, linears: Sequence[Any]) -> None:
        bases = [linear.base_layer for linear in linears]
        device = bases[0].weight.device
        self.n = sum(base.out_features for base in bases)
        self.k = bases[0].in_features
        self.packed = torch.cat([_payload(base) for base in bases])
        self.absmax = torch.cat([_scales(base) for base in bases])
        self.unpacked: Tensor | None = None
        self.bias = (
            None if bases[0].bias is None else torch.cat([base.bias.detach() for base in bases]).to(torch.bfloat16)
        )
        rank = sum(linear.lora_A[_ADAPTER].weight.shape[0] for linear in linears)
        columns = -(-rank // _COLUMNS) * _COLUMNS
        self.a = torch.zeros(columns, self.k, dtype=torch.bfloat16, device=device, requires_grad=True)
        self.b = torch.zeros(self.n, columns, dtype=torch.bfloat16, device=device, requires_grad=True)
        self.parts: list[AdapterPart] = []
        row = column = 0
        for linear, base in zip(linears, bases, strict=True):
            a, b = linear.lora_A[_ADAPTER].weight, linear.lora_B[_ADAPTER].weight
            self.parts.append(
                AdapterPart(
                    a=a,
                    b=b,
                    scaling=linear.scaling[_ADAPTER],
                    a_rows=slice(column, column + a.shape[0]),
                    b_rows=slice(row, row + b.shape[0]),
                )
            )
            base.weight.data = self.packed[row : row + b.shape[0]].view(base.weight.shape)
            row, column = row + b.shape[0], column + a.shape[0]

    def linear(self) -> Linear:
        payload = self.packed if self.unpacked is None else self.unpacked
        return payload, self.absmax, self.a, self.b, self.bias

    @property
    def unpacked_bytes(self) -> int:
        return 2 * self.n * (self.k + self.a.shape[0])

    @torch.no_grad()
    def keep_unpacked(self) -> None:
        """Spends `unpacked_bytes` of memory to unpack no more."""
        wide = torch.empty(self.n, self.k + self.a.shape[0], dtype=torch.bfloat16, device=self.packed.device)
        unpack_into(wide, self.packed, self.absmax, self.b)
        self.unpacked = wide

    @torch.no_grad()
    def refresh(self) -> None:
        """The adapter's bfloat16 copy, from the fp32 parameters that the optimizer changed."""
        for part in self.parts:
            self.a[part.a_rows].copy_(part.a)
            self.b[part.b_rows, part.a_rows].copy_(part.b * part.scaling)
        if self.unpacked is not None:
            self.unpacked[:, self.k :].copy_(self.b)

    @torch.no_grad()
    def add_gradients(self, da: Tensor, db: Tensor, into: dict[nn.Parameter, Tensor]) -> None:
        """Adds the gradients of the fused copies to those of the parameters, in fp32."""
        for part in self.parts:
            into[part.a].add_(da[part.a_rows])
            into[part.b].add_(db[part.b_rows, part.a_rows], alpha=part.scaling)


@dataclass(frozen=True, kw_only=True)
class FusedLayer:
    input_norm: Tensor
    post_norm: Tensor
    q_norm: Tensor | None
    k_norm: Tensor | None
    qkv: FusedLinear
    o: FusedLinear
    gate_up: FusedLinear
    down: FusedLinear

    @property
    def linears(self) -> tuple[FusedLinear, ...]:
        return self.qkv, self.o, self.gate_up, self.down

    def weights(self) -> LayerWeights:
        return LayerWeights(
            input_norm=self.input_norm,
            post_norm=self.post_norm,
            q_norm=self.q_norm,
            k_norm=self.k_norm,
            qkv=self.qkv.linear(),
            o=self.o.linear(),
            gate_up=self.gate_up.linear(),
            down=self.down.linear(),
        )


def fuse(model: nn.Module) -> list[FusedLayer]:
    """Moves the weights of all layers into fused buffers, layer by layer, so that only one is there twice."""
    fused = []
    for layer in _layers(model):
        attention, mlp = layer.self_attn, layer.mlp
        fused.append(
            FusedLayer(
                input_norm=_vector(layer.input_layernorm),
                post_norm=_vector(layer.post_attention_layernorm),
                q_norm=_vector(attention.q_norm) if hasattr(attention, "q_norm") else None,
                k_norm=_vector(attention.k_norm) if hasattr(attention, "k_norm") else None,
                qkv=FusedLinear([attention.q_proj, attention.k_proj, attention.v_proj]),
                o=FusedLinear([attention.o_proj]),
                gate_up=FusedLinear([mlp.gate_proj, mlp.up_proj]),
                down=FusedLinear([mlp.down_proj]),
            )
        )
    return fused


def rotary_tables(model: nn.Module, *, longest: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin, (longest, head_dim / 2) in fp32, by the model's own module."""
    positions = torch.arange(longest, device=device)[None]
    rotary: Any = model.get_base_model().model.rotary_emb  # type: ignore[operator,union-attr]
    with torch.no_grad():
        cos, sin = rotary(torch.zeros(1, device=device), positions)
    half = cos.shape[-1] // 2
    return cos[0, :, :half].float().contiguous(), sin[0, :, :half].float().contiguous()


def _vector(norm: Any) -> Tensor:
    return norm.weight.detach().to(torch.bfloat16)  # type: ignore[no-any-return]


def _payload(base: Any) -> Tensor:
    return base.weight.data.view(torch.uint8).view(base.out_features, base.in_features // 2)  # type: ignore[no-any-return]


def _scales(base: Any) -> Tensor:
    import bitsandbytes.functional as bnb

    state = base.weight.quant_state
    assert state.blocksize == BLOCK
    absmax = state.absmax
    if state.nested:
        absmax = bnb.dequantize_blockwise(absmax, state.state2) + state.offset
    return absmax.float().view(base.out_features, base.in_features // BLOCK)  # type: ignore[no-any-return]
