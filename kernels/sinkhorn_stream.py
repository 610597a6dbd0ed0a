"""Entropic transport of problems too large for the registers of one program: passes over their columns."""

from __future__ import annotations

import triton
import triton.language as tl

from ._math import load_block, load_rows, offset, softmin2
from ._tiles import BlockConfig, default_blocks


def stream_blocks(K: int, M: int) -> BlockConfig:
    """16 entries a lane: 32 spill."""
    return default_blocks(K, M, 4096, 512)


@triton.jit
def row_update(
    cost_ptr, b_ptr, a, f, shift, i, j, K, M, to_log2, FIRST: tl.constexpr, BLOCK_M: tl.constexpr
):  # fmt: skip
    """The next f [K2, 1], with g of every block from f on the way (g = 0 where FIRST)."""
    top = tl.where(i < K, float("-inf"), float("-inf"))
    total = tl.where(i < K, 0.0, 0.0)
    for start in range(0, M, BLOCK_M):
        b, cost = load_block(cost_ptr, b_ptr, a, i, start + j, K, M)
        z = (shift - cost) * to_log2
        if not FIRST:
            z += softmin2(z + f, a, 0)
        higher = tl.maximum(top, tl.max(z, 1, keep_dims=True))
        base = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp2(top - base) + tl.sum(b * tl.exp2(z - base), 1, keep_dims=True)
        top = higher
    base = tl.where(top == float("-inf"), 0.0, top)
    return -(base + tl.log2(tl.where(total > 0, total, 1.0))), top > float("-inf")


@triton.jit(do_not_specialize=["K", "M", "a_stride", "b_stride", "max_iter"])
def _sinkhorn_stream_kernel(
    cost_ptr, a_ptr, b_ptr, score_ptr, f_ptr, g_ptr, n_iter_ptr, error_ptr,
    K, M, a_stride, b_stride, to_log2, from_log2, max_iter, tol,
    VALUE: tl.constexpr, K2: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """f = -eps log sum_j b e^((g-C)/eps), g = -eps log sum_i a e^((f-C)/eps), alternating from g = 0.

    A program owns one problem, f in registers and a block [K2, BLOCK_M] of columns at a time. One pass over
    the cost, from L2, is one iteration: a block's g follows from f alone and enters the running sums of the
    next f, which also hold the error of (f, g). Log2 domain; f is relative to the row minima of the cost.
    """
    p = tl.program_id(0)
    i = tl.arange(0, K2)[:, None]
    j = tl.arange(0, BLOCK_M)[None, :]
    cost_ptr += offset(p, K) * M
    b_ptr += offset(p, b_stride)
    a = tl.load(a_ptr + offset(p, a_stride) + i, mask=i < K, other=0.0)
    shift, nan = load_rows(cost_ptr, b_ptr, a, i, j, K, M, BLOCK_M)
    f_next, alive = row_update(cost_ptr, b_ptr, a, shift, shift, i, j, K, M, to_log2, True, BLOCK_M)
    live_a = tl.where(alive, a, 0.0)
    f, mass, n = f_next, live_a, 0
    sum_b = 0.0
    for start in range(0, M, BLOCK_M):
        sum_b += tl.sum(tl.load(b_ptr + start + j, mask=start + j < M, other=0.0))
    sum_a = tl.sum(a)
    error = sum_a * 0.0
    live = (sum_a > 0) & (sum_b > 0) & (nan == 0)
    todo = live
    while todo:
        f = f_next
        f_next, _ = row_update(cost_ptr, b_ptr, a, f, shift, i, j, K, M, to_log2, False, BLOCK_M)
        # A row never holds more than all mass; only rounding at a huge range/eps says otherwise.
        mass = tl.minimum(live_a * tl.exp2(f - f_next), 1.0)
        error = tl.sum(tl.abs(mass - a))
        n += 1
        todo = (n < max_iter) & (error > tol)

    score, sum_live_b = error * 0.0, error * 0.0
    for start in range(0, M, BLOCK_M):
        b, cost = load_block(cost_ptr, b_ptr, a, i, start + j, K, M)
        tile = (shift - cost) * to_log2
        g = softmin2(tile + f, a, 0)
        plan = tl.minimum(a * tl.exp2(tile + f + g) * b, b)
        g *= from_log2
        if VALUE:
            score += tl.sum(b * g)
            sum_live_b += tl.sum(tl.where(tl.max(tile, 0, keep_dims=True) > float("-inf"), b, 0.0))
        else:
            score += tl.sum(plan * tl.where(plan > 0, cost, 0.0))
        g = tl.where(nan, float("nan"), tl.where(live, g, 0.0))
        tl.store(g_ptr + offset(p, M) + start + j, tl.where(b > 0, g, 0.0), mask=start + j < M)
    f = shift + f * from_log2
    if VALUE:
        # 1.44 from_log2 is eps.
        score += tl.sum(mass * f) - from_log2 * 1.4426950408889634 * (sum_live_b - sum_a * sum_b)
    f = tl.where(nan, float("nan"), tl.where(live, f, 0.0))
    tl.store(f_ptr + offset(p, K) + i, tl.where(a > 0, f, 0.0), mask=i < K)
    tl.store(score_ptr + p.to(tl.int64), tl.where(nan, float("nan"), tl.where(live, score, 0.0)))
    tl.store(n_iter_ptr + p.to(tl.int64), n)
    tl.store(error_ptr + p.to(tl.int64), tl.where(nan, float("nan"), error))
