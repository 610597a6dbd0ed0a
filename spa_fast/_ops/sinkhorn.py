"""spa_fast::_sinkhorn_fwd and spa_fast::_sinkhorn_bwd: schema, implementation, fake, autograd.

`cost` is contiguous, either [P, K, M] or [B, K, C, M], which is how one GEMM leaves all pairs of B images and
C classes: problem b * C + c is cost[b, :, c]. With `similarity` it holds S: the cost is 1 - S, and instead of
<P, C> the score is <P, S>.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from spa_fast import _backends
from spa_fast._ops.sinkhorn_native import Outputs, empty_outputs, native_bwd, native_fwd, problems, sizes
from spa_fast.reference import sinkhorn as reference


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
    backend = _backends.resolve(backend, problems(cost))
    if backend == "native":
        return native_fwd(cost, a, b, eps, max_iter, tol, value, similarity)
    if backend == "triton":
        from spa_fast.kernels import sinkhorn_fwd as triton_fwd

        score, f, g, n_iter, error = triton_fwd(cost, a, b, eps, max_iter, tol, value, similarity)
        return score, f, g, n_iter, error
    return reference.sinkhorn_fwd(_flat(cost), a, b, eps, max_iter, tol, value, similarity)


def _flat(cost: Tensor) -> Tensor:
    """[P, K, M]: what the reference reads."""
    return problems(cost).reshape(sizes(cost))


@sinkhorn_fwd.register_fake
def _(cost: Tensor, *rest: Any) -> Outputs:
    return empty_outputs(cost)


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
    backend = _backends.resolve(backend, problems(cost))
    if backend == "native" and (grad == "envelope" or (grad == "implicit" and value)):
        # The value falls where a similarity rises.
        upstream = -grad_score if similarity and value else grad_score
        return native_bwd(upstream, cost, a, b, f, g, eps, similarity)
    if backend == "triton":
        from spa_fast.kernels import sinkhorn_bwd as triton_bwd

        out: Tensor = triton_bwd(grad_score, cost, a, b, f, g, n_iter, eps, value, grad, similarity)
        return out
    return _reference_bwd(grad_score, cost, a, b, f, g, n_iter, eps, value, grad, similarity)


def _reference_bwd(grad_score: Tensor, cost: Tensor, *rest: Any) -> Tensor:
    """`rest` as `reference.sinkhorn_bwd` takes it."""
    out = reference.sinkhorn_bwd(grad_score, _flat(cost), *rest).view(problems(cost).shape)
    return out.transpose(1, 2).contiguous() if cost.dim() == 4 else out


@sinkhorn_bwd.register_fake
def _(grad_score: Tensor, cost: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(cost, memory_format=torch.contiguous_format)


@torch.library.custom_op("spa_fast::_sinkhorn_plan", mutates_args=())
def sinkhorn_plan(
    cost: Tensor, a: Tensor, b: Tensor, f: Tensor, g: Tensor, eps: float, similarity: bool = False
) -> Tensor:
    """P [P, K, M] of the potentials, in their dtype; carries no gradient."""
    return reference.sinkhorn_plan(_flat(cost), a, b, f, g, eps, similarity)


@sinkhorn_plan.register_fake
def _(cost: Tensor, a: Tensor, b: Tensor, f: Tensor, *rest: Any) -> Tensor:
    return f.new_empty(sizes(cost))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Outputs) -> None:
    cost, a, b, eps, _max_iter, _tol, value, grad, backend, similarity = inputs
    _score, f, g, n_iter, error = output
    ctx.mark_non_differentiable(f, g, n_iter, error)
    ctx.save_for_backward(cost, a, b, f, g, n_iter)
    ctx.options = eps, value, grad, backend, similarity


def _backward(ctx: Any, grad_score: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    grad_cost = None
    if ctx.needs_input_grad[0]:
        eps, value, grad, backend, similarity = ctx.options
        # With create_graph, of PyTorch operations, which autograd differentiates again.
        again = grad == "unroll" and torch.is_grad_enabled()
        options = (eps, value, grad, similarity) if again else (eps, value, grad, backend, similarity)
        bwd: Any = _reference_bwd if again else sinkhorn_bwd
        grad_cost = bwd(grad_score.contiguous(), *ctx.saved_tensors, *options)
    return grad_cost, *(None,) * 9


def _no_second(ctx: Any, *_: Any) -> None:
    raise RuntimeError(
        "spa_fast transport: grad='envelope' and grad='implicit' have no second derivative; "
        "for one, pass grad='unroll'"
    )


sinkhorn_fwd.register_autograd(_backward, setup_context=_save)
sinkhorn_bwd.register_autograd(_no_second)
