"""Batched entropic transport on the GPU: many small problems, each solved inside one program."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from ._configs import tuned
from ._math import load_cost, offset, problem, score_entries
from ._tiles import MAX_REGISTERS, BlockConfig, TileConfig, default_fwd, next_power_of_2, sizes
from .sinkhorn_stream import _sinkhorn_stream_kernel

# Up to range/eps = 80 kernel entries and both scalings stay within e^-80 and e^80: normal fp32 numbers.
_WIDE = tl.constexpr(80 * math.log2(math.e))
# max|C| / eps below which f and g, which that space gives to eps 5e-7, are wanted more exactly.
_FLAT = tl.constexpr(math.log2(math.e) / 8)


@triton.jit
def _sum(x, registers: tl.constexpr, lanes: tl.constexpr):
    return tl.sum(tl.sum(x, registers, keep_dims=True), lanes, keep_dims=True)


@triton.jit
def _max(x, registers: tl.constexpr, lanes: tl.constexpr):
    return tl.max(tl.max(x, registers, keep_dims=True), lanes, keep_dims=True)


@triton.jit
def _flat_softmin2(z, weight, registers: tl.constexpr, lanes: tl.constexpr):
    """-log2 sum(weight 2^z) for |z| <= 0.4 and weights that sum to 1, to 1e-7 of the largest |z|: 2^z - 1 and
    log(1 + x) by their series.
    """
    x = tl.maximum(z, -1.0) * 0.6931471805599453
    power = x * (1 + x / 2 * (1 + x / 3 * (1 + x / 4 * (1 + x / 5 * (1 + x / 6 * (1 + x / 7))))))
    x = _sum(weight * power, registers, lanes)
    t = x / (2 + x)
    s = t * t
    return -2.8853900817779268 * t * (1 + s * (1 / 3 + s * (1 / 5 + s * (1 / 7 + s / 9))))


@triton.jit
def _softmin2(z, weight, registers: tl.constexpr, lanes: tl.constexpr, FLAT: tl.constexpr):
    """-log2 sum(weight 2^z); 0 where no entry is finite. FLAT: as `_flat_softmin2`."""
    if FLAT:
        return _flat_softmin2(z, weight, registers, lanes)
    top = _max(z, registers, lanes)
    top = tl.where(top == float("-inf"), 0.0, top)
    total = _sum(weight * tl.exp2(z - top), registers, lanes)
    return -(top + tl.log2(tl.where(total > 0, total, 1.0)))


@triton.jit
def _reciprocal(x):
    """1/x to 2^-21.8 in two instructions; a division takes nine."""
    root = tl.rsqrt(x)
    return root * root


@triton.jit
def _any(x, tile):
    """Over all lanes of the tile: a branch on it is then known to be uniform. After any other the compiler
    guards every shuffle and puts them one after another.
    """
    return tl.max(tl.broadcast_to(x.to(tl.int32), tile.shape)) > 0


@triton.jit
def _scaling_loop(tile, a, b, todo, max_iter, tol):
    """Iterations on tile = 2^L, 1 where a row or column takes no part. Returns 2^-f, 2^-g, n and error."""
    n = tl.where(todo, 0, 0)
    error = tl.where(todo, 0.0, 0.0)
    row_sum = tl.where(a > 0, 1.0, 1.0)
    col_sum = tl.where(b > 0, 1.0, 1.0)
    row_next = _sum(tile * b, 1, 4)
    # A problem alone in its program is to do wherever the loop runs.
    SHARED: tl.constexpr = tile.shape[2] > 1
    while _any(todo, tile):
        row_sum = tl.where(todo, row_next, row_sum) if SHARED else row_next
        u = a * _reciprocal(row_sum)
        col_next = _sum(tile * u, 0, 3)
        col_sum = tl.where(todo, col_next, col_sum) if SHARED else col_next
        row_next = _sum(tile * (b * _reciprocal(col_sum)), 1, 4)
        error_next = _sum(tl.abs(u * row_next - a), 0, 3)
        error = tl.where(todo, error_next, error) if SHARED else error_next
        n += todo.to(tl.int32)
        todo = todo & (n < max_iter) & (error > tol)
    return row_sum, col_sum, n, error


@triton.jit
def _log_loop(tile, a, b, todo, f, g, mass, n, error, max_iter, tol, FLAT: tl.constexpr):
    """Iterations on tile = L for the problems to do; what the others hold passes through. Returns the plan's
    row sums after f and g.
    """
    live_a = tl.where(_max(tile, 1, 4) > float("-inf"), a, 0.0)
    f_next = _softmin2(tile, b, 1, 4, FLAT)
    while _any(todo, tile):
        f = tl.where(todo, f_next, f)
        g = tl.where(todo, _softmin2(tile + f, a, 0, 3, FLAT), g)
        f_next = tl.where(todo, _softmin2(tile + g, b, 1, 4, FLAT), f_next)
        # A row never holds more than all mass; only rounding at a huge range/eps says otherwise.
        mass = tl.where(todo, tl.minimum(live_a * tl.exp2(f - f_next), 1.0), mass)
        error = tl.where(todo, _sum(tl.abs(mass - a), 0, 3), error)
        n += todo.to(tl.int32)
        todo = todo & (n < max_iter) & (error > tol)
    return f, g, mass, n, error


@triton.jit(do_not_specialize=["P", "K", "C", "M", "a_stride", "b_stride", "m_stride", "max_iter"])
def _sinkhorn_fwd_kernel(
    cost_ptr, a_ptr, b_ptr, score_ptr, f_ptr, g_ptr, n_iter_ptr, error_ptr,
    P, K, C, M, a_stride, b_stride, m_stride, to_log2, from_log2, max_iter, tol, unit,
    VALUE: tl.constexpr, BLOCK_P: tl.constexpr, K2: tl.constexpr, M2: tl.constexpr,
    LANES_K: tl.constexpr, LANES_M: tl.constexpr,
):  # fmt: skip
    """f = -eps log sum_j b e^((g-C)/eps), g = -eps log sum_i a e^((f-C)/eps), alternating from g = 0.

    A program owns BLOCK_P problems and keeps one tile of them in registers, shaped [K2/LANES_K, M2/LANES_M,
    BLOCK_P, LANES_K, LANES_M]: the compiler spreads the last axes over lanes and warps, the first two stay in
    a thread (m_stride = 1 comes at run time so that contiguity does not decide otherwise). The tile holds 2^L
    with L = (row minimum - C) log2(e)/eps; an iteration is two matrix-vector products. Problems where some
    L < -80 log2(e), or a pair is forbidden, hold L itself and take log2 sums, and so do those where eps > 8
    max|C|: from sums near 1 their logarithms would lose the potentials. Neighbours never change a bit.
    Where unit = -1 what is stored is 1 - C, and C stands for C - 1 up to the last lines.
    """
    first = offset(tl.program_id(0), BLOCK_P)
    p = tl.arange(0, BLOCK_P)[None, None, :, None, None]
    i = tl.arange(0, K2 // LANES_K)[:, None, None, None, None] * LANES_K
    i += tl.arange(0, LANES_K)[None, None, None, :, None]
    j = tl.arange(0, M2 // LANES_M)[None, :, None, None, None] * LANES_M
    j += tl.arange(0, LANES_M)[None, None, None, None, :]
    in_p = first + p < P
    in_row = in_p & (i < K)
    in_col = in_p & (j < M)
    a = tl.load(a_ptr + first * a_stride + (p * a_stride + i), mask=in_row, other=0.0)
    b = tl.load(b_ptr + first * b_stride + (p * b_stride + j), mask=in_col, other=0.0)
    active = (a > 0) & (b > 0)
    at = cost_ptr + problem(tl.program_id(0) * BLOCK_P + p, K, C, M) + offset(i, C) * M + j * m_stride
    eps = from_log2 * 1.4426950408889634
    above = 0.5 - 0.5 * unit

    cost = load_cost(at, active, unit)
    shift = -_max(tl.where(cost == cost, -cost, float("inf")), 1, 4)
    nan = _max(-shift, 0, 3) == float("inf")
    shift = tl.where(tl.abs(shift) == float("inf"), -above, shift)
    tile = tl.where(active, (shift - cost) * to_log2, 0.0)
    span = _max(_max(-tile, 1, 4), 0, 3)
    wide = span > _WIDE
    largest = tl.maximum(_max(tl.where(a > 0, tl.abs(shift), 0.0), 0, 3), above)
    flat = span + largest * to_log2 < _FLAT
    live = (_max(a, 0, 3) > 0) & (_max(b, 1, 4) > 0) & (nan == 0)

    tile = tl.exp2(tile)
    row_sum, col_sum, n, error = _scaling_loop(tile, a, b, live & ((wide | flat) == 0), max_iter, tol)
    f = -tl.log2(row_sum)
    g = -tl.log2(col_sum)
    cost = load_cost(at, active & ((wide | flat) == 0), unit)
    ratio = tile * _reciprocal(row_sum) * _reciprocal(col_sum)
    score = _sum(_sum(score_entries(ratio, a * b, cost, eps, unit, VALUE), 1, 4), 0, 3)

    todo = live & (wide | flat)
    if _any(todo, tile):
        tile = (shift - load_cost(at, active & todo, unit)) * to_log2
        f, g, mass, n, error = _log_loop(tile, a, b, live & wide, f, g, a, n, error, max_iter, tol, False)
        f, g, mass, n, error = _log_loop(tile, a, b, live & flat, f, g, mass, n, error, max_iter, tol, True)
        ratio = tl.minimum(tl.exp2(tile + f + g), 1 / tl.where(a > 0, a, 1.0))
        cost = shift - tile * from_log2
        found = _sum(_sum(score_entries(ratio, a * b, cost, eps, unit, VALUE), 1, 4), 0, 3)
        if VALUE:
            live_b = tl.where(_max(tile, 0, 3) > float("-inf"), b, 0.0)
            excess = _sum(live_b, 1, 4) - _sum(a, 0, 3) * _sum(b, 1, 4)
            dual = _sum(mass * (shift + above + f * from_log2), 0, 3) + from_log2 * _sum(b * g, 1, 4)
            dual -= eps * excess
            # Exact columns leave <P, f + g> + eps (mass - sum P), known to eps 2^-22 whatever range/eps.
            found = tl.where(tl.abs(dual) > eps, dual, found)
        score = tl.where(todo, found, score)

    f = tl.where(live & (a > 0), shift + above + f * from_log2, 0.0)
    g = tl.where(live & (b > 0), g * from_log2, 0.0)
    tl.store(score_ptr + first + p, tl.where(nan, float("nan"), tl.where(live, score, 0.0)), mask=in_p)
    tl.store(f_ptr + first * K + (p * K + i), tl.where(nan & (a > 0), float("nan"), f), mask=in_row)
    tl.store(g_ptr + first * M + (p * M + j), tl.where(nan & (b > 0), float("nan"), g), mask=in_col)
    tl.store(n_iter_ptr + first + p, n, mask=in_p)
    tl.store(error_ptr + first + p, tl.where(nan, float("nan"), error), mask=in_p)


def sinkhorn_fwd(
    cost: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    eps: float,
    max_iter: int,
    tol: float,
    value: bool,
    similarity: bool = False,
    config: TileConfig | BlockConfig | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Solve P entropic transport problems, each stopping by itself.

    Args:
        cost: [P, K, M], or [B, K, C, M] with problem b * C + c at cost[b, :, c]; fp16, bf16 or fp32,
            contiguous; +inf forbids a pair.
        a, b: [P or 1, K] and [P or 1, M] fp32, contiguous, >= 0, each row of sum 1 or 0; a zero takes its row
            or column out.
        eps: regularisation > 0 in units of cost.
        max_iter: iterations at most, >= 1.
        tol: stop at marginal_error <= tol; 0 runs exactly max_iter iterations.
        value: score is the regularised value <P, C> + eps KL(P | a b^T) instead of <P, C>.
        similarity: `cost` holds S = 1 - C, where -inf forbids a pair; <P, S> takes the place of <P, C>.
        config: launch geometry; None takes what was tuned on this GPU, else the default for K and M. A
            `BlockConfig` passes over the cost in blocks, which is the default past 8192 padded entries.

    Returns:
        score [P], f [P, K], g [P, M], marginal_error [P] in fp32 and n_iter [P] in int32, ordered
        (score, f, g, n_iter, marginal_error).
    """
    P, K, C, M = sizes(cost)
    score, error = (torch.empty(P, dtype=torch.float32, device=cost.device) for _ in range(2))
    f = torch.empty(P, K, dtype=torch.float32, device=cost.device)
    g = torch.empty(P, M, dtype=torch.float32, device=cost.device)
    n_iter = torch.empty(P, dtype=torch.int32, device=cost.device)
    if P == 0:
        return score, f, g, n_iter, error
    config = config or tuned(cost, "sinkhorn_fwd") or default_fwd(K, M)
    K2, M2 = next_power_of_2(K), next_power_of_2(M)
    tensors = cost, a, b, score, f, g, n_iter, error
    strides = 0 if a.shape[0] == 1 else K, 0 if b.shape[0] == 1 else M
    numbers = math.log2(math.e) / eps, math.log(2) * eps, max_iter, tol if tol > 0 else -1.0
    unit = -1.0 if similarity else 1.0
    registers = MAX_REGISTERS if value else config.registers
    launch = {"VALUE": value, "num_warps": config.num_warps, "maxnreg": registers}
    with torch.cuda.device_of(cost):
        if isinstance(config, BlockConfig):
            _sinkhorn_stream_kernel[(P,)](
                *tensors, K, C, M, *strides, *numbers, unit, K2=K2, BLOCK_M=config.columns(K2, M2), **launch
            )
        else:
            _sinkhorn_fwd_kernel[(triton.cdiv(P, config.block_p),)](
                *tensors, P, K, C, M, *strides, 1, *numbers, unit,
                BLOCK_P=config.block_p, K2=K2, M2=M2, LANES_K=config.lanes_k, LANES_M=config.lanes_m,
                **launch,
            )  # fmt: skip
    return score, f, g, n_iter, error
