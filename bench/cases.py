"""Shapes and inputs that benchmarks share: costs are one minus the cosine of random unit vectors."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def unit(x: Tensor) -> Tensor:
    return F.normalize(x, dim=-1)


@dataclass(frozen=True)
class TransportCase:
    """P problems of K patches x M tokens; max_iter iterations, all of them where tol = 0."""

    P: int
    K: int
    M: int
    max_iter: int
    tol: float = 0.0
    eps: float = 0.1
    ragged: bool = False
    """1 to M of a problem's tokens take part."""

    def __str__(self) -> str:
        stop = f" tol={self.tol:g}" if self.tol else ""
        return f"{self.P}x{self.K}x{self.M}{' ragged' if self.ragged else ''} T={self.max_iter}{stop}"

    def cost(self, dtype: torch.dtype = torch.float32) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        patches, tokens = (unit(torch.randn(self.P, n, 64, generator=generator)) for n in (self.K, self.M))
        return (1 - patches @ tokens.mT).to(DEVICE, dtype)

    def weights(self) -> tuple[Tensor, Tensor]:
        """a [P, K] and b [P, M]: uniform, zero on the tokens that take no part."""
        lengths = torch.full((self.P,), self.M)
        if self.ragged:
            lengths = torch.randint(1, self.M + 1, (self.P,), generator=torch.Generator().manual_seed(1))
        mask = torch.arange(self.M) < lengths[:, None]
        a = torch.full((self.P, self.K), 1 / self.K)
        return a.to(DEVICE), (mask / lengths[:, None]).to(DEVICE)


# The table's shape first; 16 x 5 is the method's own, 4 x 4 that of hyper-connections.
MAIN = TransportCase(6400, 32, 16, 50)
TRANSPORT = [
    MAIN,
    TransportCase(6400, 32, 16, 100, 1e-3),
    TransportCase(6400, 16, 5, 50),
    TransportCase(640, 196, 20, 50),
    TransportCase(32768, 4, 4, 20),
    TransportCase(6400, 32, 16, 50, ragged=True),
]
