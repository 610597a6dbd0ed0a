"""Shapes and inputs that benchmarks share: costs are one minus the cosine of random unit vectors."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class TransportCase:
    """P problems of K patches x M tokens; max_iter iterations, all of them where tol = 0."""

    P: int
    K: int
    M: int
    max_iter: int
    tol: float
    eps: float = 0.1

    def __str__(self) -> str:
        return f"{self.P}x{self.K}x{self.M} T={self.max_iter} tol={self.tol:g}"

    def cost(self, dtype: torch.dtype = torch.float32) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        patches, tokens = (
            torch.nn.functional.normalize(torch.randn(self.P, n, 64, generator=generator), dim=-1)
            for n in (self.K, self.M)
        )
        return (1 - patches @ tokens.mT).to(dtype)


# The first is the table's shape cut to a tenth of its problems; 16 x 5 is the method's own.
TRANSPORT = [
    TransportCase(640, 32, 16, 50, 0.0),
    TransportCase(640, 32, 16, 100, 1e-3),
    TransportCase(640, 16, 5, 50, 0.0),
    TransportCase(64, 196, 20, 50, 0.0),
]
