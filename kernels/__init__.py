"""Triton kernels and their launchers: tensors in, tensors out. Imports torch and triton only."""

from ._tiles import TileConfig, fits
from .sinkhorn import sinkhorn_fwd

__all__ = ["TileConfig", "fits", "sinkhorn_fwd"]
