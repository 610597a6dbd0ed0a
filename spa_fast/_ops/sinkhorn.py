"""spa_fast::_sinkhorn_fwd and spa_fast::_sinkhorn_bwd: schema, implementation, fake, autograd.

`cost` is contiguous, either [P, K, M] or [B, K, C, M], which is how one GEMM leaves all pairs of B images and
C classes: problem b * C + c is cost[b, :, c]. With `similarity` it holds 1 - C_ij.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from spa_fast import _backends, _native
from spa_fast.reference import sinkhorn as reference

Outputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]

_COST_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


@torch.library.custom_op("spa_fast::_sinkhorn_fwd", mutates_args=())
def sinkhorn_fwd(
    cost: Tensor,
    a: Tensor,
    b: Tensor,
    eps: float,
    max_iter: int,
    tol: float,
    value: bool,
    grad: str,
    backend: str,
    similarity: bool = False,
) -> Outputs:
    """score [P], f [P, K], g [P, M], n_iter [P], marginal_error [P]; `grad` is read by the backward only."""
    backend = _backends.resolve(backend, _problems(cost))
    if backend == "native":
        return _native_fwd(cost, a, b, eps, max_iter, tol, value, similarity)
    cost = _plain(cost, similarity)
    if backend == "triton":
        from spa_fast.kernels import sinkhorn_fwd as triton_fwd

        score, f, g, n_iter, error = triton_fwd(cost, a, b, eps, max_iter, tol, value)
        return score, f, g, n_iter, error
    return reference.sinkhorn_fwd(cost, a, b, eps, max_iter, tol, value)


def _native_fwd(
    cost: Tensor, a: Tensor, b: Tensor, eps: float, max_iter: int, tol: float, value: bool, similarity: bool
) -> Outputs:
    extension: Any = _native.extension()
    out = _empty(cost)
    score, f, g, n_iter, error = out
    extension.sinkhorn_fwd(
        cost.data_ptr(),
        _COST_TYPES[cost.dtype],
        *_weights(a),
        *_weights(b),
        *_sizes(cost),
        eps,
        max_iter,
        tol,
        value,
        score.data_ptr(),
        f.data_ptr(),
        g.data_ptr(),
        n_iter.data_ptr(),
        error.data_ptr(),
        torch.get_num_threads(),
        C=_beside(cost),
        similarity=similarity,
    )
    return out


def _native_bwd(
    grad_score: Tensor, cost: Tensor, a: Tensor, b: Tensor, f: Tensor, g: Tensor, eps: float, similarity: bool
) -> Tensor:
    extension: Any = _native.extension()
    grad_cost = torch.empty_like(cost)
    extension.sinkhorn_bwd(
        grad_score.data_ptr(),
        cost.data_ptr(),
        _COST_TYPES[cost.dtype],
        *_weights(a),
        *_weights(b),
        f.data_ptr(),
        g.data_ptr(),
        *_sizes(cost),
        eps,
        grad_cost.data_ptr(),
        torch.get_num_threads(),
        C=_beside(cost),
        similarity=similarity,
    )
    return grad_cost


def _weights(weights: Tensor) -> tuple[int, int]:
    """Address and stride; one row serves all problems."""
    return weights.data_ptr(), 0 if weights.shape[0] == 1 else weights.shape[1]


def _problems(cost: Tensor) -> Tensor:
    """[..., K, M], a view."""
    return cost.transpose(1, 2) if cost.dim() == 4 else cost


def _beside(cost: Tensor) -> int:
    """C of [B, K, C, M], which the extension divides by also where it is 0."""
    return max(1, cost.shape[2]) if cost.dim() == 4 else 1


def _sizes(cost: Tensor) -> tuple[int, int, int]:
    """P, K, M."""
    *batch, K, M = _problems(cost).shape
    return math.prod(batch), K, M


def _plain(cost: Tensor, similarity: bool) -> Tensor:
    """[P, K, M], a cost: what the backends other than native read."""
    cost = _problems(cost).reshape(_sizes(cost))
    return 1 - cost if similarity else cost


def _empty(cost: Tensor) -> Outputs:
    P, K, M = _sizes(cost)
    acc = torch.float64 if cost.dtype == torch.float64 else torch.float32
    return (
        cost.new_empty(P, dtype=acc),
        cost.new_empty(P, K, dtype=acc),
        cost.new_empty(P, M, dtype=acc),
        cost.new_empty(P, dtype=torch.int32),
        cost.new_empty(P, dtype=acc),
    )


@sinkhorn_fwd.register_fake
def _(
    cost: Tensor,
    a: Tensor,
    b: Tensor,
    eps: float,
    max_iter: int,
    tol: float,
    value: bool,
    grad: str,
    backend: str,
    similarity: bool = False,
) -> Outputs:
    return _empty(cost)


@torch.library.custom_op("spa_fast::_sinkhorn_bwd", mutates_args=())
def sinkhorn_bwd(
    grad_score: Tensor,
    cost: Tensor,
    a: Tensor,
    b: Tensor,
    f: Tensor,
    g: Tensor,
    n_iter: Tensor,
    eps: float,
    value: bool,
    grad: str,
    backend: str = "reference",
    similarity: bool = False,
) -> Tensor:
    """grad_cost, as `cost`. Triton for all three; native for "envelope", to which "implicit" is equal for the
    value, and the reference formulas for the rest.
    """
    backend = _backends.resolve(backend, _problems(cost))
    if backend == "native" and (grad == "envelope" or (grad == "implicit" and value)):
        return _native_bwd(grad_score, cost, a, b, f, g, eps, similarity)
    plain = _plain(cost, similarity)
    if backend == "triton":
        from spa_fast.kernels import sinkhorn_bwd as triton_bwd

        out: Tensor = triton_bwd(grad_score, plain, a, b, f, g, n_iter, eps, value, grad)
    else:
        out = reference.sinkhorn_bwd(grad_score, plain, a, b, f, g, n_iter, eps, value, grad)
    out = -out if similarity else out
    return out.view(_problems(cost).shape).transpose(1, 2).contiguous() if cost.dim() == 4 else out


@sinkhorn_bwd.register_fake
def _(
    grad_score: Tensor,
    cost: Tensor,
    a: Tensor,
    b: Tensor,
    f: Tensor,
    g: Tensor,
    n_iter: Tensor,
    eps: float,
    value: bool,
    grad: str,
    backend: str = "reference",
    similarity: bool = False,
) -> Tensor:
    return torch.empty_like(cost, memory_format=torch.contiguous_format)


@torch.library.custom_op("spa_fast::_sinkhorn_plan", mutates_args=())
def sinkhorn_plan(
    cost: Tensor, a: Tensor, b: Tensor, f: Tensor, g: Tensor, eps: float, similarity: bool = False
) -> Tensor:
    """P [P, K, M] of the potentials, in their dtype; carries no gradient."""
    return reference.sinkhorn_plan(_plain(cost, similarity), a, b, f, g, eps)


@sinkhorn_plan.register_fake
def _(
    cost: Tensor, a: Tensor, b: Tensor, f: Tensor, g: Tensor, eps: float, similarity: bool = False
) -> Tensor:
    return f.new_empty(_sizes(cost))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Outputs) -> None:
    cost, a, b, eps, _max_iter, _tol, value, grad, backend, similarity = inputs
    _score, f, g, n_iter, error = output
    ctx.mark_non_differentiable(f, g, n_iter, error)
    ctx.save_for_backward(cost, a, b, f, g, n_iter)
    ctx.options = eps, value, grad, backend, similarity


def _backward(ctx: Any, grad_score: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    grad_cost = None
    if ctx.needs_input_grad[0]:
        grad_cost = sinkhorn_bwd(grad_score.contiguous(), *ctx.saved_tensors, *ctx.options)
    return grad_cost, *(None,) * 9


sinkhorn_fwd.register_autograd(_backward, setup_context=_save)
