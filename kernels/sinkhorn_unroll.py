"""Gradient of entropic transport through its iterations, by recomputation."""

from __future__ import annotations

import triton
import triton.language as tl

from ._math import load_block, load_rows, offset, problem, softmin2
from .sinkhorn_stream import row_update

# Row potentials kept a problem; more iterations are run again from the nearest one kept.
SLOTS = 32


@triton.jit(do_not_specialize=["K", "C", "M", "a_stride", "b_stride"])
def _sinkhorn_unroll_kernel(
    grad_ptr, cost_ptr, a_ptr, b_ptr, n_iter_ptr, kept_ptr, out_ptr, K, C, M, a_stride, b_stride,
    to_log2, from_log2, inv_eps, unit, sign,
    VALUE: tl.constexpr, SLOTS: tl.constexpr, K2: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """out = sign grad d score / dC through the n iterations of the problem, newest first.

    A program owns one problem: vectors over rows in registers, of the n row potentials f_t at most SLOTS in
    memory and the ones between run again from the last kept; g_t follows from f_t, so that one pass over the
    columns goes one iteration back. With step_ij the adjoint of f_i (g_j) times its softmax weight: out +=
    step, and minus its sums are the adjoints half an iteration before. The score's cost, or f + g, is taken
    less its mean under each column: columns of the plan are exact, so that changes only the rounding.
    """
    p = tl.program_id(0)
    i = tl.arange(0, K2)[:, None]
    j = tl.arange(0, BLOCK_M)[None, :]
    a = tl.load(a_ptr + offset(p, a_stride) + i, mask=i < K, other=0.0)
    row = problem(p, K, C, M) + offset(i, C) * M
    rows = cost_ptr + row
    out_rows = out_ptr + row
    b_ptr += offset(p, b_stride)
    kept_ptr += offset(p, SLOTS) * K + i
    shift, nan = load_rows(rows, b_ptr, a, i, j, K, M, unit, BLOCK_M)
    n = tl.where(nan, 0, tl.load(n_iter_ptr + p.to(tl.int64)))
    stride = tl.maximum(tl.cdiv(n, SLOTS), 1)
    f, _ = row_update(rows, b_ptr, a, shift, shift, i, j, K, M, to_log2, unit, True, BLOCK_M)
    for t in range(0, n):
        if t > 0:
            f, _ = row_update(rows, b_ptr, a, f, shift, i, j, K, M, to_log2, unit, False, BLOCK_M)
        if t % stride == 0:
            tl.store(kept_ptr + t // stride * K, f, mask=i < K)

    grad = sign * tl.load(grad_ptr + p.to(tl.int64))
    d_f = tl.where(i < K, 0.0, 0.0)
    for start in range(0, M, BLOCK_M):
        b, cost = load_block(rows, b_ptr, a, i, start + j, K, M, unit)
        tile = (shift - cost) * to_log2
        g = softmin2(tile + f, a, 0)
        plan = tl.minimum(a * tl.exp2(tile + f + g) * b, b)
        score = shift * inv_eps + (f + g) * (from_log2 * inv_eps) if VALUE else cost * inv_eps
        score = tl.where(plan > 0, score, 0.0)
        column = tl.sum(plan, 0, keep_dims=True)
        score -= tl.sum(plan * score, 0, keep_dims=True) / tl.where(column > 0, column, 1.0)
        d_f += grad * tl.sum(plan * score, 1, keep_dims=True)
        out = tl.where(nan & (a > 0) & (b > 0), float("nan"), grad * plan * (1 - score))
        tl.store(out_rows + start + j, out, mask=(i < K) & (start + j < M))
    for back in range(1, n + 1):
        # f is f_t for t = n - back, counted from 0. What one thread stored another may load: barriers.
        t = n - back
        f_old = f
        tl.debug_barrier()
        if t > 0:
            f_old = tl.load(kept_ptr + (t - 1) // stride * K, mask=i < K, other=0.0)
            for _again in range(0, (t - 1) % stride):
                f_old, _ = row_update(rows, b_ptr, a, f_old, shift, i, j, K, M, to_log2, unit, False, BLOCK_M)
        d_old = tl.where(i < K, 0.0, 0.0)
        for start in range(0, M, BLOCK_M):
            b, cost = load_block(rows, b_ptr, a, i, start + j, K, M, unit)
            tile = (shift - cost) * to_log2
            at = out_rows + start + j
            out = tl.load(at, mask=(i < K) & (start + j < M), other=0.0)
            g_old = tl.where(t > 0, softmin2(tile + f_old, a, 0), 0.0)
            step = tl.minimum(b * tl.exp2(tile + f + g_old), 1.0) * d_f
            d_g = tl.where(t > 0, -tl.sum(step, 0, keep_dims=True), 0.0)
            out += step
            step = tl.minimum(a * tl.exp2(tile + f_old + g_old), 1.0) * d_g
            d_old -= tl.sum(step, 1, keep_dims=True)
            tl.debug_barrier()
            tl.store(at, out + step, mask=(i < K) & (start + j < M))
        d_f = d_old
        f = f_old
