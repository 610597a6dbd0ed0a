"""Fronts shaped like POT, GeomLoss, PLOT and SuperGlue: their arguments and results over the solvers here."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from spa_fast import _checks as checks
from spa_fast import _features as features
from spa_fast import transport

__all__ = ["SamplesLoss", "log_optimal_transport", "ot_sinkhorn", "ot_sinkhorn2", "plot_sinkhorn"]

_BACKENDS_OF_GEOMLOSS = ("tensorized", "online", "multiscale")


def ot_sinkhorn(
    a: Tensor | Sequence[float] | None,
    b: Tensor | Sequence[float] | None,
    M: Tensor,
    reg: float,
    method: str = "sinkhorn",
    numItermax: int = 1000,
    stopThr: float = 1e-9,
    verbose: bool = False,
    log: bool = False,
    warn: bool = True,
    *,
    backend: str = "auto",
) -> Any:
    """The plan argmin_P <P, M> + reg KL(P | a b^T), called like POT's `ot.sinkhorn`.

    Args:
        a, b: weights [K] and [M], or broadcastable to the batch of M; None or empty is uniform. The plan has
            the mass of `a`, to which b is scaled.
        M: cost [K, M], also any batch [..., K, M]; a tensor.
        reg: regularisation > 0 in units of cost. POT's entropy and this KL have the same plan.
        method: "sinkhorn", "sinkhorn_log" or "sinkhorn_stabilized", which are one and the same here.
        numItermax: iterations at most.
        stopThr: each problem stops once the L1 error of its row sums (of mass 1) is <= stopThr. POT looks at
            every tenth iteration, at the L2 error of the columns. fp32 does not reach much below 1e-6: there
            a smaller stopThr runs numItermax iterations.
        log: return (plan, log), log holding niter, err, converged, log_u and log_v per problem with P =
            exp(log_u + log_v - M / reg).
        verbose, warn: without effect: looking at values would synchronise; read `converged`.

    Returns:
        P [..., K, M] in the accumulate dtype, a constant: gradients flow through `ot_sinkhorn2` only.
    """
    _check_method(method)
    a, b = _weights_of(a, M), _weights_of(b, M)
    out = transport.sinkhorn(
        M.detach(), a, b, eps=reg, max_iter=numItermax, tol=stopThr, return_plan=True, backend=backend
    )
    mass = out.plan.new_ones(()) if a is None else a.to(out.plan.dtype).sum(-1)
    plan = out.plan * mass[..., None, None]
    if not log:
        return plan
    K, N = M.shape[-2:]
    rows, cols = (
        out.f.new_full((n,), 1 / n) if w is None else features.normalize_weights(w.to(out.f.dtype))
        for w, n in ((a, K), (b, N))
    )
    return plan, {
        "niter": out.n_iter,
        "err": out.marginal_error,
        "converged": out.converged,
        "log_u": (rows * mass[..., None]).log() + out.f / reg,
        "log_v": cols.log() + out.g / reg,
    }


def ot_sinkhorn2(
    a: Tensor | Sequence[float] | None,
    b: Tensor | Sequence[float] | None,
    M: Tensor,
    reg: float,
    method: str = "sinkhorn",
    numItermax: int = 1000,
    stopThr: float = 1e-9,
    verbose: bool = False,
    *,
    warn: bool = True,
    grad: transport.Grad = "implicit",
    backend: str = "auto",
) -> Tensor:
    """<P, M> of the plan of `ot_sinkhorn`, called like POT's `ot.sinkhorn2`.

    Args:
        grad: "implicit" is exact at convergence, as POT's own gradient through all of its iterations is;
            "unroll" is exact for the iterate, "envelope" holds the plan fixed. Weights get no gradient.
        others: as `ot_sinkhorn`.

    Returns:
        [...] in the accumulate dtype.
    """
    _check_method(method)
    a, b = _weights_of(a, M), _weights_of(b, M)
    score: Tensor = transport.sinkhorn(
        M, a, b, eps=reg, max_iter=numItermax, tol=stopThr, grad=grad, backend=backend
    )
    return score if a is None else score * a.to(score.dtype).sum(-1)


class SamplesLoss(nn.Module):
    """OT_eps between weighted point clouds, called like GeomLoss's `SamplesLoss("sinkhorn")`.

    OT_eps(x, y) = min_P <P, C> + eps KL(P | a b^T), C_ij = |x_i - y_j|^p / p, eps = blur^p; with debias
    OT_eps(x, y) - (OT_eps(x, x) + OT_eps(y, y)) / 2.

    Args:
        loss: "sinkhorn"; the kernel norms of GeomLoss are not transport.
        p: 1 or 2.
        blur: > 0. For unit vectors, p=2, blur=sqrt(eps), debias=False is `spa_fast.sinkhorn` of 1 - cosine.
        reach: None; unbalanced transport is not offered.
        cost: C of (x [B, N, D], y [B, M, D]) as [B, N, M] in place of the above.
        debias: as above. GeomLoss's default, three problems.
        max_iter, tol: as in `spa_fast.sinkhorn`. GeomLoss instead lowers eps step by step and does not test
            convergence; at a small blur compare it with a `scaling` near 1.
        diameter, scaling, truncate, cluster_scale, verbose: accepted and without effect: they tune that.
        backend: as in `spa_fast.sinkhorn`; GeomLoss's own names count as "auto".

    Example:
        loss = SamplesLoss("sinkhorn", p=2, blur=0.1**0.5, debias=False)
        loss(x, y)        # [B, N, D], [B, M, D] -> [B];  [N, D], [M, D] -> []
        loss(a, x, b, y)  # weights [B, N], [B, M] or [N], [M]; constants

    Notes:
        The gradient with respect to the points is exact at convergence. Iterations are plain: at a small blur
        they may not converge, which is warned of on a CPU; there is no scaling of eps.
    """

    def __init__(
        self,
        loss: str = "sinkhorn",
        p: int = 2,
        blur: float = 0.05,
        reach: float | None = None,
        diameter: float | None = None,
        scaling: float = 0.5,
        truncate: float | None = 5,
        cost: Callable[[Tensor, Tensor], Tensor] | None = None,
        cluster_scale: float | None = None,
        debias: bool = True,
        verbose: bool = False,
        backend: str = "auto",
        *,
        max_iter: int = 1000,
        tol: float = 1e-4,
    ) -> None:
        super().__init__()
        checks.check_choice("loss", loss, ("sinkhorn",))
        if p not in (1, 2):
            raise ValueError(f"p: expected 1 or 2, got {p}")
        if reach is not None:
            raise ValueError(f"reach: expected None (balanced transport), got {reach}")
        if not (blur > 0 and math.isfinite(blur)):
            raise ValueError(f"blur: expected a finite number > 0, got {blur}")
        backend = "auto" if backend in _BACKENDS_OF_GEOMLOSS else backend
        transport.check_options(blur**p, max_iter, tol, "value", "envelope", backend=backend)
        self.p = p
        self.blur = blur
        self.cost = cost
        self.debias = debias
        self.max_iter = max_iter
        self.tol = tol
        self.backend = backend

    def forward(self, *args: Tensor) -> Tensor:
        """(x, y) or (a, x, b, y): [B], or a scalar for single clouds, in the accumulate dtype."""
        if len(args) not in (2, 4):
            raise TypeError(f"SamplesLoss: expected (x, y) or (a, x, b, y), got {len(args)} arguments")
        a, x, b, y = args if len(args) == 4 else (None, args[0], None, args[1])
        checks.check_float("x", x)
        checks.check_float("y", y)
        if x.dim() not in (2, 3):
            raise ValueError(f"x: expected [N, D] or [B, N, D], got {list(x.shape)}")
        checks.check_shape("y", y, "x's shape with M points", (*x.shape[:-2], None, x.shape[-1]))
        checks.check_like("y", y, "x", x)
        value = self._value(x, y, a, b)
        if self.debias:
            value = value - (self._value(x, x, a, a) + self._value(y, y, b, b)) / 2
        return value

    def _value(self, x: Tensor, y: Tensor, a: Tensor | None, b: Tensor | None) -> Tensor:
        eps = self.blur**self.p
        cost = self._cost(x[None], y[None])[0] if x.dim() == 2 else self._cost(x, y)
        out = transport.sinkhorn(
            cost,
            a,
            b,
            eps=eps,
            max_iter=self.max_iter,
            tol=self.tol,
            score="value",
            return_plan=True,
            backend=self.backend,
        )
        value: Tensor = out.score
        if checks.values_checkable(cost) and not bool(out.converged.all()):
            warnings.warn(
                f"SamplesLoss: not converged after {self.max_iter} iterations, marginal error up to "
                f"{float(out.marginal_error.max()):.1e}; raise blur ({self.blur}) or max_iter",
                stacklevel=3,
            )
        if a is None:
            return value
        # In GeomLoss's dual the weights are not normalised: of mass m, the potentials shift by -eps log m.
        mass = a.to(value.dtype).sum(-1)
        value = mass * value - eps * torch.special.xlogy(mass, mass)
        return value

    def _cost(self, x: Tensor, y: Tensor) -> Tensor:
        if self.cost is not None:
            return self.cost(x, y)
        acc = checks.accumulate_dtype(x)
        with torch.autocast(x.device.type, enabled=False):
            x, y = x.to(acc), y.to(acc)
            # Far from the origin |x|^2 + |y|^2 - 2 <x, y> would cancel.
            middle = x.detach().mean(-2, keepdim=True)
            x, y = x - middle, y - middle
            if self.p == 1:
                distance: Tensor = torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")
                return distance
            squares = x.square().sum(-1)[:, :, None] + y.square().sum(-1)[:, None, :]
            return squares / 2 - x @ y.mT

    def extra_repr(self) -> str:
        return f"p={self.p}, blur={self.blur}, debias={self.debias}, max_iter={self.max_iter}, tol={self.tol}"


def plot_sinkhorn(
    sim: Tensor,
    eps: float = 0.1,
    max_iter: int = 100,
    thresh: float = 1e-2,
    *,
    return_plan: bool = False,
    backend: str = "auto",
) -> Any:
    """sum T * sim, T the transport plan of cost 1 - sim between uniform weights: PLOT's loop in one call.

        K = exp((sim - 1) / eps);  r = u / (K c), c = v / (K^T r) from c = 1, <= max_iter times;  T = r K c

    Args:
        sim: [..., K, M] similarities, patches by prompts.
        thresh: each problem stops by itself once sum_i |sum_j T_ij - u_i| <= thresh, a relative change of
            the scalings: sum_i u_i |r_i / r_i_next - 1|. PLOT stops all problems together, once their mean
            |r - r_next| <= 1e-2; r grows with exp(1 / eps), so that its number of iterations does too. thresh
            = 0 runs max_iter iterations and gives PLOT's iterate to rounding.

    Returns:
        [...] in the accumulate dtype, T held constant in the gradient (PLOT computes it under no_grad), or
        `SinkhornOutput`. Where PLOT's exp(-cost / eps) underflows and it returns None, this stays finite;
        NaN in `sim` makes its own problem NaN.

    Source:
        Chen et al., "PLOT: Prompt Learning with Optimal Transport for Vision-Language Models", ICLR 2023.
    """
    return transport.align_similarity(
        sim, eps=eps, max_iter=max_iter, tol=thresh, return_plan=return_plan, backend=backend
    )


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
        The backward repeats the iterations in PyTorch and keeps O(iters P (K + M)), not the plans. No second
        derivative.
    """
    checks.check_float("scores", scores)
    checks.check_max_iter(iters)
    if scores.dim() != 3 or 0 in scores.shape[1:]:
        raise ValueError(f"scores: expected [P, K, M] with K, M >= 1, got {list(scores.shape)}")
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
    """log P [P, K, M] of couplings S after `iters` times u = log a - LSE_j(S + v), v = log b - LSE_i(S +
    u)."""

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


def _check_method(method: str) -> None:
    checks.check_choice("method", method, ("sinkhorn", "sinkhorn_log", "sinkhorn_stabilized"))


def _weights_of(weights: Tensor | Sequence[float] | None, M: Tensor) -> Tensor | None:
    """POT's weights: an empty list means uniform."""
    if weights is None or len(weights) == 0:
        return None
    if isinstance(weights, Tensor):
        return weights
    return torch.as_tensor(weights, dtype=checks.accumulate_dtype(M), device=M.device)
