"""One decoder layer of the Llama family over packed rows, in bfloat16 with norms, rotation and activation in fp32.

Shapes: t tokens, d hidden, f intermediate. `begins` and `ends` (t, int32): where the row of each token begins and ends.
Must be compilable: no branch on the value of a tensor, no synchronisation.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as functional
from torch import Tensor

from tuneserve_pipeline.packed.kernels import (
    lora_backward,
    lora_forward,
    row_attention,
    row_attention_backward,
    swiglu_backward,
)

BF16 = torch.bfloat16

#: payload, scales, A (e, k), B (n, e), bias (n) or none.
Linear = tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]


@dataclass(frozen=True, kw_only=True)
class Shape:
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    eps: float


class LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, packed: Tensor, absmax: Tensor, a: Tensor, b: Tensor) -> Tensor:
        wide = functional.pad(x, (0, a.shape[0]))
        y, h = lora_forward(wide, packed, absmax, a, b)
        ctx.save_for_backward(wide, h, packed, absmax, a, b)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        wide, h, packed, absmax, a, b = ctx.saved_tensors
        dx, dh, db = lora_backward(dy.contiguous(), h, packed, absmax, a, b)
        return dx, None, None, dh.t() @ wide[:, : a.shape[1]], db


class LoraMlp(torch.autograd.Function):
    """down(silu(gate) * up) as one function, so that the activation is computed again instead of kept."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        packed1: Tensor,
        absmax1: Tensor,
        a1: Tensor,
        b1: Tensor,
        packed2: Tensor,
        absmax2: Tensor,
        a2: Tensor,
        b2: Tensor,
    ) -> Tensor:
        wide = functional.pad(x, (0, a1.shape[0]))
        both, h1 = lora_forward(wide, packed1, absmax1, a1, b1)
        gate, up = both.chunk(2, -1)
        act = (functional.silu(gate.float()) * up).to(BF16)
        y, h2 = lora_forward(functional.pad(act, (0, a2.shape[0])), packed2, absmax2, a2, b2)
        ctx.save_for_backward(wide, both, h1, h2, packed1, absmax1, a1, b1, packed2, absmax2, a2, b2)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        wide, both, h1, h2, packed1, absmax1, a1, b1, packed2, absmax2, a2, b2 = ctx.saved_tensors
        dact, dh2, db2 = lora_backward(dy.contiguous(), h2, packed2, absmax2, a2, b2)
        act, dboth = swiglu_backward(both, dact)
        dx, dh1, db1 = lora_backward(dboth, h1, packed1, absmax1, a1, b1)
        return dx, None, None, dh1.t() @ wide[:, : a1.shape[1]], db1, None, None, dh2.t() @ act, db2


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.float()
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(BF16) * weight


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (t, heads, head_dim); cos and sin (t, 1, head_dim / 2)."""
    a, b = x.float().chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(BF16)


def decoder_layer(
    shape: Shape, x: Tensor, cos: Tensor, sin: Tensor, begins: Tensor, ends: Tensor, *weights: Any
) -> Tensor:
    """x (t, d) -> (t, d); `weights` as `FusedLayer.flat` gives them."""
    input_norm, post_norm, q_norm, k_norm = weights[:4]
    qkv, o, gate_up, down = weights[4:9], weights[9:14], weights[14:19], weights[19:24]
    t, d = x.shape[0], shape.head_dim
    projected = LoraLinear.apply(rms_norm(x, input_norm, shape.eps), *qkv[:4])
    if qkv[4] is not None:
        projected = projected + qkv[4]
    q, k, v = projected.split([shape.heads * d, shape.kv_heads * d, shape.kv_heads * d], -1)
    q, k, v = q.view(t, shape.heads, d), k.view(t, shape.kv_heads, d), v.view(t, shape.kv_heads, d)
    if q_norm is not None:
        q, k = rms_norm(q, q_norm, shape.eps), rms_norm(k, k_norm, shape.eps)
    # A view of v would keep all of q, k and v for the backward pass.
    v = v.clone(memory_format=torch.contiguous_format)
    attended = attend(rotate(q, cos, sin), rotate(k, cos, sin), v, begins, ends)
    x = x + LoraLinear.apply(attended.reshape(t, shape.heads * d), *o[:4])
    return x + LoraMlp.apply(rms_norm(x, post_norm, shape.eps), *gate_up[:4], *down[:4])


class RowAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, begins: Tensor, ends: Tensor) -> Tensor:
        out, lse = row_attention(q, k, v, begins)
        ctx.save_for_backward(q, k, v, begins, ends, out, lse)
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        q, k, v, begins, ends, out, lse = ctx.saved_tensors
        delta = (out.float() * dout).sum(-1)
        return *row_attention_backward(dout.contiguous(), q, k, v, begins, ends, lse, delta), None, None


def attend(q: Tensor, k: Tensor, v: Tensor, begins: Tensor, ends: Tensor) -> Tensor:
    """Causal attention within each row: q (t, heads, d), k and v (t, kv_heads, d) -> (t, heads, d)."""
    if q.is_cuda:
        return RowAttention.apply(q, k, v, begins, ends)  # type: ignore[no-any-return]
    rows, start = [], 0
    while start < len(ends):
        end = int(ends[start])
        parts = (each[start:end].transpose(0, 1)[None] for each in (q, k, v))
        row = functional.scaled_dot_product_attention(*parts, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
        rows.append(row[0].transpose(0, 1))
        start = end
    return torch.cat(rows)


class LabelledLoss(torch.autograd.Function):
    """Sum of the cross-entropies at the labels; the gradient is made at once, in pieces, so that no logits are kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, labels: Tensor, head: Tensor, weight: Tensor, piece: Any, size: int) -> Tensor:
        """x (s, d), labels (s) with -100 for none, head (v, d), weight: scalar that the sum is multiplied with."""
        losses, gradients = [], []
        for start in range(0, x.shape[0], size):
            loss, dlogits = piece(x[start : start + size] @ head.t(), labels[start : start + size], weight)
            losses.append(loss)
            gradients.append(dlogits @ head)
        ctx.save_for_backward(torch.cat(gradients))
        return torch.stack(losses).sum()

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (dx,) = ctx.saved_tensors
        return dx * dloss.to(dx.dtype), None, None, None, None, None


def loss_piece(logits: Tensor, labels: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """logits (s, v) in bfloat16 -> the weighted sum of the losses, and the gradient of the logits in bfloat16."""
    wide = logits.float()
    normal = wide - wide.logsumexp(-1, keepdim=True)
    known = labels >= 0
    at = labels.clamp(min=0)
    losses = -normal.gather(1, at[:, None])[:, 0]
    loss = torch.where(known, losses, 0.0).sum() * weight
    columns = torch.arange(logits.shape[1], device=logits.device)
    gradient = normal.exp() - (columns[None] == at[:, None]).float()
    return loss, (gradient * (known.float() * weight)[:, None]).to(BF16)
