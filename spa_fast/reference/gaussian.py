"""Counter-based normals and draws mean + L z from class-wise Gaussians.

A normal is a pure function of (seed, class id, sample index, dimension): Philox4x32-10 (Salmon et al.,
"Parallel random numbers: as easy as 1, 2, 3", 2011) with

    counter = (dimension // 4, sample index, class id, 0),    key = (low, high 32 bits of the seed),

turns into four words w, and the words into the normals of dimensions 4i .. 4i+3 by Box and Muller:

    u = fl(fl(w) 2^-32 + 2^-33) in (0, 1],    v = fl(w') 2^-31 in [0, 2]          (fl: rounding to fp32)
    z = sqrt(-2 ln u) cos(pi v), sqrt(-2 ln u) sin(pi v),       (w, w') = (w0, w1), (w2, w3)

u and v are the same bits on every IEEE machine; what follows them is done in fp64 here.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)

# Added to the diagonal in turn, times trace/D, until the factorisation succeeds.
_JITTER = (0.0, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2)
# An eigenvalue below minus this times trace/D is no rounding: the matrix is refused.
_INDEFINITE = 1e-1

Factor = Tensor | tuple[Tensor, Tensor]


def philox4x32(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """Philox4x32-10: four int64 tensors with values in [0, 2^32) that broadcast, to four of that kind."""
    x0, x1, x2, x3 = counter
    k0, k1 = key
    for _ in range(10):
        # The int64 product wraps, which leaves the bits of the unsigned 64-bit product.
        p0, p1 = x0 * _MULTIPLIERS[0], x2 * _MULTIPLIERS[1]
        x0, x2 = (p1 >> 32) & _MASK ^ x1 ^ k0, (p0 >> 32) & _MASK ^ x3 ^ k1
        x1, x3 = p1 & _MASK, p0 & _MASK
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return x0, x1, x2, x3


def normals(seed: int, class_ids: Tensor, n: int, dim: int, first: int = 0) -> Tensor:
    """Standard normals fp64 [C, n, dim] of the classes int64 [C], samples first .. first + n - 1."""
    device = class_ids.device
    block = torch.arange((dim + 3) // 4, device=device)
    sample = torch.arange(first, first + n, device=device)[:, None]
    counter = (block, sample, class_ids[:, None, None], torch.zeros((), dtype=torch.int64, device=device))
    w0, w1, w2, w3 = philox4x32(counter, (seed & _MASK, seed >> 32 & _MASK))
    pairs = torch.stack([*_box_muller(w0, w1), *_box_muller(w2, w3)], dim=-1)
    return pairs.flatten(-2)[..., :dim]


def sample_gaussian(
    mean: Tensor, factor: Factor, n: int, seed: int, class_ids: Tensor, first: int = 0
) -> Tensor:
    """Draws [C, n, D] in the dtype of mean [C, D]; accumulated in fp32 (fp64 for fp64).

    factor: lower triangle [C, D, D] (the upper one is not read), packed by rows [C, D(D+1)/2], standard
    deviations [C, D], or (F [C, D, r], standard deviations [C, D]) for covariance F F^T + diag^2, where F
    takes the normals of dimensions D .. D + r - 1.
    """
    D = mean.shape[1]
    acc = torch.float64 if mean.dtype == torch.float64 else torch.float32
    low_rank, diag = factor if isinstance(factor, tuple) else (None, factor)
    rank = 0 if low_rank is None else low_rank.shape[2]
    z = normals(seed, class_ids.to(mean.device), n, D + rank, first).to(acc)
    center = mean.to(acc)[:, None]
    if low_rank is not None:
        draw = torch.baddbmm(center + diag.to(acc)[:, None] * z[..., :D], z[..., D:], low_rank.to(acc).mT)
    elif diag.dim() == 2 and diag.shape[1] == D:
        draw = center + diag.to(acc)[:, None] * z
    else:
        tril = unpack_tril(diag, D) if diag.dim() == 2 else diag.tril()
        draw = center + triangular_product(tril.to(acc), z)
    return draw.to(mean.dtype)


def triangular_product(tril: Tensor, z: Tensor) -> Tensor:
    """L z per sample: z [C, n, D], tril [C, D, D] or [1, D, D] with zeros above the diagonal.

    In blocks of 64 rows, so that hardly more than the triangle is read: with few samples that is the time.
    """
    dim = tril.shape[1]
    rows = [slice(i, min(i + 64, dim)) for i in range(0, dim, 64)]
    blocks = [(tril[:, r, : r.stop].mT, z[..., : r.stop]) for r in rows]
    return torch.cat([torch.bmm(y, t.expand(y.shape[0], -1, -1)) for t, y in blocks], dim=-1)


def cholesky(cov: Tensor) -> Tensor:
    """Lower factor [D, D] of cov [D, D] in fp64: the ladder of jitters, then eigenvalues clipped at 0.

    Raises ValueError for a matrix that is indefinite beyond rounding.
    """
    step = cov.diagonal().mean() * torch.eye(len(cov), dtype=cov.dtype)
    for jitter in _JITTER:
        tril, info = torch.linalg.cholesky_ex(cov + jitter * step if jitter else cov)
        if int(info) == 0:
            factor: Tensor = tril.contiguous()
            return factor
    values, vectors = _eigh(cov)
    upper = torch.linalg.qr((vectors * values.sqrt()).T).R
    clipped: Tensor = (upper * upper.diagonal().sign()[:, None]).T.contiguous()
    return clipped


def low_rank_factor(cov: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """F [D, min(rank, D)] of the leading eigenpairs and the standard deviations [D] of what they leave."""
    values, vectors = _eigh(cov)
    factor = vectors[:, -rank:] * values[-rank:].sqrt()
    return factor, (cov.diagonal() - factor.square().sum(1)).clamp(min=0).sqrt()


def _eigh(cov: Tensor) -> tuple[Tensor, Tensor]:
    values, vectors = torch.linalg.eigh(cov)
    if float(values[0]) < -_INDEFINITE * float(cov.diagonal().mean().abs()):
        raise ValueError(
            f"covariance is not positive semi-definite, smallest eigenvalue {float(values[0]):.3g}"
        )
    return values.clamp(min=0), vectors


def pack_tril(matrix: Tensor) -> Tensor:
    """Lower triangle of [..., D, D] by rows: [..., D(D+1)/2]."""
    return matrix.flatten(-2).index_select(-1, _tril_positions(matrix.shape[-1]).to(matrix.device))


def unpack_tril(packed: Tensor, dim: int) -> Tensor:
    """[..., D(D+1)/2] to [..., D, D] with zeros above the diagonal."""
    flat = packed.new_zeros(*packed.shape[:-1], dim * dim)
    flat.index_copy_(-1, _tril_positions(dim).to(packed.device), packed)
    return flat.view(*packed.shape[:-1], dim, dim)


@functools.cache
def _tril_positions(dim: int) -> Tensor:
    return torch.ones(dim, dim, dtype=torch.bool).tril().flatten().nonzero().squeeze(1)


def _box_muller(w: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    u = (w.float() * 2.0**-32 + 2.0**-33).double()
    angle = (v.float() * 2.0**-31).double() * math.pi
    radius = (-2.0 * u.log()).sqrt()
    return radius * angle.cos(), radius * angle.sin()
