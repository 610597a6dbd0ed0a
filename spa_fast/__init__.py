"""Patch-level optimal transport for CLIP-based class-incremental learning."""

from pathlib import Path

# In a checkout the kernels lie beside this package; in a wheel they are its sub-package.
if not (Path(__file__).parent / "kernels").is_dir():
    __path__.append(str(Path(__file__).parent.parent))

from spa_fast.align import PatchAligner, SinkhornAlign
from spa_fast.bank import GaussianBank
from spa_fast.gaussian import sample_gaussian
from spa_fast.patches import PatchScores, spa_scores, topk_patches
from spa_fast.transport import SinkhornOutput, sinkhorn, sinkhorn_align

__version__ = "0.1.0"

__all__ = [
    "GaussianBank",
    "PatchAligner",
    "PatchScores",
    "SinkhornAlign",
    "SinkhornOutput",
    "__version__",
    "sample_gaussian",
    "sinkhorn",
    "sinkhorn_align",
    "spa_scores",
    "topk_patches",
]
