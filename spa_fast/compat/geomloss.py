"""A front shaped like GeomLoss's `SamplesLoss`."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn

from spa_fast import _checks as checks
from spa_fast import _features as features
from spa_fast import transport

_BACKENDS_OF_GEOMLOSS = ("tensorized", "online", "multiscale")

# SamplesLoss solves at _STAGES larger eps first, each _FALL times the next (GeomLoss halves blur), loosely.
_STAGES, _FALL = 6, 4
_STAGE_ITERATIONS, _STAGE_TOL = 100, 1e-2


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
