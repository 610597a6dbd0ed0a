"""Entropic transport between weighted points, batched, in the log domain.

    P_ij = a_i b_j exp((f_i + g_j - C_ij) / eps)
    f_i  = -eps logsumexp_j(log b_j + (g_j - C_ij) / eps)      start: g = 0
    g_j  = -eps logsumexp_i(log a_i + (f_i - C_ij) / eps)

One iteration is one f and one g update, after which the columns of P sum to b and the L1 error of its rows is
the `marginal_error`. Rows with a_i = 0 and columns with b_j = 0 take no part, whatever their cost. C_ij =
+inf forbids a pair; a row or column without any finite pair has potential 0 and plan 0.
NaN or -inf in a pair that takes part makes that problem's outputs NaN after 0 iterations.
Source: Cuturi, "Sinkhorn Distances", NeurIPS 2013; Peyre and Cuturi, "Computational Optimal Transport",
    section 4.4.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

# Added to the unit diagonal of the normalised Schur complement. Its null vectors, one per connected component
# of the plan, do not reach the gradient; the ridge only keeps the Cholesky factor real.
_RIDGE = 1e-12


def sinkhorn_fwd(
    cost: Tensor, a: Tensor, b: Tensor, eps: float, max_iter: int, tol: float, value: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Solve the P problems of `cost`, each stopping by itself at marginal_error <= tol (tol = 0: at
    max_iter).

    Args:
        cost: [P, K, M], any float dtype; accumulated in fp32 (fp64 for fp64).
        a, b: [P, K] or [1, K], [P, M] or [1, M] in the accumulate dtype; each row sums to 1 or is all 0.
        value: score is <P, C> + eps KL(P | a b^T) instead of <P, C>.

    Returns:
        score [P], f [P, K], g [P, M] (units of cost), n_iter int32 [P], marginal_error [P].
    """
    P, K, M = cost.shape
    solver = _Solver(cost, a, b, eps)
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
    score = solver.value(phi, psi) if value else solver.transport(phi, psi)
    f = (phi * eps).masked_fill(bad[:, None] & (solver.a != 0), math.nan)
    g = (psi * eps).masked_fill(bad[:, None] & (solver.b != 0), math.nan)
    return score.masked_fill(bad, math.nan), f, g, n_iter, error.masked_fill(bad, math.nan)


def sinkhorn_plan(cost: Tensor, a: Tensor, b: Tensor, f: Tensor, g: Tensor, eps: float) -> Tensor:
    """P [P, K, M] of the potentials in the accumulate dtype."""
    return _Solver(cost, a, b, eps).plan(f / eps, g / eps)


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
) -> Tensor:
    """grad_cost [P, K, M] in the dtype of `cost`.

    mode:
        "envelope": grad_score P. Exact for the value at convergence; for <P, C> it holds the plan fixed.
        "implicit": exact at the fixed point the iteration converges to. Equal to "envelope" for the value.
        "unroll": exact for the iterate after each problem's own n_iter steps.
    """
    solver = _Solver(cost, a, b, eps)
    if mode == "unroll":
        grad = _unroll(solver, f, g, n_iter, value)
    else:
        grad = solver.plan(f / eps, g / eps)
        if mode == "implicit" and not value:
            grad = _implicit(grad, solver.C, eps)
    return (grad * grad_score[:, None, None]).to(cost.dtype)


class _Solver:
    """Cost of the problems and the updates of the scaled potentials phi = f / eps, psi = g / eps."""

    def __init__(self, cost: Tensor, a: Tensor, b: Tensor, eps: float) -> None:
        P, _, _ = cost.shape
        acc = torch.float64 if cost.dtype == torch.float64 else torch.float32
        self.eps = eps
        self.a, self.b = a.to(acc).expand(P, -1), b.to(acc).expand(P, -1)
        active = (self.a != 0)[:, :, None] & (self.b != 0)[:, None, :]
        self.C = cost.to(acc).masked_fill(~active, math.inf)
        self.L = self.C / -eps
        self.log_a, self.log_b = self.a.log(), self.b.log()

    def take(self, index: Tensor) -> _Solver:
        part = object.__new__(_Solver)
        part.eps = self.eps
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
        missing = torch.expm1(phi - phi_next).abs().masked_fill(dead, 1.0)
        return _sum(self.a * missing)

    def plan(self, phi: Tensor, psi: Tensor) -> Tensor:
        return (self.L + (self.log_a + phi)[:, :, None] + (self.log_b + psi)[:, None, :]).exp()

    def transport(self, phi: Tensor, psi: Tensor) -> Tensor:
        return _sum(_sum(_weigh(self.plan(phi, psi), self.C)))

    def value(self, phi: Tensor, psi: Tensor) -> Tensor:
        plan = self.plan(phi, psi)
        r, c = _sum(plan), _sum(plan, 1)
        mass = _sum(self.a) * _sum(self.b)
        return self.eps * (_sum(r * phi) + _sum(c * psi) - (_sum(r) - mass))


def _implicit(plan: Tensor, cost: Tensor, eps: float) -> Tensor:
    """d<P, C>/dC at the fixed point: P_ij (1 + (x_i + y_j - C_ij) / eps) with H [x; y] = [h_f; h_g].

    H = [[diag r, P], [P^T, diag c]] is the Hessian of the dual, r and c the true sums of P, h_f and h_g the
    row and column sums of P * C. Eliminating x leaves S y = h_g - P^T (h_f / r) on the shorter side with S =
    diag c - P^T diag(1/r) P: the Laplacian of a graph, whose diagonal is summed from its off-diagonal part,
    so that nothing cancels. Solved in fp64: near a permutation S is nearly singular. The gauge is c . y = 0.
    """
    if cost.shape[1] < cost.shape[2]:
        return _implicit(plan.transpose(1, 2), cost.transpose(1, 2), eps).transpose(1, 2)
    p = plan.double()
    C = cost.double().masked_fill(plan == 0, 0.0)
    r, c = p.sum(2), p.sum(1)
    q = p / r.masked_fill(r == 0, 1.0)[:, :, None]
    centred = C - (q * C).sum(2, keepdim=True)
    weight = p.transpose(1, 2) @ q
    weight.diagonal(dim1=1, dim2=2).zero_()
    scale = c.masked_fill(c == 0, 1.0).rsqrt()
    S = (torch.diag_embed(weight.sum(2)) - weight) * scale[:, :, None] * scale[:, None, :]
    root = c.sqrt()
    S = S + root[:, :, None] * root[:, None, :] / c.sum(1).clamp(min=1e-300)[:, None, None]
    S.diagonal(dim1=1, dim2=2).add_(_RIDGE + (c == 0).double())
    factor, _ = torch.linalg.cholesky_ex(S)
    h = (p * centred).sum(1) * scale
    y = torch.cholesky_solve(h[:, :, None], factor).squeeze(2) * scale
    y = y[:, None, :] - (q @ y[:, :, None])
    return (p * (1 + (y - centred) / eps)).to(plan.dtype)


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


def _weigh(plan: Tensor, x: Tensor) -> Tensor:
    """plan * x where the plan is not 0, else 0: a forbidden pair costs nothing."""
    return torch.where(plan == 0, 0.0, plan * x)


def _logsumexp(x: Tensor, dim: int) -> Tensor:
    """Overwrites x."""
    top = x.amax(dim, keepdim=True)
    top.masked_fill_(top == -math.inf, 0.0)
    return _sum(x.sub_(top).exp_(), dim).log_() + top.squeeze(dim)


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
