"""Plans in closed form, to ask whether optimal transport does anything."""

from __future__ import annotations

import torch
from torch import Tensor


def closed_form_plan(sim: Tensor, a: Tensor, b: Tensor, eps: float, solver: str) -> Tensor:
    """P [P, K, M] of similarities S = sim [P, K, M] and weights a [P or 1, K], b [P or 1, M].

    solver:
        "uniform": a b^T.
        "double_softmax": (diag(a) R + L diag(b)) / 2, R_ij = b_j e^(S_ij / eps) normalised over j,
            L_ij = a_i e^(S_ij / eps) normalised over i.
        "max_mean": a_i at the first j that maximises S_ij among b_j > 0.
    """
    active = (a != 0)[:, :, None] & (b != 0)[:, None, :]
    a, b = a[:, :, None], b[:, None, :]
    if solver == "uniform":
        return (a * b).expand_as(sim)
    least = torch.finfo(sim.dtype).min
    if solver == "max_mean":
        best = sim.detach().masked_fill(~active, least).argmax(-1, keepdim=True)
        return torch.zeros_like(sim).scatter(-1, best, 1.0) * a * active
    by_row = (sim / eps + b.log()).masked_fill(~active, least).softmax(-1)
    by_col = (sim / eps + a.log()).masked_fill(~active, least).softmax(-2)
    return (0.5 * (a * by_row + by_col * b)).masked_fill(~active, 0.0)
