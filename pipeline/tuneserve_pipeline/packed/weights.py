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
from tuneserve_pipeline.packed.layer import Linear, Shape

MODEL_TYPES = frozenset({"llama", "mistral", "qwen2", "qwen3"})
#: Sizes of a head that the attention kernels have tiles for.
HEAD_DIMS = (64, 128)
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
    if _head_dim(config) not in HEAD_DIMS:
        return f"heads of {_head_dim(config)} are none of {', '.join(map(str, HEAD_DIMS))}"
    if missing := [name for name in _LINEARS if name not in adapted]:
        return f"{', '.join(missing)} get no adapter"
    if extra := sorted(set(adapted) - set(_LINEARS)):
        return f"{', '.join(extra)} get one too"
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


def shape_of(model: nn.Module) -> Shape:
    config: Any = model.config.get_text_config()  # type: ignore[operator,union-attr]
    return Shape(
        hidden=config.hidden_size,
        intermediate=config.intermediate_size,
        layers=config.num_hidden_layers,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=_head_dim(config),
        eps=config.rms_norm_eps,
    )


def _head_dim(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _layers(model: nn.Module) -> Sequence[Any]:
    return model.get_base_model().model.layers  # type: ignore[operator,union-attr,return-value]


def _parts(layer: Any) -> list[tuple[Any, str]]:
    return [(layer.self_attn if "_proj" in name and name[0] in "qkvo" else layer.mlp, name) for name in _LINEARS]


class AdapterPart:
    """The adapters of one kind of linear layer: a stack of all layers' parameters and gradients, in fp32."""

    def __init__(self, adapters: Sequence[Any], *, row: int, column: int) -> None:
        self.parameters = [(each.lora_A[_ADAPTER].weight, each.lora_B[_ADAPTER].weight) for each in adapters]
        self.scaling = float(adapters[0].scaling[_ADAPTER])
        self.a = torch.stack([a.detach().float() for a, _ in self.parameters])
        self.b = torch.stack([b.detach().float() for _, b in self.parameters])
        self.da, self.db = torch.zeros_like(self.a), torch.zeros_like(self.b)
        for index, (a, b) in enumerate(self.parameters):
            a.data, b.data = self.a[index], self.b[index]
        self.rows = slice(row, row + self.b.shape[1])
        self.columns = slice(column, column + self.a.shape[1])

    def set_gradients(self) -> None:
        for index, (a, b) in enumerate(self.parameters):
            a.grad, b.grad = self.da[index], self.db[index]


class Adapters:
    """The adapters of linear layers that have their input in common, of all layers, as bfloat16 copies in one stack.

    In stacks, so that a copy or a sum takes one kernel for all layers and not one for each.
    """

    def __init__(self, layers: Sequence[Sequence[Any]]) -> None:
        self.parts: list[AdapterPart] = []
        row = column = 0
        for adapters in zip(*layers, strict=True):
            part = AdapterPart(adapters, row=row, column=column)
            self.parts.append(part)
            row, column = part.rows.stop, part.columns.stop
        wide = -(-column // _COLUMNS) * _COLUMNS
        count, _, k = self.parts[0].a.shape
        device = self.parts[0].a.device
        self._a = torch.zeros(count, wide, k, dtype=torch.bfloat16, device=device)
        self._b = torch.zeros(count, row, wide, dtype=torch.bfloat16, device=device)
        self.a = [each.detach().requires_grad_() for each in self._a]
        self.b = [each.detach().requires_grad_() for each in self._b]

    @torch.no_grad()
    def refresh(self) -> None:
        """Takes over the parameters as the optimizer has left them."""
        for part in self.parts:
            self._a[:, part.columns].copy_(part.a)
            torch.mul(part.b, part.scaling, out=self._b[:, part.rows, part.columns])

    @torch.no_grad()
    def clear_gradients(self) -> None:
        for part in self.parts:
            part.da.zero_()
            part.db.zero_()

    @torch.no_grad()
    def add_gradients(self, das: Sequence[Tensor], dbs: Sequence[Tensor]) -> None:
        """Gradients of the copies, of each layer, onto those of the parameters."""
        da, db = torch.stack(list(das)), torch.stack(list(dbs))
        for part in self.parts:
            part.da.add_(da[:, part.columns])
            part.db.add_(db[:, part.rows, part.columns], alpha=part.scaling)


class FusedLinear:
    """Frozen linear layers that have their input in common, as one product."""

    def __init__(self, bases: Sequence[Any], *, a: Tensor, b: Tensor) -> None:
        self.a, self.b = a, b
        self.packed = torch.cat([_payload(base) for base in bases])
        self.absmax = torch.cat([_scales(base) for base in bases])
        self.unpacked: Tensor | None = None
        self.bias: Tensor | None = None
        if bases[0].bias is not None:
            self.bias = torch.cat([base.bias.detach() for base in bases]).to(torch.bfloat16)
        row = 0
        for base in bases:
            base.weight.data = self.packed[row : row + base.out_features].view(base.weight.shape)
            row += base.out_features

    def linear(self) -> Linear:
        payload = self.packed if self.unpacked is None else self.unpacked
        return payload, self.absmax, self.a, self.b, self.bias

    @property
    def unpacked_bytes(self) -> int:
        return 2 * self.b.shape[0] * (self.a.shape[1] + self.a.shape[0])

    @torch.no_grad()
    def keep_unpacked(self) -> None:
        """Spends `unpacked_bytes` of memory to unpack no more."""
        wide = self.packed.new_empty(self.b.shape[0], self.a.shape[1] + self.a.shape[0], dtype=torch.bfloat16)
        unpack_into(wide, self.packed, self.absmax, self.b.detach())
        self.unpacked = wide

    @torch.no_grad()
    def refresh(self) -> None:
        if self.unpacked is not None:
            self.unpacked[:, self.a.shape[1] :].copy_(self.b)


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

    def flat(self) -> tuple[Tensor | None, ...]:
        """As `decoder_layer` takes them."""
        norms = (self.input_norm, self.post_norm, self.q_norm, self.k_norm)
        return (*norms, *(each for linear in self.linears for each in linear.linear()))


@dataclass(frozen=True, kw_only=True)
class FusedModel:
    layers: Sequence[FusedLayer]
    adapters: Sequence[Adapters]
    """Of qkv, o, gate and up, and down; each of all layers."""

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [each for some in self.adapters for part in some.parts for pair in part.parameters for each in pair]


def fuse(model: nn.Module) -> FusedModel:
    """Moves the weights of all layers into fused buffers, layer by layer, so that only one is there twice."""
    groups = [
        [
            [attention.q_proj, attention.k_proj, attention.v_proj],
            [attention.o_proj],
            [mlp.gate_proj, mlp.up_proj],
            [mlp.down_proj],
        ]
        for attention, mlp in ((layer.self_attn, layer.mlp) for layer in _layers(model))
    ]
    adapters = [Adapters(of_all_layers) for of_all_layers in zip(*groups, strict=True)]
    fused = []
    for index, layer in enumerate(_layers(model)):
        attention = layer.self_attn
        qkv, o, gate_up, down = (
            FusedLinear([linear.base_layer for linear in group], a=some.a[index], b=some.b[index])
            for group, some in zip(groups[index], adapters, strict=True)
        )
        fused.append(
            FusedLayer(
                input_norm=_vector(layer.input_layernorm),
                post_norm=_vector(layer.post_attention_layernorm),
                q_norm=_vector(attention.q_norm) if hasattr(attention, "q_norm") else None,
                k_norm=_vector(attention.k_norm) if hasattr(attention, "k_norm") else None,
                qkv=qkv,
                o=o,
                gate_up=gate_up,
                down=down,
            )
        )
    return FusedModel(layers=fused, adapters=adapters)


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
