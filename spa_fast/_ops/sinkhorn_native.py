"""The compiled CPU solver called with raw pointers, and the layouts of `cost` that every solver shares."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from spa_fast import _native
from spa_fast._checks import accumulate_dtype

Outputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]

# The numbers of CostType in csrc/sinkhorn.h.
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


def native_fwd(
    cost: Tensor, a: Tensor, b: Tensor, eps: float, max_iter: int, tol: float, value: bool, similarity: bool
) -> Outputs:
    extension: Any = _native.extension()
    out = empty_outputs(cost)
    score, f, g, n_iter, error = out
    extension.sinkhorn_fwd(
        cost.data_ptr(),
        DTYPES[cost.dtype],
        *_weights(a),
        *_weights(b),
        *sizes(cost),
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
        C=_beside(cost),
        similarity=similarity,
    )
    return out


def native_bwd(
    grad_score: Tensor, cost: Tensor, a: Tensor, b: Tensor, f: Tensor, g: Tensor, eps: float, similarity: bool
) -> Tensor:
    extension: Any = _native.extension()
    grad_cost = torch.empty_like(cost)
    extension.sinkhorn_bwd(
        grad_score.data_ptr(),
        cost.data_ptr(),
        DTYPES[cost.dtype],
        *_weights(a),
        *_weights(b),
        f.data_ptr(),
        g.data_ptr(),
        *sizes(cost),
        eps,
        grad_cost.data_ptr(),
        torch.get_num_threads(),
        C=_beside(cost),
        similarity=similarity,
    )
    return grad_cost


def _weights(weights: Tensor) -> tuple[int, int]:
    """Address and stride; one row serves all problems."""
    return weights.data_ptr(), 0 if weights.shape[0] == 1 else weights.shape[1]


def problems(cost: Tensor) -> Tensor:
    """[..., K, M], a view."""
    return cost.transpose(1, 2) if cost.dim() == 4 else cost


def _beside(cost: Tensor) -> int:
    """C of [B, K, C, M], which the extension divides by also where it is 0."""
    return max(1, cost.shape[2]) if cost.dim() == 4 else 1


def sizes(cost: Tensor) -> tuple[int, int, int]:
    """P, K, M."""
    *batch, K, M = problems(cost).shape
    return math.prod(batch), K, M


def empty_outputs(cost: Tensor) -> Outputs:
    P, K, M = sizes(cost)
    acc = accumulate_dtype(cost)
    return (
        cost.new_empty(P, dtype=acc),
        cost.new_empty(P, K, dtype=acc),
        cost.new_empty(P, M, dtype=acc),
        cost.new_empty(P, dtype=torch.int32),
        cost.new_empty(P, dtype=acc),
    )
