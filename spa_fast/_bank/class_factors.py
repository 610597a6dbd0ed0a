"""The factor of a covariance: computed in fp64 and rounded to what is stored."""

from __future__ import annotations

import math

import torch
from torch import Tensor

# Added to the diagonal in turn, times trace/D, until the factorisation succeeds.
_JITTER = (0.0, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2)
# An eigenvalue below minus this times trace/D is no rounding: the matrix is refused.
_INDEFINITE = 1e-1
# Largest change that rounding may make to a row of the factor, relative to the row's norm.
_ROUNDING = 2.0**-8

Parts = tuple[Tensor, ...]


def cholesky(cov: Tensor) -> Tensor:
    """Lower factor [D, D] of cov [D, D] in fp64: the ladder of jitters, then eigenvalues clipped at 0.

    Raises ValueError for a matrix that is indefinite beyond rounding.
    """
    step = cov.diagonal().mean()
    for jitter in _JITTER:
        raised = cov.clone()
        raised.diagonal().add_(jitter * step)
        tril, info = torch.linalg.cholesky_ex(raised)
        if int(info) == 0:
            factor: Tensor = tril
            return factor
    values, vectors = _eigh(cov)
    upper = torch.linalg.qr((vectors * values.sqrt()).T).R
    clipped: Tensor = (upper * torch.where(upper.diagonal() < 0, -1.0, 1.0)[:, None]).T
    return clipped


def low_rank_factor(cov: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """F [D, min(rank, D)] of the leading eigenpairs and the standard deviations [D] of what they leave."""
    values, vectors = _eigh(cov)
    factor = vectors[:, -rank:] * values[-rank:].sqrt()
    return factor, (cov.diagonal() - factor.square().sum(1)).clamp(min=0).sqrt()


def narrow(parts: Parts, dtype: torch.dtype) -> tuple[Parts, float]:
    """fp64 parts, matrices [D, *] and vectors [D], over a power of two and in dtype; and that power.

    It is 1 unless fp16 then loses a row of the factor to overflow or underflow.

    Raises ValueError where dtype does not hold the standard deviations beside each other.
    """
    wanted = _row_norms(parts)
    scales = [1.0]
    largest = max(float(part.abs().max()) for part in parts)
    if dtype == torch.float16 and 0 < largest < math.inf:
        # The largest entry then lies in [2^14, 2^15), fp16's last but one binade.
        scales.append(2.0 ** (math.frexp(largest)[1] - 15))
    for scale in scales:
        stored = tuple((part / scale).to(dtype) for part in parts)
        lost = tuple(kept.double() * scale - part for kept, part in zip(stored, parts, strict=True))
        if bool((_row_norms(lost) <= _ROUNDING * wanted).all()):
            return stored, scale
    raise ValueError(
        f"standard deviations {float(wanted.min()):.3g} to {float(wanted.max()):.3g} do not fit {dtype}"
    )


def _row_norms(parts: Parts) -> Tensor:
    norms = [part.abs() if part.dim() == 1 else torch.linalg.vector_norm(part, dim=1) for part in parts]
    return torch.stack(norms).square().sum(0).sqrt()


def _eigh(cov: Tensor) -> tuple[Tensor, Tensor]:
    values, vectors = torch.linalg.eigh(cov)
    if float(values[0]) < -_INDEFINITE * float(cov.diagonal().mean().abs()):
        raise ValueError(
            f"covariance is not positive semi-definite, smallest eigenvalue {float(values[0]):.3g}"
        )
    return values.clamp(min=0), vectors
