"""The Triton kernel that unpacks NF4. Imported on GPU machines only."""

import triton
import triton.language as tl


@triton.jit
def unpack_kernel(packed, absmax, code, b, b_stride, out, k, e, height: tl.constexpr, width: tl.constexpr):
    """A tile of (height, width) values; the last tiles of a row copy B behind the weight."""
    rows = (tl.program_id(0) * height + tl.arange(0, height)).to(tl.int64)
    if tl.program_id(1) * width < k:
        columns = tl.program_id(1) * width + tl.arange(0, width)
        pairs = tl.program_id(1) * (width // 2) + tl.arange(0, width // 2)
        both = tl.load(packed + rows[:, None] * (k // 2) + pairs[None, :]).to(tl.int32)
        scale = tl.load(absmax + rows[:, None] * (k // 64) + pairs[None, :] // 32)
        values = tl.interleave(tl.load(code + (both >> 4)) * scale, tl.load(code + (both & 15)) * scale)
        tl.store(out + rows[:, None] * (k + e) + columns[None, :], values.to(tl.bfloat16))
    else:
        for first in range(0, e, 64):
            columns = first + tl.arange(0, 64)
            values = tl.load(b + rows[:, None] * b_stride + columns[None, :])
            tl.store(out + rows[:, None] * (k + e) + k + columns[None, :], values)
