"""Triton kernels and their launchers: tensors in, tensors out. Imports torch and triton only."""

from ._tiles import BlockConfig, TileConfig
from .sinkhorn import sinkhorn_fwd
from .sinkhorn_grad import sinkhorn_bwd

__all__ = ["BlockConfig", "TileConfig", "sinkhorn_bwd", "sinkhorn_fwd"]
