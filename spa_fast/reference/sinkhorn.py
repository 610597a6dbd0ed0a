"""Entropic transport between weighted points, batched, in the log domain.

    P_ij = a_i b_j exp((f_i + g_j - C_ij) / eps)
    f_i  = -eps logsumexp_j(log b_j + (g_j - C_ij) / eps)      start: g = 0
    g_j  = -eps logsumexp_i(log a_i + (f_i - C_ij) / eps)

One iteration is one f and one g update, after which the columns of P sum to b and the L1 error of its rows is
the `marginal_error`. Rows with a_i = 0 and columns with b_j = 0 take no part, whatever their cost. C_ij =
+inf forbids a pair; a row or column without any finite pair has potential 0 and plan 0.
NaN or -inf in a pair that takes part makes that problem's outputs NaN after 0 iterations.
With `similarity` the input is S, the cost 1 - S, and <P, S> takes the place of <P, C>. What is solved is the
cost -S, whose f is smaller by 1: nothing that S holds is lost beside 1.
Source: Cuturi, "Sinkhorn Distances", NeurIPS 2013; Peyre and Cuturi, "Computational Optimal Transport",
    section 4.4.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .implicit import implicit_gradient


def sinkhorn_fwd(
    cost: Tensor,
    a: Tensor,
    b: Tensor,
    eps: float,
    max_iter: int,
    tol: float,
    value: bool,
    similarity: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Solve the P problems of `cost`, each stopping by itself at marginal_error <= tol (tol = 0: at
    max_iter).

    Args:
        cost: [P, K, M], any float dtype; accumulated in fp32 (fp64 for fp64, and for the value, which at a
            large eps is a small difference of potentials).
        a, b: [P, K] or [1, K], [P, M] or [1, M] in the accumulate dtype; each row sums to 1 or is all 0.
        value: score is <P, C> + eps KL(P | a b^T) instead of <P, C>.

    Returns:
        score [P], f [P, K], g [P, M] (units of cost), n_iter int32 [P], marginal_error [P].
    """
    P, K, M = cost.shape
    solver = _Solver(cost, a, b, eps, similarity, wide=value)
    phi, psi = solver.L.new_zeros(P, K), solver.L.new_zeros(P, M)
    n_iter = torch.zeros(P, dtype=torch.int32, device=cost.device)
    error = solver.L.new_zeros(P)
    # Only on a CPU may the shrinking set of unsolved problems be asked for without a device synchronisation.
    compact = cost.device.type == "cpu"
    mass = (solver.a != 0).any(-1) & (solver.b != 0).any(-1)
    bad = mass & (solver.L.isnan() | solver.L.isposinf()).any(2).any(1)
    bad |= solver.a.isnan().any(1) | solver.b.isnan().any(1)
    live = mass & ~bad
    index = live.nonzero().squeeze(1) if compact else torch.arange(P, device=cost.device)
    part = solver.take(index) if compact else solver
    x, _ = part.rows(psi[index])
    for _ in range(max_iter):
        if compact and index.numel() == 0:
            break
        y_new = part.cols(x)
        x_next, dead = part.rows(y_new)
        # The next row update already holds the row sums: r_i = a_i exp((f_i - f_i_next) / eps).
        e = part.row_error(x, x_next, dead)
        going = live[index]
        phi[index] = torch.where(going[:, None], x, phi[index])
        psi[index] = torch.where(going[:, None], y_new, psi[index])
        error[index] = torch.where(going, e, error[index])
        n_iter[index] += going.int()
        x = x_next
        if tol > 0:
            live[index] = going & ~(e <= tol)
            keep = live[index]
            if compact and not bool(keep.all()):
                index, x = index[keep], x[keep]
                part = solver.take(index)
    score = solver.value(phi, psi) if value else solver.score(phi, psi)
    score, error = score.masked_fill(bad, math.nan), error.masked_fill(bad, math.nan)
    f = solver.f(phi).masked_fill(bad[:, None] & (solver.a != 0), math.nan)
    g = (psi * eps).masked_fill(bad[:, None] & (solver.b != 0), math.nan)
    acc = _accumulate_dtype(cost)
    return score.to(acc), f.to(acc), g.to(acc), n_iter, error.to(acc)


def sinkhorn_plan(
    cost: Tensor, a: Tensor, b: Tensor, f: Tensor, g: Tensor, eps: float, similarity: bool = False
) -> Tensor:
    """P [P, K, M] of the potentials in the accumulate dtype."""
    solver = _Solver(cost, a, b, eps, similarity)
    return solver.plan((f - solver.shift) / eps, g / eps)


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
    mode: str,
    similarity: bool = False,
) -> Tensor:
    """grad_cost [P, K, M] in the dtype of `cost`, with respect to what it holds.

    mode:
        "envelope": grad_score P. Exact for the value at convergence, whose sign turns for a similarity; for
            <P, C> and <P, S> it holds the plan fixed.
        "implicit": exact at the fixed point the iteration converges to. Equal to "envelope" for the value.
        "unroll": exact for the iterate after each problem's own n_iter steps.
    """
    solver = _Solver(cost, a, b, eps, similarity)
    if mode == "unroll":
        grad = _unroll(solver, f, g, n_iter, value)
    else:
        grad = solver.plan((f - solver.shift) / eps, g / eps)
        if mode == "implicit" and not value:
            grad = implicit_gradient(grad, solver.C, eps)
    # <P, S>(S) = -<P, C>(-S) has the derivative of <P, C>; the value falls where S rises.
    upstream = -grad_score if similarity and value else grad_score
    return (grad * upstream[:, None, None]).to(cost.dtype)


class _Solver:
    """Cost of the problems, -S for a similarity, and the updates of the scaled potentials phi = (f - shift) /
    eps and psi = g / eps; `wide` computes in fp64."""

    def __init__(
        self, cost: Tensor, a: Tensor, b: Tensor, eps: float, similarity: bool, wide: bool = False
    ) -> None:
        P, _, _ = cost.shape
        acc = torch.float64 if wide else _accumulate_dtype(cost)
        self.eps, self.similarity, self.shift = eps, similarity, float(similarity)
        self.a, self.b = a.to(acc).expand(P, -1), b.to(acc).expand(P, -1)
        active = (self.a != 0)[:, :, None] & (self.b != 0)[:, None, :]
        self.C = (-cost.to(acc) if similarity else cost.to(acc)).masked_fill(~active, math.inf)
        self.L = self.C / -eps
        self.log_a, self.log_b = self.a.log(), self.b.log()

    def take(self, index: Tensor) -> _Solver:
        part = object.__new__(_Solver)
        for name in ("a", "b", "C", "L", "log_a", "log_b"):
            setattr(part, name, getattr(self, name)[index])
        return part

    def rows(self, psi: Tensor) -> tuple[Tensor, Tensor]:
        """phi [P, K] and which rows have no finite pair."""
        lse = _logsumexp(self.L + (self.log_b + psi)[:, None, :], 2)
        dead = lse == -math.inf
        return (-lse).masked_fill(dead, 0.0), dead

    def cols(self, phi: Tensor) -> Tensor:
        lse = _logsumexp(self.L + (self.log_a + phi)[:, :, None], 1)
        return (-lse).masked_fill(lse == -math.inf, 0.0)

    def row_error(self, phi: Tensor, phi_next: Tensor, dead: Tensor) -> Tensor:
        lost = dead | (phi.abs() * torch.finfo(phi.dtype).eps > 0.1)  # too large to be rounded to a plan
        missing = torch.expm1(phi - phi_next).abs().masked_fill(lost, 1.0)
        return _sum(self.a * missing)

    def plan(self, phi: Tensor, psi: Tensor) -> Tensor:
        return (self.L + (self.log_a + phi)[:, :, None] + (self.log_b + psi)[:, None, :]).exp()

    def f(self, phi: Tensor) -> Tensor:
        """In units of the cost 1 - S; 0 in rows without a finite pair."""
        return (phi * self.eps + self.shift).masked_fill(self.L.isneginf().all(2), 0.0)

    def score(self, phi: Tensor, psi: Tensor) -> Tensor:
        """<P, C>, or <P, S>."""
        moved = _sum(_sum(_weigh(self.plan(phi, psi), self.C)))
        return 0 - moved if self.similarity else moved

    def value(self, phi: Tensor, psi: Tensor) -> Tensor:
        plan = self.plan(phi, psi)
        r, c = _sum(plan), _sum(plan, 1)
        mass = _sum(self.a) * _sum(self.b)
        return self.eps * (_sum(r * phi) + _sum(c * psi) - (_sum(r) - mass)) + self.shift * _sum(r)


def _unroll(solver: _Solver, f: Tensor, g: Tensor, n_iter: Tensor, value: bool) -> Tensor:
    """d score/dC through every iteration, potentials recomputed and kept: O(max n_iter P (K + M)) memory."""
    steps = int(n_iter.max()) if n_iter.numel() else 0
    phi, psi = torch.zeros_like(f), torch.zeros_like(g)
    history = []
    for t in range(steps):
        going = (n_iter > t)[:, None]
        phi_t = torch.where(going, solver.rows(psi)[0], phi)
        history.append((psi, phi_t, going))
        phi, psi = phi_t, torch.where(going, solver.cols(phi_t), psi)
    plan = solver.plan(phi, psi)
    # The score is sum P Q up to terms that only P's mass enters: Q = C, or f + g for the value. Adjoints of
    # phi, psi.
    Q = (phi[:, :, None] + psi[:, None, :]) if value else solver.C / solver.eps
    weighed = _weigh(plan, Q)
    d_phi, d_psi = solver.eps * weighed.sum(2), solver.eps * weighed.sum(1)
    grad = plan - weighed
    for t in range(steps - 1, -1, -1):
        psi_old, phi_t, going = history[t]
        psi_t = history[t + 1][0] if t + 1 < steps else psi
        alpha = (solver.L + (solver.log_a + phi_t)[:, :, None] + psi_t[:, None, :]).exp()
        step = _weigh(alpha, (d_psi / solver.eps * going)[:, None, :])
        grad = grad + step
        d_phi = torch.where(going, d_phi - solver.eps * step.sum(2), d_phi)
        beta = (solver.L + (solver.log_b + psi_old)[:, None, :] + phi_t[:, :, None]).exp()
        step = _weigh(beta, (d_phi / solver.eps * going)[:, :, None])
        grad = grad + step
        d_psi = torch.where(going, -solver.eps * step.sum(1), d_psi)
        d_phi = d_phi.masked_fill(going, 0.0)
    return grad


def _accumulate_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _weigh(plan: Tensor, x: Tensor) -> Tensor:
    """plan * x where the plan is not 0, else 0: a forbidden pair costs nothing."""
    return plan * x.masked_fill(plan == 0, 0.0)


def _logsumexp(x: Tensor, dim: int) -> Tensor:
    """Overwrites x."""
    top = x.detach().amax(dim, keepdim=True)
    dead = top == -math.inf
    top.masked_fill_(dead, 0.0)
    # The logarithm of 0 has no second derivative either.
    total = _sum(x.sub_(top).exp_(), dim).masked_fill(dead.squeeze(dim), 1.0)
    return (total.log() + top.squeeze(dim)).masked_fill(dead.squeeze(dim), -math.inf)


def _sum(x: Tensor, dim: int = -1) -> Tensor:
    """Sum by halves: trailing zeros, hence masked entries, do not change a bit."""
    n = x.shape[dim]
    while n > 1:
        half = 1 << ((n - 1).bit_length() - 1)
        low, high = x.narrow(dim, 0, half), x.narrow(dim, half, n - half)
        if n == 2 * half:
            x = low + high
        else:
            x = low.clone()
            x.narrow(dim, 0, n - half).add_(high)
        n = half
    return x.squeeze(dim)
