"""Count, mean and scatter of a class gathered from a stream, and the covariance that they make."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from spa_fast.reference.gaussian import pack_tril, tril_positions, unpack_tril

Shrink = Literal["none", "average", "ledoit_wolf", "oas"]


@dataclass(frozen=True)
class Moments:
    """What n rows x leave behind, fp64, with y = x - mean.

    Attributes:
        count: n.
        mean: [D].
        scatter: S = sum y y^T, its lower triangle packed by rows [D(D+1)/2] or its diagonal alone [D]; 0 []
            where it is not held here.
        fourth: sum |y|^2 y and sum |y|^4, [D + 1]; None where nobody asks for Ledoit and Wolf's intensity.
    """

    count: int
    mean: Tensor
    scatter: Tensor
    fourth: Tensor | None


def of_rows(x: Tensor, *, diagonal: bool, fourth: bool) -> Moments:
    """Moments of x [n, D], n >= 1."""
    x = x.double()
    mean = x.mean(0)
    x = x - mean
    scatter = x.square().sum(0) if diagonal else pack_tril(x.T @ x)
    if not fourth:
        return Moments(len(x), mean, scatter, None)
    square = x.square().sum(1)
    return Moments(len(x), mean, scatter, torch.cat([square @ x, (square @ square)[None]]))


def join(a: Moments, b: Moments, *, diagonal: bool) -> Moments:
    """Moments of the rows behind a and b together (Chan, Golub and LeVeque, 1979).

    With d from a centre to a mean, the fourth-order sums about that centre are
        sum |y + d|^2 (y + d) = T + (tr S) d + 2 S d + n |d|^2 d,
        sum |y + d|^4 = Q + 4 T.d + 4 d^T S d + 2 |d|^2 tr S + n |d|^4,     T = sum |y|^2 y, Q = sum |y|^4.
    """
    count = a.count + b.count
    delta = b.mean - a.mean
    between = delta.square() if diagonal else pack_tril(delta.outer(delta))
    scatter = a.scatter + b.scatter + between * (a.count * b.count / count)
    mean = a.mean + delta * (b.count / count)
    fourth = None
    if a.fourth is not None and b.fourth is not None:
        fourth = _fourth_about(a, mean) + _fourth_about(b, mean)
    return Moments(count, mean, scatter, fourth)


def diagonal_of(scatter: Tensor, dim: int) -> Tensor:
    """[D] of either form of the scatter."""
    if scatter.numel() == dim:
        return scatter
    rows = torch.arange(dim)
    return scatter[rows * (rows + 3) // 2]


def symmetric(packed: Tensor, dim: int) -> Tensor:
    """[D, D] of a packed lower triangle."""
    tril = unpack_tril(packed, dim)
    return tril + tril.tril(-1).T


def frobenius(packed: Tensor, dim: int) -> float:
    """Sum of the squares of all entries of the symmetric matrix behind a packed triangle."""
    return 2 * float(packed @ packed) - float(diagonal_of(packed, dim).square().sum())


def shrunk(scatter: Tensor, count: int, freedom: int, dim: int, shrink: Shrink, quartic: float) -> Tensor:
    """Covariance [D, D] of a packed scatter of `count` rows.

    "none" is S / freedom; "average" adds to it the mean of its variances on the diagonal and the mean of the
    other entries elsewhere. "ledoit_wolf" and "oas", as in scikit-learn, (1 - w) S / n + w (tr S / (n D)) I:
        Ledoit and Wolf (2004):  w = min(b, d) / d,  d = |S/n|^2 - D m^2,  b = (Q/n - |S/n|^2) / n,
        Chen et al. (2010), eq. 23 as D grows:  w = min(1, (a + m^2) / ((n + 1) (a - m^2 / D))),
    with m = tr S / (n D), a = |S/n|^2 / D^2, Q = sum |y|^4.
    """
    if shrink in ("none", "average"):
        cov = symmetric(scatter / freedom, dim)
        if shrink == "average":
            eye = torch.eye(dim, dtype=cov.dtype)
            variance = cov.diagonal().mean()
            other = (cov.sum() - cov.diagonal().sum()) / max(cov.numel() - dim, 1)
            cov = cov + variance * eye + other * (1 - eye)
        return cov
    scatter = scatter / count
    m = float(diagonal_of(scatter, dim).mean())
    square = frobenius(scatter, dim)
    if dim == 1:
        weight = 0.0
    elif shrink == "ledoit_wolf":
        spread = square - dim * m * m
        noise = min(max(quartic / count - square, 0.0) / count, spread)
        weight = noise / spread if noise > 0 else 0.0
    else:
        a = square / dim**2
        spread = (count + 1) * (a - m * m / dim)
        weight = min((a + m * m) / spread, 1.0) if spread > 0 else 1.0
    cov = (1 - weight) * symmetric(scatter, dim)
    cov.diagonal().add_(weight * m)
    return cov


def _fourth_about(m: Moments, centre: Tensor) -> Tensor:
    assert m.fourth is not None
    dim, d = len(centre), m.mean - centre
    third, quartic = m.fourth[:-1], m.fourth[-1]
    rows, columns = tril_positions(dim)
    # S d from the triangle: every entry serves its row and, off the diagonal, its column.
    product = torch.zeros_like(d).index_add_(0, rows, m.scatter * d[columns])
    product.index_add_(0, columns, m.scatter * d[rows] * (rows != columns))
    trace, square = diagonal_of(m.scatter, dim).sum(), d @ d
    cubic = third + trace * d + 2 * product + m.count * square * d
    quartic = quartic + 4 * (third @ d) + 4 * (d @ product) + 2 * square * trace + m.count * square * square
    return torch.cat([cubic, quartic[None]])
