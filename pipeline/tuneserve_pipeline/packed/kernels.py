"""What the compiler shall leave alone: products with a frozen NF4 weight and its adapter, and attention within rows.

A weight of shape (n, k) is unpacked into scratch of (n, k + e), the adapter's B in its last e columns; inputs come as
(t, k + e), and their last columns are room for h = x A^T. So y = x W^T + h B^T is one product, and the adapter costs
one more step of its inner loop instead of another pass over y.

NF4: Dettmers et al. 2023, "QLoRA", section 3; the format of bitsandbytes 0.50 (blocks of 64 in a row-major weight, the
first of two values in the high half of a byte), unpacked to the same bfloat16 values.
"""

from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

#: Weights in a block with one scale.
BLOCK = 64
#: Tiles in which a weight is unpacked: the quickest on an H200 of those tried.
HEIGHT, WIDTH, WARPS = 16, 256, 2

#: The sixteen values of NF4.
CODE: dict[torch.device, Tensor] = {}


def code_on(device: torch.device) -> Tensor:
    if device not in CODE:
        import bitsandbytes.functional as bnb

        CODE[device] = bnb.get_4bit_type("nf4", device=device).float()
    return CODE[device]


def unpack(packed: Tensor, absmax: Tensor, b: Tensor) -> Tensor:
    """(n, k + e) in bfloat16 from (n, k / 2) bytes, (n, k / 64) scales and B (n, e); as it is if unpacked already."""
    if packed.dtype is torch.bfloat16:
        return packed
    n, k, e = packed.shape[0], 2 * packed.shape[1], b.shape[1]
    out = torch.empty((n, k + e), dtype=torch.bfloat16, device=packed.device)
    unpack_into(out, packed, absmax, b)
    return out


def unpack_into(out: Tensor, packed: Tensor, absmax: Tensor, b: Tensor) -> None:
    n, k, e = packed.shape[0], 2 * packed.shape[1], b.shape[1]
    if packed.is_cuda:
        height = HEIGHT if n % HEIGHT == 0 else 64
        width = WIDTH if k % WIDTH == 0 else 128
        _gpu().unpack_kernel[(n // height, k // width + 1)](
            packed, absmax, code_on(packed.device), b, b.stride(0), out, k, e, height, width, num_warps=WARPS
        )
        return
    values = code_on(packed.device)[torch.stack((packed >> 4, packed & 15), -1).view(n, k).int()]
    out[:, :k] = (values.view(n, k // BLOCK, BLOCK) * absmax[:, :, None]).view(n, k)
    out[:, k:] = b


def _gpu() -> Any:
    """Late: triton is on GPU machines only."""
    from tuneserve_pipeline.packed import gpu

    return gpu


@custom_op("tuneserve::lora_forward", mutates_args=())
def lora_forward(x: Tensor, packed: Tensor, absmax: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """(t, k + e) -> y (t, n) and h (t, e). Writes h into the last columns of x, which nobody else may read."""
    k = a.shape[1]
    h = x[:, :k] @ a.t()
    x[:, k:].copy_(h)
    return x @ unpack(packed, absmax, b).t(), h


@lora_forward.register_fake
def _(x: Tensor, packed: Tensor, absmax: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[0], b.shape[0]), x.new_empty(x.shape[0], a.shape[0])


@custom_op("tuneserve::lora_backward", mutates_args=())
def lora_backward(
    dy: Tensor, h: Tensor, packed: Tensor, absmax: Tensor, a: Tensor, b: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x (t, k), of h (t, e) and of B (n, e); A's is dh^T x."""
    dh = dy @ b
    # In this order the adapter's share is read where the product is written, and not once more after it.
    dx = (dh @ a).addmm_(dy, unpack(packed, absmax, b)[:, : a.shape[1]])
    return dx, dh, dy.t() @ h


@lora_backward.register_fake
def _(dy: Tensor, h: Tensor, packed: Tensor, absmax: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return dy.new_empty(dy.shape[0], a.shape[1]), torch.empty_like(h), dy.new_empty(b.shape)


@custom_op("tuneserve::swiglu_backward", mutates_args=())
def swiglu_backward(both: Tensor, dact: Tensor) -> tuple[Tensor, Tensor]:
    """gate and up (t, 2 f), the gradient of silu(gate) * up (t, f) -> the activation, the gradient of both."""
    act, dboth = torch.empty_like(dact), torch.empty_like(both)
    t, f = dact.shape
    if both.is_cuda:
        _gpu().swiglu_backward_kernel[(t, -(-f // 2048))](both, dact, act, dboth, f, width=2048, num_warps=8)
        return act, dboth
    gate, up = both.float().chunk(2, -1)
    s = torch.sigmoid(gate)
    act.copy_(gate * s * up)
    dboth.copy_(torch.cat([dact * up * s * (1 + gate * (1 - s)), dact * gate * s], -1))
    return act, dboth


@swiglu_backward.register_fake
def _(both: Tensor, dact: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(dact), torch.empty_like(both)


#: Tokens of a tile of attention: rows have about a hundred.
TILE = 64
#: Bytes of shared memory from which on the loops of the backward pass are pipelined: data-centre cards have it.
_PIPELINED = 160 * 2**10
_LOG2_E = 1.4426950408889634


@custom_op("tuneserve::row_attention", mutates_args=())
def row_attention(q: Tensor, k: Tensor, v: Tensor, begins: Tensor) -> tuple[Tensor, Tensor]:
    """On a GPU: q (t, heads, d), k and v (t, kv_heads, d) -> (t, heads, d), and the logarithms of the sums."""
    t, heads, d = q.shape
    out, lse = torch.empty_like(q), torch.empty(heads, t, dtype=torch.float32, device=q.device)
    _gpu().attention_kernel[(t // TILE, heads)](
        q,
        k,
        v,
        begins,
        out,
        lse,
        _LOG2_E * d**-0.5,
        t,
        heads,
        heads // k.shape[1],
        tile=TILE,
        d=d,
        num_warps=4,
        num_stages=2,
    )
    return out, lse


@row_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, begins: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q), q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32)


@custom_op("tuneserve::row_attention_backward", mutates_args=())
def row_attention_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, begins: Tensor, ends: Tensor, lse: Tensor, delta: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """`delta` (t, heads): the sums of out times its gradient."""
    (t, heads, d), groups = q.shape, q.shape[1] // k.shape[1]
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    shared = torch.cuda.get_device_properties(q.device).shared_memory_per_block_optin
    stages = 2 if shared >= _PIPELINED else 1
    scales, sizes = (_LOG2_E * d**-0.5, d**-0.5), (t, heads, groups)
    _gpu().attention_dkv_kernel[(t // TILE, heads // groups)](
        q, k, v, begins, ends, dout, lse, delta, dk, dv, *scales, *sizes, tile=TILE, d=d, num_warps=4, num_stages=stages
    )
    _gpu().attention_dq_kernel[(t // TILE, heads)](
        q, k, v, begins, dout, lse, delta, dq, *scales, *sizes, tile=TILE, d=d, num_warps=4, num_stages=stages
    )
    return dq, dk, dv


@row_attention_backward.register_fake
def _(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, begins: Tensor, ends: Tensor, lse: Tensor, delta: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
