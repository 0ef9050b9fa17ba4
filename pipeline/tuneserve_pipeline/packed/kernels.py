"""Products with a frozen NF4 weight and its adapter, as custom operators that the compiler leaves alone.

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
_HALF = BLOCK // 2

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
        size = 128 if n % 128 == 0 else 64
        _kernel()[(n // size, k // 128 + 1)](
            packed, absmax, code_on(packed.device), b, b.stride(0), out, k, e, height=size, width=128, num_warps=8
        )
        return
    values = code_on(packed.device)[torch.stack((packed >> 4, packed & 15), -1).view(n, k).int()]
    out[:, :k] = (values.view(n, k // BLOCK, BLOCK) * absmax[:, :, None]).view(n, k)
    out[:, k:] = b


_KERNEL: Any = None


def _kernel() -> Any:
    """Built at its first use: triton is on GPU machines only."""
    global _KERNEL
    if _KERNEL is None:
        from tuneserve_pipeline.packed.unpacking import unpack_kernel

        _KERNEL = unpack_kernel
    return _KERNEL


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
    dx = dy @ unpack(packed, absmax, b)[:, : a.shape[1]]
    return dx.addmm_(dh, a), dh, dy.t() @ h


@lora_backward.register_fake
def _(dy: Tensor, h: Tensor, packed: Tensor, absmax: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return dy.new_empty(dy.shape[0], a.shape[1]), torch.empty_like(h), dy.new_empty(b.shape)
