"""spa_fast::_sinkhorn_fwd and spa_fast::_sinkhorn_bwd: schema, implementation, fake, autograd."""

from __future__ import annotations

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
) -> Outputs:
    """score [P], f [P, K], g [P, M], n_iter [P], marginal_error [P] of contiguous cost [P, K, M].

    `grad` is read by the backward only.
    """
    backend = _backends.resolve(backend, cost)
    if backend == "native":
        return _native_fwd(cost, a, b, eps, max_iter, tol, value)
    if backend == "triton":
        from spa_fast.kernels import sinkhorn_fwd as triton_fwd

        score, f, g, n_iter, error = triton_fwd(cost, a, b, eps, max_iter, tol, value)
        return score, f, g, n_iter, error
    return reference.sinkhorn_fwd(cost, a, b, eps, max_iter, tol, value)


def _native_fwd(
    cost: Tensor, a: Tensor, b: Tensor, eps: float, max_iter: int, tol: float, value: bool
) -> Outputs:
    extension: Any = _native.extension()
    P, K, M = cost.shape
    out = _empty(cost)
    score, f, g, n_iter, error = out
    extension.sinkhorn_fwd(
        cost.data_ptr(),
        _COST_TYPES[cost.dtype],
        a.data_ptr(),
        0 if a.shape[0] == 1 else K,
        b.data_ptr(),
        0 if b.shape[0] == 1 else M,
        P,
        K,
        M,
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
    )
    return out


def _empty(cost: Tensor) -> Outputs:
    P, K, M = cost.shape
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
) -> Tensor:
    """grad_cost [P, K, M]; the reference formulas whichever backend solved the problem."""
    return reference.sinkhorn_bwd(grad_score, cost, a, b, f, g, n_iter, eps, value, grad)


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
) -> Tensor:
    return torch.empty_like(cost, memory_format=torch.contiguous_format)


@torch.library.custom_op("spa_fast::_sinkhorn_plan", mutates_args=())
def sinkhorn_plan(cost: Tensor, a: Tensor, b: Tensor, f: Tensor, g: Tensor, eps: float) -> Tensor:
    """P [P, K, M] of the potentials, in their dtype; carries no gradient."""
    return reference.sinkhorn_plan(cost, a, b, f, g, eps)


@sinkhorn_plan.register_fake
def _(cost: Tensor, a: Tensor, b: Tensor, f: Tensor, g: Tensor, eps: float) -> Tensor:
    return f.new_empty(cost.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Outputs) -> None:
    cost, a, b, eps, _max_iter, _tol, value, grad, _backend = inputs
    _score, f, g, n_iter, error = output
    ctx.mark_non_differentiable(f, g, n_iter, error)
    ctx.save_for_backward(cost, a, b, f, g, n_iter)
    ctx.options = eps, value, grad


def _backward(ctx: Any, grad_score: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    grad_cost = None
    if ctx.needs_input_grad[0]:
        grad_cost = sinkhorn_bwd(grad_score.contiguous(), *ctx.saved_tensors, *ctx.options)
    return grad_cost, *(None,) * 8


sinkhorn_fwd.register_autograd(_backward, setup_context=_save)
