"""What draws read: means and packed factors of all classes, one row a class."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from spa_fast._bank.class_factors import Parts, cholesky, low_rank_factor, narrow
from spa_fast.reference.gaussian import pack_tril, unpack_tril


class Factors(NamedTuple):
    """Rows in ascending order of class ids.

    Attributes:
        mean: fp32 [C, D], divided by scale.
        parts: packed triangles [C, D(D+1)/2], standard deviations [C, D], or F [C, D, r] and standard
            deviations [C, D]; divided by scale. [1, ...] where all classes share them.
        scale: fp32 [C], powers of two.
        scaled: whether a scale is other than 1.
    """

    mean: Tensor
    parts: Parts
    scale: Tensor
    scaled: bool


class FactorStore:
    """Class id to factor.

    Args:
        covariance: "full", "diag", "lowrank" or "shared".
        rank: of "lowrank".
        dtype: of the factors.
        device: of everything held.
    """

    def __init__(self, covariance: str, rank: int, dtype: torch.dtype, device: torch.device) -> None:
        self.covariance = covariance
        self.rank = rank
        self.dtype = dtype
        self.device = device
        self.rows: dict[int, int] = {}
        self.held: Factors | None = None

    def update(
        self, means: Mapping[int, Tensor], covariance: Callable[[int], Tensor], changed: Collection[int]
    ) -> Factors:
        """Bring the rows of `means` up to date, where they are new or changed, one class at a time.

        Raises ValueError, naming the class, for a factor that does not exist or does not fit its dtype.
        """
        ids = sorted(means)
        fresh = set(changed) | (set(ids) - set(self.rows))
        factors = self._with_room(ids, len(means[ids[0]]), fresh)
        shared = self.covariance == "shared"
        scale = 1.0
        for row, c in enumerate(ids):
            if c not in fresh:
                continue
            try:
                if not (shared and row):
                    parts, scale = narrow(self._factorise(covariance(c)), self.dtype)
                    for all_rows, part in zip(factors.parts, parts, strict=True):
                        all_rows[row] = self._packed(part)
                factors.mean[row] = self._mean(means[c], scale)
            except ValueError as error:
                raise ValueError(f"class {c}: {error}") from error
            factors.scale[row] = scale
        self.rows = {c: row for row, c in enumerate(ids)}
        self.held = factors._replace(scaled=bool((factors.scale != 1).any()))
        return self.held

    def covariance_of(self, c: int) -> Tensor:
        """Covariance [D, D] of what is held for class c, fp64; of "full" and "lowrank"."""
        assert self.held is not None
        row, dim = self.rows[c], self.held.mean.shape[1]
        factor, *diag = (part[row].cpu().double() for part in self.held.parts)
        factor = unpack_tril(factor, dim) if self.covariance == "full" else factor
        cov = factor @ factor.T
        if diag:
            cov.diagonal().add_(diag[0].square())
        return cov * float(self.held.scale[row]) ** 2

    def state(self, classes: Collection[int]) -> dict[str, Tensor]:
        """Rows of `classes`, ascending, for `load`."""
        assert self.held is not None
        rows = [self.rows[c] for c in sorted(classes)]
        parts = {f"factor_{i}": part[rows].cpu() for i, part in enumerate(self.held.parts)}
        return {"factor_scale": self.held.scale[rows].cpu(), **parts}

    def load(self, state: Mapping[str, Tensor], means: Mapping[int, Tensor]) -> None:
        """Hold what `state` gave for the classes of `means`.

        Raises ValueError for anything else.
        """
        ids = sorted(means)
        factors = self._with_room(ids, len(means[ids[0]]), set(ids))
        names = ["factor_scale", *(f"factor_{i}" for i in range(len(factors.parts)))]
        if sorted(state) != sorted(names):
            raise ValueError(f"state: expected the keys {names}, got {sorted(state)}")
        for name, held in zip(names, (factors.scale, *factors.parts), strict=True):
            x = state[name]
            if x.shape != held.shape or x.dtype != held.dtype or not bool(x.isfinite().all()):
                raise ValueError(
                    f"state: {name} does not fit, expected finite {held.dtype} {list(held.shape)}, "
                    f"got {x.dtype} {list(x.shape)}"
                )
            held.copy_(x)
        if bool((factors.scale <= 0).any()):
            raise ValueError("state: factor_scale: expected > 0")
        for row, c in enumerate(ids):
            factors.mean[row] = self._mean(means[c], float(factors.scale[row]))
        self.rows = {c: row for row, c in enumerate(ids)}
        self.held = factors._replace(scaled=bool((factors.scale != 1).any()))

    def _with_room(self, ids: list[int], dim: int, fresh: set[int]) -> Factors:
        """The tensors held, or where the classes are others, such with the rows that stay."""
        if self.held is not None and ids == list(self.rows):
            return self.held
        C = len(ids)
        widths: dict[str, tuple[tuple[int, ...], ...]] = {
            "full": ((C, dim * (dim + 1) // 2),),
            "shared": ((1, dim * (dim + 1) // 2),),
            "diag": ((C, dim),),
            "lowrank": ((C, dim, min(self.rank, dim)), (C, dim)),
        }
        parts = tuple(
            torch.empty(shape, dtype=self.dtype, device=self.device) for shape in widths[self.covariance]
        )
        mean, scale = torch.empty(C, dim, device=self.device), torch.ones(C, device=self.device)
        if self.held is not None and self.covariance != "shared":
            old = (self.held.mean, self.held.scale, *self.held.parts)
            for row, c in enumerate(ids):
                if c not in fresh:
                    for new, kept in zip((mean, scale, *parts), old, strict=True):
                        new[row] = kept[self.rows[c]]
        return Factors(mean, parts, scale, False)

    def _factorise(self, cov: Tensor) -> Parts:
        if self.covariance == "diag":
            return (cov.sqrt(),)
        if self.covariance == "lowrank":
            return low_rank_factor(cov, self.rank)
        return (cholesky(cov),)

    def _packed(self, part: Tensor) -> Tensor:
        return pack_tril(part) if self.covariance in ("full", "shared") else part

    def _mean(self, mean: Tensor, scale: float) -> Tensor:
        row = (mean / scale).float()
        if not bool(row.isfinite().all()):
            raise ValueError(f"mean up to {float(mean.abs().max()):.3g} does not fit torch.float32")
        return row
