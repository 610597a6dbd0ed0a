"""Fronts shaped like POT, GeomLoss, PLOT and SuperGlue: their arguments and results over the solvers here."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from spa_fast import _checks as checks
from spa_fast import _features as features
from spa_fast import transport

__all__ = ["SamplesLoss", "log_optimal_transport", "ot_sinkhorn", "ot_sinkhorn2", "plot_sinkhorn"]

_BACKENDS_OF_GEOMLOSS = ("tensorized", "online", "multiscale")


# SamplesLoss solves at _STAGES larger eps first, each _FALL times the next (GeomLoss halves blur), loosely.
_STAGES, _FALL = 6, 4
_STAGE_ITERATIONS, _STAGE_TOL = 100, 1e-2


def ot_sinkhorn(
    a: Any,
    b: Any,
    M: Any,
    reg: float,
    method: str = "sinkhorn",
    numItermax: int = 1000,
    stopThr: float = 1e-9,
    verbose: bool = False,
    log: bool = False,
    warn: bool = True,
    warmstart: None = None,
    *,
    backend: str = "auto",
) -> Any:
    """The plan argmin_P <P, M> + reg KL(P | a b^T), called like POT's `ot.sinkhorn`.

    Args:
        a, b: weights [K] and [M], or broadcastable to the batch of M; None or empty is uniform. The plan has
            the mass of `a`, to which b is scaled.
        M: cost [K, M], also any batch [..., K, M]. All three are tensors or what torch.tensor reads; unless M
            is a tensor, results are NumPy arrays.
        reg: regularisation > 0 in units of cost. POT's entropy and this KL have the same plan.
        method: "sinkhorn", "sinkhorn_log" or "sinkhorn_stabilized", which are one and the same here.
        numItermax: iterations at most.
        stopThr: each problem stops once the L1 error of its row sums (of mass 1) is <= stopThr. POT looks at
            every tenth iteration, at the L2 error of the columns. fp32 does not reach much below 1e-6: there
            a smaller stopThr runs numItermax iterations.
        log: return (plan, log), log holding niter, err, converged, log_u and log_v per problem with P =
            exp(log_u + log_v - M / reg).
        verbose, warn: without effect: looking at values would synchronise; read `converged`.
        warmstart: None; iterations start at potentials 0.

    Returns:
        P [..., K, M] in the accumulate dtype, a constant: gradients flow through `ot_sinkhorn2` only.
    """
    a, b, cost, as_numpy = _pot_arguments(a, b, M, reg, method, numItermax, stopThr, warmstart)
    out = transport.sinkhorn(
        cost.detach(), a, b, eps=reg, max_iter=numItermax, tol=stopThr, return_plan=True, backend=backend
    )
    plan = out.plan if a is None else out.plan * a.to(out.plan.dtype).sum(-1)[..., None, None]
    return _pot_results(plan, _pot_log(out, a, b, reg) if log else None, as_numpy)


def ot_sinkhorn2(
    a: Any,
    b: Any,
    M: Any,
    reg: float,
    method: str = "sinkhorn",
    numItermax: int = 1000,
    stopThr: float = 1e-9,
    verbose: bool = False,
    log: bool = False,
    warn: bool = False,
    warmstart: None = None,
    *,
    grad: transport.Grad = "implicit",
    backend: str = "auto",
) -> Any:
    """<P, M> of the plan of `ot_sinkhorn`, called like POT's `ot.sinkhorn2`.

    Args:
        grad: "implicit" is exact at convergence, as POT's own gradient through all of its iterations is;
            "unroll" is exact for the iterate, "envelope" holds the plan fixed. Weights get no gradient.
        log: return (score, log), log as of `ot_sinkhorn`.
        others: as `ot_sinkhorn`.

    Returns:
        [...] in the accumulate dtype.
    """
    a, b, cost, as_numpy = _pot_arguments(a, b, M, reg, method, numItermax, stopThr, warmstart)
    options: dict[str, Any] = {"grad": grad, "backend": backend}
    out = transport.sinkhorn(
        cost, a, b, eps=reg, max_iter=numItermax, tol=stopThr, return_plan=log, **options
    )
    score = out.score if log else out
    if a is not None:
        score = score * a.to(score.dtype).sum(-1)
    return _pot_results(score, _pot_log(out, a, b, reg) if log else None, as_numpy)


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
        max_iter, tol: as in `spa_fast.sinkhorn`, of the last eps. GeomLoss does not test convergence; at a
            small blur compare it with a `scaling` near 1.
        diameter, scaling, truncate, cluster_scale, verbose: accepted and without effect: they tune GeomLoss's
            own iterations.
        backend: as in `spa_fast.sinkhorn`; GeomLoss's own names count as "auto".

    Example:
        loss = SamplesLoss("sinkhorn", p=2, blur=0.1**0.5, debias=False)
        loss(x, y)        # [B, N, D], [B, M, D] -> [B];  [N, D], [M, D] -> []
        loss(a, x, b, y)  # weights [B, N], [B, M] or [N], [M]; constants

    Notes:
        The gradient with respect to the points is exact at convergence. eps falls to blur^p in steps, each
        starting from the potentials found before, except for OT_eps(x, x), which is faster without. What has
        not converged even so is warned of on a CPU.
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
        max_iter: int = 10_000,
        tol: float = 1e-3,
    ) -> None:
        super().__init__()
        checks.check_choice("loss", loss, ("sinkhorn",))
        if isinstance(p, (bool, Tensor)) or p not in (1, 2):
            raise ValueError(f"p: expected 1 or 2, got {p}")
        if reach is not None:
            raise ValueError(f"reach: expected None (balanced transport), got {reach}")
        checks.check_blur(blur)
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
        checks.check_input("x", x)
        checks.check_float("y", y)
        checks.check_reverse("y", y)
        if x.dim() not in (2, 3):
            raise ValueError(f"x: expected [N, D] or [B, N, D], got {list(x.shape)}")
        for name, points in (("x", x), ("y", y)):
            if 0 in points.shape[-2:-1]:
                raise ValueError(f"{name}: expected at least one point, got {list(points.shape)}")
        checks.check_shape("y", y, "x's shape with M points", (*x.shape[:-2], None, x.shape[-1]))
        checks.check_like("y", y, "x", x)
        value = self._value(x, y, a, b)
        if self.debias:
            value = value - (self._value(x, x, a, a) + self._value(y, y, b, b)) / 2
        return value

    def _value(self, x: Tensor, y: Tensor, a: Tensor | None, b: Tensor | None) -> Tensor:
        eps = self.blur**self.p
        cost = self._cost(x[None], y[None])[0] if x.dim() == 2 else self._cost(x, y)
        start = None if x is y else self._start(cost.detach(), a, b, eps)
        out = transport.sinkhorn(
            cost if start is None else cost - start[..., None, :],
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
        if start is not None:
            # Columns of the plan sum to b: moving C by g_j moves the value by <b, g>.
            weights = 1 / start.shape[-1] if b is None else features.normalize_weights(b.to(value.dtype))
            value = value + (weights * start).sum(-1)
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

    def _start(self, cost: Tensor, a: Tensor | None, b: Tensor | None, eps: float) -> Tensor:
        """g [..., M] at a larger eps. A solver starts at g = 0: with g taken off the cost it starts there."""
        g = torch.zeros_like(cost[..., 0, :], dtype=checks.accumulate_dtype(cost))
        for stage in range(_STAGES, 0, -1):
            out = transport.sinkhorn(
                cost - g[..., None, :],
                a,
                b,
                eps=eps * _FALL**stage,
                max_iter=_STAGE_ITERATIONS,
                tol=_STAGE_TOL,
                return_plan=True,
                backend=self.backend,
            )
            g = g + out.g
        return g

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
    checks.check_tol(thresh, "thresh")
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


def _pot_arguments(
    a: Any, b: Any, M: Any, reg: float, method: str, numItermax: int, stopThr: float, warmstart: Any
) -> tuple[Tensor | None, Tensor | None, Tensor, bool]:
    """a, b and M as tensors, and whether results are to be NumPy arrays."""
    checks.check_choice("method", method, ("sinkhorn", "sinkhorn_log", "sinkhorn_stabilized"))
    checks.check_eps(reg, "reg")
    checks.check_max_iter(numItermax, "numItermax")
    checks.check_tol(stopThr, "stopThr")
    if warmstart is not None:
        kind = type(warmstart).__name__
        raise ValueError(f"warmstart: expected None (iterations start at potentials 0), got {kind}")
    cost = _as_tensor("M", M)
    checks.check_input("M", cost)
    return _weights_of("a", a, cost), _weights_of("b", b, cost), cost, not isinstance(M, Tensor)


def _pot_log(
    out: transport.SinkhornOutput, a: Tensor | None, b: Tensor | None, reg: float
) -> dict[str, Tensor]:
    mass = out.f.new_ones(()) if a is None else a.to(out.f.dtype).sum(-1)
    rows, cols = (
        f.new_full(f.shape[-1:], 1 / f.shape[-1]) if w is None else features.normalize_weights(w.to(f.dtype))
        for w, f in ((a, out.f), (b, out.g))
    )
    return {
        "niter": out.n_iter,
        "err": out.marginal_error,
        "converged": out.converged,
        "log_u": (rows * mass[..., None]).log() + out.f / reg,
        "log_v": cols.log() + out.g / reg,
    }


def _pot_results(result: Any, log: dict[str, Any] | None, as_numpy: bool) -> Any:
    if as_numpy:
        # [()] turns an array without dimensions into a number.
        result = result.numpy()[()]
        log = None if log is None else {name: x.numpy()[()] for name, x in log.items()}
    return result if log is None else (result, log)


def _as_tensor(name: str, x: Any) -> Tensor:
    if isinstance(x, Tensor):
        return x
    try:
        return torch.tensor(x)
    except (TypeError, ValueError, RuntimeError) as error:
        kind = type(x).__name__
        raise TypeError(f"{name}: expected a tensor, an array or numbers, got {kind} ({error})") from error


def _weights_of(name: str, weights: Any, cost: Tensor) -> Tensor | None:
    """POT's weights: an empty list means uniform."""
    if weights is None or isinstance(weights, Tensor):
        return None if weights is None or weights.numel() == 0 else weights
    weights = _as_tensor(name, weights)
    if weights.is_complex():
        raise TypeError(f"{name}: expected real weights, got {weights.dtype}")
    return weights.to(cost.device, checks.accumulate_dtype(cost)) if weights.numel() else None
