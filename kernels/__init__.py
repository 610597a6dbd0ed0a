"""Triton kernels and their launchers: tensors in, tensors out. Imports torch and triton only."""

from ._tiles import TileConfig, fits  # noqa: TID251
from .sinkhorn import sinkhorn_fwd  # noqa: TID251

__all__ = ["TileConfig", "fits", "sinkhorn_fwd"]
