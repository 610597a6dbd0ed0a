"""A front shaped like SuperGlue's `log_optimal_transport`."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from spa_fast import _checks as checks
from spa_fast import transport


def log_optimal_transport(scores: Tensor, alpha: Tensor, iters: int, *, backend: str = "auto") -> Tensor:
    """Log of SuperGlue's assignment: transport of `scores` with a dustbin row and column of score alpha.

    Z = log P + log(K + M) with P = argmax_P <P, S> - sum P log P, S the scores with the dustbins; the points
    have weight 1, the dustbins M and K, all over K + M.

    Args:
        scores: [P, K, M], larger is better.
        alpha: the dustbin's score, a scalar.
        iters: exactly so many iterations, from v = 0.

    Returns:
        Z [P, K + 1, M + 1] in the accumulate dtype, with the gradient of the iterate returned.

    Source:
        Sarlin et al., "SuperGlue: Learning Feature Matching with Graph Neural Networks", CVPR 2020, section
        3.2.

    Notes:
        The backward repeats the iterations in PyTorch and keeps O(iters P (K + M)), not the plans.
    """
    checks.check_input("scores", scores)
    checks.check_max_iter(iters, "iters")
    if scores.dim() != 3 or 0 in scores.shape[1:]:
        raise ValueError(f"scores: expected [P, K, M] with K, M >= 1, got {list(scores.shape)}")
    if isinstance(alpha, bool) or not isinstance(alpha, (Tensor, float, int)):
        raise TypeError(f"alpha: expected a scalar, got {type(alpha).__name__}")
    alpha = torch.as_tensor(alpha, device=scores.device)
    if alpha.numel() != 1:
        raise ValueError(f"alpha: expected a scalar, got {list(alpha.shape)}")
    P, K, M = scores.shape
    acc = checks.accumulate_dtype(scores)
    scores, alpha = scores.to(acc), alpha.to(acc).reshape(1, 1, 1)
    rows = torch.cat([scores, alpha.expand(P, K, 1)], 2)
    couplings = torch.cat([rows, alpha.expand(P, 1, M + 1)], 1)
    Z: Tensor = _Assignment.apply(couplings, iters, backend)  # type: ignore[no-untyped-call]
    return Z + math.log(K + M)


class _Assignment(torch.autograd.Function):
    """log P [P, K, M] of couplings S after `iters` times

    u = log a - LSE_j(S + v), v = log b - LSE_i(S + u).
    """

    @staticmethod
    def forward(ctx: Any, couplings: Tensor, iters: int, backend: str) -> Tensor:
        log_a, log_b = _dustbin_weights(couplings)
        ctx.save_for_backward(couplings)
        ctx.iters = iters
        # The solver starts at g = 0, v = log b: with log b added to the cost, v is its g and starts at 0.
        out = transport.sinkhorn(
            log_b - couplings,
            log_a.exp(),
            log_b.exp(),
            eps=1.0,
            max_iter=iters,
            tol=0,
            return_plan=True,
            backend=backend,
        )
        log_plan: Tensor = couplings + (log_a + out.f)[:, :, None] + out.g[:, None, :]
        return log_plan

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (S,) = ctx.saved_tensors
        log_a, log_b = _dustbin_weights(S)
        v, history = S.new_zeros(S.shape[0], S.shape[2]), []
        for _ in range(ctx.iters):
            u = log_a - torch.logsumexp(S + v[:, None, :], 2)
            history.append((v, u))
            v = log_b - torch.logsumexp(S + u[:, :, None], 1)
        grad = grads[0]
        d_u, d_v = grad.sum(2), grad.sum(1)
        for v, u in reversed(history):
            step = (S + u[:, :, None]).softmax(1) * d_v[:, None, :]
            grad, d_u = grad - step, d_u - step.sum(2)
            step = (S + v[:, None, :]).softmax(2) * d_u[:, :, None]
            grad, d_u, d_v = grad - step, torch.zeros_like(d_u), -step.sum(1)
        return grad, None, None


def _dustbin_weights(couplings: Tensor) -> tuple[Tensor, Tensor]:
    """Logarithms of [1, ..., 1, M] / (K + M) and [1, ..., 1, K] / (K + M), K x M without the dustbins."""
    K, M = couplings.shape[1] - 1, couplings.shape[2] - 1
    log_a = couplings.new_zeros(K + 1)
    log_b = couplings.new_zeros(M + 1)
    log_a[K], log_b[M] = math.log(M), math.log(K)
    return log_a - math.log(K + M), log_b - math.log(K + M)
