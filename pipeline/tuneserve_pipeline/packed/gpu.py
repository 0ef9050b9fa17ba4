"""The Triton kernels: unpacking of NF4, the activation backwards, attention within rows. Imported on GPU machines only.

Attention as in Dao 2023, "FlashAttention-2", over one stream of tokens: a tile of queries looks back to the begin of
its first row and no further, and a mask parts the rows. A grid over rows of a hundred tokens would consist mostly of
blocks with nothing to do.
"""

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


@triton.jit
def swiglu_backward_kernel(both, dact, act, dboth, f, width: tl.constexpr):
    """A row of silu(gate) * up: the activation again, and the gradients of gate and up behind each other."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * width + tl.arange(0, width)
    inside = columns < f
    gate = tl.load(both + row * 2 * f + columns, mask=inside, other=0).to(tl.float32)
    up = tl.load(both + row * 2 * f + f + columns, mask=inside, other=0).to(tl.float32)
    d = tl.load(dact + row * f + columns, mask=inside, other=0).to(tl.float32)
    s = tl.sigmoid(gate)
    tl.store(act + row * f + columns, (gate * s * up).to(tl.bfloat16), mask=inside)
    dgate = d * up * s * (1 + gate * (1 - s))
    tl.store(dboth + row * 2 * f + columns, dgate.to(tl.bfloat16), mask=inside)
    tl.store(dboth + row * 2 * f + f + columns, (d * gate * s).to(tl.bfloat16), mask=inside)


@triton.jit
def attention_kernel(q, k, v, begins, out, lse, scale, t, heads, groups, tile: tl.constexpr, d: tl.constexpr):
    """A tile of queries of one head. `scale` is that of the logits times log2(e); `lse` is to the base of 2."""
    m = tl.program_id(0) * tile + tl.arange(0, tile)
    head = tl.program_id(1)
    kv_heads = heads // groups
    columns = tl.arange(0, d)
    begin = tl.load(begins + m)
    query = tl.load(q + (m[:, None] * heads + head) * d + columns[None, :])
    best = tl.full([tile], float("-inf"), tl.float32)
    total = tl.zeros([tile], tl.float32)
    acc = tl.zeros([tile, d], tl.float32)
    first = tl.min(begin, 0) // tile
    for block in range(first, tl.program_id(0) + 1):
        n = block * tile + tl.arange(0, tile)
        at = (n[:, None] * kv_heads + head // groups) * d + columns[None, :]
        logits = tl.dot(query, tl.trans(tl.load(k + at))) * scale
        seen = (n[None, :] <= m[:, None]) & (n[None, :] >= begin[:, None])
        logits = tl.where(seen, logits, -1.0e30)
        higher = tl.maximum(best, tl.max(logits, 1))
        shrink = tl.exp2(best - higher)
        p = tl.where(seen, tl.exp2(logits - higher[:, None]), 0.0)
        total = total * shrink + tl.sum(p, 1)
        acc = acc * shrink[:, None] + tl.dot(p.to(tl.bfloat16), tl.load(v + at))
        best = higher
    tl.store(out + (m[:, None] * heads + head) * d + columns[None, :], (acc / total[:, None]).to(tl.bfloat16))
    tl.store(lse + head * t + m, best + tl.log2(total))


@triton.jit
def attention_dq_kernel(
    q, k, v, begins, dout, lse, delta, dq, scale, raw_scale, t, heads, groups, tile: tl.constexpr, d: tl.constexpr
):
    m = tl.program_id(0) * tile + tl.arange(0, tile)
    head = tl.program_id(1)
    kv_heads = heads // groups
    columns = tl.arange(0, d)
    begin = tl.load(begins + m)
    here = (m[:, None] * heads + head) * d + columns[None, :]
    query, do = tl.load(q + here), tl.load(dout + here)
    norm, away = tl.load(lse + head * t + m), tl.load(delta + m * heads + head)
    acc = tl.zeros([tile, d], tl.float32)
    for block in range(tl.min(begin, 0) // tile, tl.program_id(0) + 1):
        n = block * tile + tl.arange(0, tile)
        at = (n[:, None] * kv_heads + head // groups) * d + columns[None, :]
        key = tl.load(k + at)
        seen = (n[None, :] <= m[:, None]) & (n[None, :] >= begin[:, None])
        p = tl.where(seen, tl.exp2(tl.dot(query, tl.trans(key)) * scale - norm[:, None]), 0.0)
        dp = tl.dot(do, tl.trans(tl.load(v + at)))
        acc += tl.dot((p * (dp - away[:, None])).to(tl.bfloat16), key)
    tl.store(dq + here, (acc * raw_scale).to(tl.bfloat16))


@triton.jit
def attention_dkv_kernel(
    q,
    k,
    v,
    begins,
    ends,
    dout,
    lse,
    delta,
    dk,
    dv,
    scale,
    raw_scale,
    t,
    heads,
    groups,
    tile: tl.constexpr,
    d: tl.constexpr,
):
    """A tile of keys and values of one of their heads, with the queries of all heads that share it."""
    n = tl.program_id(0) * tile + tl.arange(0, tile)
    kv_head = tl.program_id(1)
    kv_heads = heads // groups
    columns = tl.arange(0, d)
    at = (n[:, None] * kv_heads + kv_head) * d + columns[None, :]
    key, value = tl.load(k + at), tl.load(v + at)
    dkey, dvalue = tl.zeros([tile, d], tl.float32), tl.zeros([tile, d], tl.float32)
    last = (tl.max(tl.load(ends + n), 0) + tile - 1) // tile
    for head in range(kv_head * groups, (kv_head + 1) * groups):
        for block in range(tl.program_id(0), last):
            m = block * tile + tl.arange(0, tile)
            here = (m[:, None] * heads + head) * d + columns[None, :]
            query, do = tl.load(q + here), tl.load(dout + here)
            begin = tl.load(begins + m)
            seen = (n[:, None] <= m[None, :]) & (n[:, None] >= begin[None, :])
            norm, away = tl.load(lse + head * t + m), tl.load(delta + m * heads + head)
            p = tl.where(seen, tl.exp2(tl.dot(key, tl.trans(query)) * scale - norm[None, :]), 0.0)
            dvalue += tl.dot(p.to(tl.bfloat16), do)
            dp = tl.dot(value, tl.trans(do))
            dkey += tl.dot((p * (dp - away[None, :])).to(tl.bfloat16), query)
    tl.store(dk + at, (dkey * raw_scale).to(tl.bfloat16))
    tl.store(dv + at, dvalue.to(tl.bfloat16))
