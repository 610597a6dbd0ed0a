"""Patch selection and scores on a GPU: the launchers take what the ops and the reference take."""

from __future__ import annotations

from spa_fast.kernels import spa_scores_bwd, spa_scores_fwd, topk_patches_fwd

__all__ = ["spa_scores_bwd", "spa_scores_fwd", "topk_patches_fwd"]
