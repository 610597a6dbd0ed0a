"""Gradients of entropic transport with respect to the cost: envelope, implicit, unroll."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from ._configs import tuned
from ._math import load_block, load_cost, offset, problem
from ._tiles import BlockConfig, default_blocks, next_power_of_2, sizes
from .sinkhorn_unroll import SLOTS, _sinkhorn_unroll_kernel

# As in the reference: keeps the system definite, does not reach the gradient.
_RIDGE = tl.constexpr(1e-12)
# Squared relative residual. Random, clustered and near-permutation costs of all shapes then match a Cholesky
# solution to 1e-10.
_CG_TOL = tl.constexpr(1e-26)


@triton.jit(do_not_specialize=["rows", "K", "C", "M", "a_stride", "b_stride"])
def _sinkhorn_envelope_kernel(
    grad_ptr, cost_ptr, a_ptr, b_ptr, f_ptr, g_ptr, out_ptr, rows, K, C, M, a_stride, b_stride, to_log2,
    unit, sign, ROWS: tl.constexpr, M2: tl.constexpr,
):  # fmt: skip
    """out_ij = sign grad P_ij with P_ij = a_i b_j e^((f_i + g_j - C_ij) / eps).

    A program owns ROWS of the P * K rows as they lie in memory, whichever problems they belong to; nothing is
    summed.
    """
    first = offset(tl.program_id(0), ROWS)
    r = tl.arange(0, ROWS)[:, None]
    j = tl.arange(0, M2)[None, :]
    # Row q of [B, K, C, M] is (image, i, c); divisions of all but the program's first are 32 bits wide.
    q = first // C
    c = (first - q * C).to(tl.int32) + r
    image = q // K
    i = (q - image * K).to(tl.int32) + c // C
    p = (image + i // K) * C + c % C
    i = i % K
    in_row = first + r < rows
    inside = in_row & (j < M)
    a = tl.load(a_ptr + p * a_stride + i, mask=in_row, other=0.0)
    b = tl.load(b_ptr + p * b_stride + j, mask=inside, other=0.0)
    active = (a > 0) & (b > 0)
    f = tl.load(f_ptr + p * K + i, mask=in_row, other=0.0) - (0.5 - 0.5 * unit)
    g = tl.load(g_ptr + p * M + j, mask=active, other=0.0)
    at = first * M + (r * M + j)
    cost = load_cost(cost_ptr + at, active, unit)
    plan = a * tl.exp2((f - cost + g) * to_log2) * b
    # An entry never holds more than its column; only rounding at a huge range/eps says otherwise.
    plan = tl.where(plan > b, b, plan)
    grad = sign * tl.load(grad_ptr + p, mask=in_row, other=0.0)
    tl.store(out_ptr + at, tl.where(active, grad * plan, 0.0).to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _plan(rows, b_ptr, g_ptr, a, f, i, j, K, M, to_log2, unit):
    """P [K2, BLOCK_M] in fp64, its column sums' reciprocals (0 for 0) and C less its column means under P."""
    b, cost = load_block(rows, b_ptr, a, i, j, K, M, unit)
    g = tl.load(g_ptr + j, mask=b > 0, other=0.0)
    plan = a * tl.exp2((f - cost + g) * to_log2) * b
    plan = tl.where(plan > b, b, plan)
    plan = tl.where((a > 0) & (b > 0), plan, 0.0).to(tl.float64)
    cost = tl.where(plan == 0, 0.0, cost).to(tl.float64)
    c = tl.sum(plan, 0, keep_dims=True)
    c = tl.where(c == 0, 0.0, 1.0 / tl.where(c == 0, 1.0, c))
    return plan, c, cost - tl.sum(plan * cost, 0, keep_dims=True) * c


@triton.jit(do_not_specialize=["K", "C", "M", "a_stride", "b_stride"])
def _sinkhorn_implicit_kernel(
    grad_ptr, cost_ptr, a_ptr, b_ptr, f_ptr, g_ptr, out_ptr, K, C, M, a_stride, b_stride, to_log2, inv_eps,
    unit, sign, K2: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """out_ij = sign grad P_ij (1 + (x_i + y_j - C_ij) / eps), [x; y] solving the dual Hessian for [h_f; h_g].

    With y eliminated: sum_j P_ij (x_i - t_j) = sum_j P_ij (C_ij - mean_j), t_j and mean_j the averages of x
    and C under column j of P: a graph Laplacian whose differences, in fp64, do not cancel. Solved by
    conjugate gradients, scaled by the true row sums, gauge r . x = 0: at most min(K, M) steps but for
    rounding. A program owns one problem: vectors over rows in registers, P anew from the cost each pass.
    """
    p = tl.program_id(0)
    i = tl.arange(0, K2)[:, None]
    j = tl.arange(0, BLOCK_M)[None, :]
    rows = cost_ptr + problem(p, K, C, M) + offset(i, C) * M
    out_rows = out_ptr + problem(p, K, C, M) + offset(i, C) * M
    b_ptr += offset(p, b_stride)
    g_ptr += offset(p, M)
    a = tl.load(a_ptr + offset(p, a_stride) + i, mask=i < K, other=0.0)
    f = tl.load(f_ptr + offset(p, K) + i, mask=(i < K) & (a > 0), other=0.0) - (0.5 - 0.5 * unit)
    r = tl.where(i < K, 0.0, 0.0).to(tl.float64)
    h = r
    for start in range(0, M, BLOCK_M):
        plan, _, centred = _plan(rows, b_ptr, g_ptr, a, f, i, start + j, K, M, to_log2, unit)
        r += tl.sum(plan, 1, keep_dims=True)
        h += tl.sum(plan * centred, 1, keep_dims=True)
    root = tl.sqrt(r)
    scale = tl.where(r > 0, 1.0 / tl.where(r > 0, root, 1.0), 0.0)
    mass = tl.sum(r)
    mass = tl.where(mass > 0, mass, 1.0)
    residual = h * scale
    direction = residual
    x = residual * 0.0
    square = tl.sum(residual * residual)
    goal = square * _CG_TOL
    left = 4 * tl.minimum(K, M) + 50
    while (square > goal) & (left > 0):
        step = direction * scale
        image = root * (tl.sum(root * direction) / mass) + _RIDGE * direction
        for start in range(0, M, BLOCK_M):
            plan, c, _ = _plan(rows, b_ptr, g_ptr, a, f, i, start + j, K, M, to_log2, unit)
            t = tl.sum(plan * step, 0, keep_dims=True) * c
            image += scale * tl.sum(plan * (step - t), 1, keep_dims=True)
        length = square / tl.sum(direction * image)
        x += length * direction
        residual -= length * image
        ratio = tl.sum(residual * residual) / square
        direction = residual + ratio * direction
        square *= ratio
        left -= 1
    x *= scale
    grad = sign * tl.load(grad_ptr + p.to(tl.int64))
    for start in range(0, M, BLOCK_M):
        plan, c, centred = _plan(rows, b_ptr, g_ptr, a, f, i, start + j, K, M, to_log2, unit)
        t = tl.sum(plan * x, 0, keep_dims=True) * c
        out = (plan * (1 + (x - t - centred) * inv_eps)).to(tl.float32) * grad
        tl.store(
            out_rows + start + j,
            out.to(out_ptr.dtype.element_ty),
            mask=(i < K) & (start + j < M),
        )


def sinkhorn_bwd(
    grad_score: torch.Tensor,
    cost: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    f: torch.Tensor,
    g: torch.Tensor,
    n_iter: torch.Tensor,
    eps: float,
    value: bool,
    grad: str,
    similarity: bool = False,
    config: BlockConfig | None = None,
) -> torch.Tensor:
    """Gradient of grad_score times the score of `sinkhorn_fwd`, with respect to `cost` as it is stored.

    Args:
        grad_score: [P] fp32.
        cost, a, b, eps, value, similarity: as given to `sinkhorn_fwd`; f, g, n_iter: as it returned them.
        grad: "envelope", the plan held fixed; "implicit", exact at the fixed point, for the value the same;
            "unroll", exact for the iterate after n_iter steps.
        config: launch geometry; None takes what was tuned on this GPU, else the default for K, M and grad.

    Returns:
        Of the shape and dtype of cost. Deterministic; nothing is read back by the host. Beside it "unroll"
        takes 32 P K floats, and for fp16 and bf16 P K M more.
    """
    P, K, C, M = sizes(cost)
    grad = "envelope" if grad == "implicit" and value else grad
    out = torch.empty_like(cost)
    if P == 0:
        return out
    op = f"sinkhorn_{grad}"
    config = config or tuned(cost, op) or default_blocks(op, K, M)
    K2, M2 = next_power_of_2(K), next_power_of_2(M)
    strides = 0 if a.shape[0] == 1 else K, 0 if b.shape[0] == 1 else M
    to_log2, from_log2 = math.log2(math.e) / eps, math.log(2) * eps
    unit = -1.0 if similarity else 1.0
    sign = unit if value else 1.0
    launch = {"num_warps": config.num_warps, "maxnreg": config.registers}
    with torch.cuda.device_of(cost):
        if grad == "envelope":
            rows = max(1, config.entries // M2)
            _sinkhorn_envelope_kernel[(triton.cdiv(P * K, rows),)](
                grad_score, cost, a, b, f, g, out, P * K, K, C, M, *strides, to_log2, unit, sign,
                ROWS=rows, M2=M2, **launch,
            )  # fmt: skip
        elif grad == "implicit":
            _sinkhorn_implicit_kernel[(P,)](
                grad_score, cost, a, b, f, g, out, K, C, M, *strides, to_log2, 1 / eps, unit, sign,
                K2=K2, BLOCK_M=config.columns(K2, M2), **launch,
            )  # fmt: skip
        else:
            total = out if cost.dtype == torch.float32 else torch.empty_like(cost, dtype=torch.float32)
            kept = torch.empty(P, SLOTS, K, dtype=torch.float32, device=cost.device)
            _sinkhorn_unroll_kernel[(P,)](
                grad_score, cost, a, b, n_iter, kept, total, K, C, M, *strides, to_log2, from_log2, 1 / eps,
                unit, sign, VALUE=value, SLOTS=SLOTS, K2=K2, BLOCK_M=config.columns(K2, M2), **launch,
            )  # fmt: skip
            out = total.to(cost.dtype)
    return out
