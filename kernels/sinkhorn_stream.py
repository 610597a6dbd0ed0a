"""Entropic transport of problems too large for the registers of one program: passes over their columns."""

from __future__ import annotations

import triton
import triton.language as tl

from ._math import load_block, load_rows, offset, problem, score_entries, softmin2


@triton.jit
def row_update(
    rows, b_ptr, a, f, shift, i, j, K, M, to_log2, unit, FIRST: tl.constexpr, BLOCK_M: tl.constexpr
):  # fmt: skip
    """The next f [K2, 1], with g of every block from f on the way (g = 0 where FIRST)."""
    top = tl.where(i < K, float("-inf"), float("-inf"))
    total = tl.where(i < K, 0.0, 0.0)
    for start in range(0, M, BLOCK_M):
        b, cost = load_block(rows, b_ptr, a, i, start + j, K, M, unit)
        z = (shift - cost) * to_log2
        if not FIRST:
            z += softmin2(z + f, a, 0)
        higher = tl.maximum(top, tl.max(z, 1, keep_dims=True))
        base = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp2(top - base) + tl.sum(b * tl.exp2(z - base), 1, keep_dims=True)
        top = higher
    base = tl.where(top == float("-inf"), 0.0, top)
    return -(base + tl.log2(tl.where(total > 0, total, 1.0))), top > float("-inf")


@triton.jit(do_not_specialize=["K", "C", "M", "a_stride", "b_stride", "max_iter"])
def _sinkhorn_stream_kernel(
    cost_ptr, a_ptr, b_ptr, score_ptr, f_ptr, g_ptr, n_iter_ptr, error_ptr,
    K, C, M, a_stride, b_stride, to_log2, from_log2, max_iter, tol, unit,
    VALUE: tl.constexpr, K2: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """f = -eps log sum_j b e^((g-C)/eps), g = -eps log sum_i a e^((f-C)/eps), alternating from g = 0.

    A program owns one problem, f in registers and a block [K2, BLOCK_M] of columns at a time. One pass over
    the cost, from L2, is one iteration: a block's g follows from f alone and enters the running sums of the
    next f, which also hold the error of (f, g). Log2 domain; f is relative to the row minima of the cost.
    Where unit = -1 what is stored is 1 - C, and C stands for C - 1 up to the last lines.
    """
    p = tl.program_id(0)
    i = tl.arange(0, K2)[:, None]
    j = tl.arange(0, BLOCK_M)[None, :]
    rows = cost_ptr + problem(p, K, C, M) + offset(i, C) * M
    b_ptr += offset(p, b_stride)
    a = tl.load(a_ptr + offset(p, a_stride) + i, mask=i < K, other=0.0)
    shift, nan = load_rows(rows, b_ptr, a, i, j, K, M, unit, BLOCK_M)
    f_next, alive = row_update(rows, b_ptr, a, shift, shift, i, j, K, M, to_log2, unit, True, BLOCK_M)
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
        f_next, _ = row_update(rows, b_ptr, a, f, shift, i, j, K, M, to_log2, unit, False, BLOCK_M)
        # A row never holds more than all mass; only rounding at a huge range/eps says otherwise.
        mass = tl.minimum(live_a * tl.exp2(f - f_next), 1.0)
        error = tl.sum(tl.abs(mass - a))
        n += 1
        todo = (n < max_iter) & (error > tol)

    eps = from_log2 * 1.4426950408889634
    score, dual = error * 0.0, error * 0.0
    for start in range(0, M, BLOCK_M):
        b, cost = load_block(rows, b_ptr, a, i, start + j, K, M, unit)
        tile = (shift - cost) * to_log2
        g = softmin2(tile + f, a, 0)
        ratio = tl.minimum(tl.exp2(tile + f + g), 1 / tl.where(a > 0, a, 1.0))
        score += tl.sum(score_entries(ratio, a * b, cost, eps, unit, VALUE))
        g *= from_log2
        if VALUE:
            alive_b = tl.max(tile, 0, keep_dims=True) > float("-inf")
            dual += tl.sum(b * g) - eps * tl.sum(tl.where(alive_b, b, 0.0))
        g = tl.where(nan, float("nan"), tl.where(live, g, 0.0))
        tl.store(g_ptr + offset(p, M) + start + j, tl.where(b > 0, g, 0.0), mask=start + j < M)
    f = shift + (0.5 - 0.5 * unit) + f * from_log2
    if VALUE:
        dual += tl.sum(mass * f) + eps * (sum_a * sum_b)
        # As in the kernel that holds the problem in registers.
        score = tl.where(tl.abs(dual) > eps, dual, score)
    f = tl.where(nan, float("nan"), tl.where(live, f, 0.0))
    tl.store(f_ptr + offset(p, K) + i, tl.where(a > 0, f, 0.0), mask=i < K)
    tl.store(score_ptr + p.to(tl.int64), tl.where(nan, float("nan"), tl.where(live, score, 0.0)))
    tl.store(n_iter_ptr + p.to(tl.int64), n)
    tl.store(error_ptr + p.to(tl.int64), tl.where(nan, float("nan"), error))
