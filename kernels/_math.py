"""What the kernels that own one problem a program share: 64-bit offsets, blocks of columns, log2 sums."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def offset(index, size):
    """index * size in 64 bits whatever their types: P * K * M goes past 2^31."""
    return index.to(tl.int64) * size


@triton.jit
def load_block(cost_ptr, b_ptr, a, i, j, K, M):
    """Weights [1, J] of columns j and their costs [I, J] in fp32, inf where a row or column takes no part."""
    b = tl.load(b_ptr + j, mask=j < M, other=0.0)
    at = cost_ptr + (i * M + j)
    cost = tl.load(at, mask=(i < K) & (j < M) & (a > 0) & (b > 0), other=float("inf")).to(tl.float32)
    return b, cost


@triton.jit
def load_rows(cost_ptr, b_ptr, a, i, j, K, M, BLOCK_M: tl.constexpr):
    """Smallest finite cost of every row [I, 1], 0 where there is none; whether any cost is NaN or -inf."""
    low = tl.where(i < K, float("inf"), float("inf"))
    bad = tl.sum(tl.where(i < K, 0, 0))
    for start in range(0, M, BLOCK_M):
        _, cost = load_block(cost_ptr, b_ptr, a, i, start + j, K, M)
        wrong = (cost != cost) | (cost == float("-inf"))
        bad += tl.sum(wrong.to(tl.int32))
        low = tl.minimum(low, tl.min(tl.where(wrong, 0.0, cost), 1, keep_dims=True))
    return tl.where(low == float("inf"), 0.0, low), bad > 0


@triton.jit
def softmin2(z, weight, axis: tl.constexpr):
    """-log2 sum(weight 2^z) along the axis; 0 where no entry is finite."""
    top = tl.max(z, axis, keep_dims=True)
    top = tl.where(top == float("-inf"), 0.0, top)
    total = tl.sum(weight * tl.exp2(z - top), axis, keep_dims=True)
    return -(top + tl.log2(tl.where(total > 0, total, 1.0)))
