"""The gradient of <P, C> at the fixed point of the iteration."""

from __future__ import annotations

import torch
from torch import Tensor

# Added to the unit diagonal of the normalised Schur complement. Its null vectors, one per connected component
# of the plan, do not reach the gradient; the ridge only keeps the Cholesky factor real.
_RIDGE = 1e-12


def implicit_gradient(plan: Tensor, cost: Tensor, eps: float) -> Tensor:
    """d<P, C>/dC at the fixed point: P_ij (1 + (x_i + y_j - C_ij) / eps) with H [x; y] = [h_f; h_g].

    H = [[diag r, P], [P^T, diag c]] is the Hessian of the dual, r and c the true sums of P, h_f and h_g the
    row and column sums of P * C. Eliminating x leaves S y = h_g - P^T (h_f / r) on the shorter side with S =
    diag c - P^T diag(1/r) P: the Laplacian of a graph, whose diagonal is summed from its off-diagonal part,
    so that nothing cancels. Solved in fp64: near a permutation S is nearly singular. The gauge is c . y = 0.
    """
    if cost.shape[1] < cost.shape[2]:
        return implicit_gradient(plan.transpose(1, 2), cost.transpose(1, 2), eps).transpose(1, 2)
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
