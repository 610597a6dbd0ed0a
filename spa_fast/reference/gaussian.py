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

# Rows of a packed triangle that are unpacked at a time.
_TILE = 64

Factor = Tensor | tuple[Tensor, Tensor]
# An integer, or int64 [1] that stays on its device; both count modulo 2^64.
Seed = int | Tensor


def philox4x32(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int | Tensor, int | Tensor]
) -> tuple[Tensor, ...]:
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


def normals(seed: Seed, class_ids: Tensor, n: int, dim: int, first: int = 0) -> Tensor:
    """Standard normals fp64 [C, n, dim] of the classes int64 [C], samples first .. first + n - 1."""
    device = class_ids.device
    block = torch.arange((dim + 3) // 4, device=device)
    sample = torch.arange(first, first + n, device=device)[:, None]
    counter = (block, sample, class_ids[:, None, None], torch.zeros((), dtype=torch.int64, device=device))
    w0, w1, w2, w3 = philox4x32(counter, (seed & _MASK, seed >> 32 & _MASK))
    pairs = torch.stack([*_box_muller(w0, w1), *_box_muller(w2, w3)], dim=-1)
    return pairs.flatten(-2)[..., :dim]


def sample_gaussian(
    mean: Tensor, factor: Factor, n: int, seed: Seed, class_ids: Tensor, first: int = 0
) -> Tensor:
    """Draws [C, n, D] in the dtype of mean [C, D]; accumulated in fp32 (fp64 for fp64).

    factor: lower triangle packed by rows [C, D(D+1)/2], standard deviations [C, D], or (F [C, D, r], standard
    deviations [C, D]) for covariance F F^T + diag^2, where F takes the normals of dimensions D .. D + r - 1.
    One factor [1, ...] serves all classes.
    """
    D = mean.shape[1]
    acc = torch.float64 if mean.dtype == torch.float64 else torch.float32
    low_rank, diag = factor if isinstance(factor, tuple) else (None, factor)
    rank = 0 if low_rank is None else low_rank.shape[2]
    z = normals(seed, class_ids.to(mean.device), n, D + rank, first).to(acc)
    draw = diag.to(acc)[:, None] * z[..., :D] if diag.shape[1] == D else triangular_product(diag, z)
    if low_rank is not None:
        draw = draw + z[..., D:] @ low_rank.to(acc).mT
    return (mean.to(acc)[:, None] + draw).to(mean.dtype)


def triangular_product(packed: Tensor, z: Tensor) -> Tensor:
    """L z per sample: z [C, n, D], L packed by rows [C or 1, D(D+1)/2]; no square L is made."""
    dim, blocks = z.shape[2], []
    for start in range(0, dim, _TILE):
        stop = min(start + _TILE, dim)
        row = torch.arange(start, stop, device=z.device)[:, None]
        positions = row * (row + 1) // 2 + torch.arange(stop, device=z.device)
        # Right of the diagonal the positions run into later rows, which tril removes.
        tile = packed[:, positions].tril(start).to(z.dtype)
        blocks.append(z[..., :stop] @ tile.mT)
    return torch.cat(blocks, dim=-1)


def pack_tril(matrix: Tensor) -> Tensor:
    """Lower triangle of [..., D, D] with any strides by rows: [..., D(D+1)/2]; the rest is not read."""
    rows, columns = tril_positions(matrix.shape[-1])
    return matrix[..., rows.to(matrix.device), columns.to(matrix.device)]


def unpack_tril(packed: Tensor, dim: int) -> Tensor:
    """[..., D(D+1)/2] to [..., D, D] with zeros above the diagonal."""
    rows, columns = tril_positions(dim)
    tril = packed.new_zeros(*packed.shape[:-1], dim, dim)
    tril[..., rows.to(packed.device), columns.to(packed.device)] = packed
    return tril


@functools.cache
def tril_positions(dim: int) -> tuple[Tensor, Tensor]:
    """Row and column of every entry of a packed triangle."""
    rows, columns = torch.tril_indices(dim, dim)
    return rows, columns


def _box_muller(w: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    u = (w.float() * 2.0**-32 + 2.0**-33).double()
    angle = (v.float() * 2.0**-31).double() * math.pi
    radius = (-2.0 * u.log()).sqrt()
    return radius * angle.cos(), radius * angle.sin()
