"""What the kernels share: where problems lie, blocks of their columns, log2 sums, entries of the score."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def offset(index, size):
    """index * size in 64 bits whatever their types: P * K * M goes past 2^31."""
    return index.to(tl.int64) * size


@triton.jit
def problem(p, K, C, M):
    """Where p = b C + c begins in [B, K, C, M], whose rows are C * M apart; [P, K, M] has C = 1.

    p is divided in 32 bits, which the launchers see to: in 64 that is a subroutine.
    """
    return (offset(p // C, K) * C + p % C) * M


@triton.jit
def load_cost(at, inside, unit):
    """C where unit = 1; C - 1 where unit = -1 says that 1 - C is stored; inf where not inside."""
    return unit * tl.load(at, mask=inside, other=unit * float("inf")).to(tl.float32)


@triton.jit
def load_block(rows, b_ptr, a, i, j, K, M, unit):
    """Weights [1, J] of columns j and their costs [I, J], as `load_cost`, rows pointing at column 0."""
    b = tl.load(b_ptr + j, mask=j < M, other=0.0)
    return b, load_cost(rows + j, (i < K) & (j < M) & (a > 0) & (b > 0), unit)


@triton.jit
def load_rows(rows, b_ptr, a, i, j, K, M, unit, BLOCK_M: tl.constexpr):
    """Smallest finite cost of every row [I, 1], that of C = 0 where none is; whether any is NaN or -inf."""
    low = tl.where(i < K, float("inf"), float("inf"))
    for start in range(0, M, BLOCK_M):
        _, cost = load_block(rows, b_ptr, a, i, start + j, K, M, unit)
        cost = tl.where(cost == cost, cost, float("-inf"))
        low = tl.minimum(low, tl.min(cost, 1, keep_dims=True))
    bad = tl.max((low == float("-inf")).to(tl.int32)) > 0
    return tl.where(tl.abs(low) == float("inf"), 0.5 * unit - 0.5, low), bad


@triton.jit
def softmin2(z, weight, axis: tl.constexpr):
    """-log2 sum(weight 2^z) along the axis; 0 where no entry is finite."""
    top = tl.max(z, axis, keep_dims=True)
    top = tl.where(top == float("-inf"), 0.0, top)
    total = tl.sum(weight * tl.exp2(z - top), axis, keep_dims=True)
    return -(top + tl.log2(tl.where(total > 0, total, 1.0)))


@triton.jit
def _kl(r):
    """r ln r - r + 1, near 1 by its series: there the three parts cancel."""
    d = r - 1
    near = 1 / 12 - d * (1 / 20 - d * (1 / 30 - d * (1 / 42 - d * (1 / 56))))
    near = d * d * (0.5 - d * (1 / 6 - d * near))
    far = r * (tl.log2(tl.where(r > 0, r, 1.0)) * 0.6931471805599453) - d
    return tl.where(tl.abs(d) < 0.125, near, far)


@triton.jit
def score_entries(ratio, weight, cost, eps, unit, VALUE: tl.constexpr):
    """With P = weight ratio: P C + eps weight kl(ratio) for the value, else what is stored times P.

    Rounding of P enters the value by (f + g) dP only, however large eps; eps (f + g) of potentials that are
    small beside eps would lose it.
    """
    cost = tl.where(weight * ratio > 0, cost, 0.0)
    if VALUE:
        return weight * (ratio * (cost + (0.5 - 0.5 * unit)) + eps * _kl(ratio))
    else:
        return weight * ratio * (cost * unit)
