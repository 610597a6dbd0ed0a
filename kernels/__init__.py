"""Triton kernels and their launchers: tensors in, tensors out. Imports torch and triton only."""

from ._tiles import BlockConfig, PatchConfig, TileConfig
from .patches import topk_patches_fwd
from .patches_grad import spa_scores_bwd
from .patches_score import spa_scores_fwd
from .sinkhorn import sinkhorn_fwd
from .sinkhorn_grad import sinkhorn_bwd

__all__ = [
    "BlockConfig",
    "PatchConfig",
    "TileConfig",
    "sinkhorn_bwd",
    "sinkhorn_fwd",
    "spa_scores_bwd",
    "spa_scores_fwd",
    "topk_patches_fwd",
]
