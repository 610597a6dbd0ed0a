"""Moments of all classes of a bank, what is pooled over them, and their state."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from spa_fast._bank.class_moments import Moments, Shrink, diagonal_of, join, shrunk
from spa_fast._checks import check_class_ids

KEYS = ("class_ids", "count", "mean", "scatter")
FROZEN = ("frozen", "released")


class MomentStore:
    """Class id to moments.

    Args:
        covariance: "full", "diag", "lowrank" or "shared", which holds one scatter for all classes.
        shrink: estimator of the covariances.
    """

    def __init__(self, covariance: str, shrink: Shrink) -> None:
        self.diagonal = covariance == "diag"
        self.shared = covariance == "shared"
        self.shrink = shrink
        self.stats: dict[int, Moments] = {}
        # Scatter of all classes, where they share it.
        self.common = torch.zeros((), dtype=torch.float64)
        # Classes without a scatter, and the sum of the diagonals of what they had.
        self.frozen: set[int] = set()
        self.released = torch.zeros((), dtype=torch.float64)

    @property
    def fourth(self) -> bool:
        return self.shrink == "ledoit_wolf"

    def add(self, c: int, m: Moments) -> None:
        """Join m to what is known of class c."""
        if c in self.stats:
            m = join(self.stats[c], m, diagonal=self.diagonal)
        if self.shared:
            self.common = self.common + m.scatter
            m = replace(m, scatter=m.scatter.new_zeros(()))
        self.stats[c] = m

    def check_live(self, classes: Collection[int]) -> None:
        gone = self.frozen.intersection(classes)
        if gone:
            raise ValueError(f"class {names(gone)}: frozen, its scatter has been released")

    def check_width(self, dim: int) -> None:
        for m in self.stats.values():
            if len(m.mean) != dim:
                raise ValueError(f"features: expected width {len(m.mean)} as before, got {dim}")
            return

    def singles(self) -> set[int]:
        """Classes of one image, whose covariance follows all others."""
        if self.shared:
            return set()
        return {c for c, m in self.stats.items() if m.count == 1} - self.frozen

    def release(self) -> None:
        """Forget the scatters that only serve their own class."""
        if self.diagonal or self.shared:
            return
        for c in self._live():
            m = self.stats[c]
            self.released = self.released + diagonal_of(m.scatter, len(m.mean))
            self.stats[c] = replace(m, scatter=m.scatter.new_zeros(()), fourth=None)
            self.frozen.add(c)

    def covariance(self, c: int) -> Tensor:
        """Covariance [D, D] of class c, or variances [D] where only they are held; without a ridge."""
        m = self.stats[c]
        D, count, freedom, scatter = len(m.mean), m.count, m.count - 1, m.scatter
        if self.diagonal or (count == 1 and not self.shared):
            variances = scatter / freedom if freedom else self._pooled_variances(D)
            if self.shrink == "average":
                variances = variances + variances.mean()
            return variances if self.diagonal else variances.diag()
        if self.shared:
            count = sum(other.count for other in self.stats.values())
            freedom, scatter = self._freedom(), self.common
        quartic = 0.0 if m.fourth is None else float(m.fourth[-1])
        return shrunk(scatter, count, freedom, D, self.shrink, quartic)

    def _freedom(self) -> int:
        return max(sum(m.count - 1 for m in self.stats.values()), 1)

    def _pooled_variances(self, dim: int) -> Tensor:
        total = self.released
        for c in self._live():
            total = total + diagonal_of(self.stats[c].scatter, dim)
        return total / self._freedom()

    def state(self) -> dict[str, Tensor]:
        """What `load` reads, see GaussianBank.state_dict."""
        ids = sorted(self.stats)
        stats, live = [self.stats[c] for c in ids], [self.stats[c] for c in self._live()]
        D = len(stats[0].mean) if stats else 0
        scatter = [self.common] if self.shared and stats else [m.scatter for m in live]
        state = {
            "class_ids": torch.tensor(ids, dtype=torch.int64),
            "count": torch.tensor([m.count for m in stats], dtype=torch.int64),
            "mean": _rows([m.mean for m in stats], D),
            "scatter": _rows(scatter, self._width(D)),
        }
        if self.fourth:
            state["fourth"] = _rows([m.fourth for m in live if m.fourth is not None], D + 1)
        if self.frozen:
            state |= {"frozen": torch.tensor(sorted(self.frozen)), "released": self.released.clone()}
        return state

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Fill an empty store with what `state` gave.

        Raises ValueError for anything else.
        """
        keys = {*KEYS, *(["fourth"] if self.fourth else []), *(FROZEN if "frozen" in state else [])}
        if set(state) != keys:
            raise ValueError(f"state: expected the keys {sorted(keys)}, got {sorted(state)}")
        state = {name: x.detach().cpu() for name, x in state.items()}
        C, D = state["mean"].shape if state["mean"].dim() == 2 else (-1, -1)
        F = state["frozen"].numel() if "frozen" in state else 0
        shapes = {
            "class_ids": (C,),
            "count": (C,),
            "mean": (C, D),
            "scatter": (min(C, 1) if self.shared else C - F, self._width(D)),
            "fourth": (C - F, D + 1),
            "frozen": (F,),
            "released": (D,),
        }
        for name, x in state.items():
            dtype = torch.int64 if name in ("class_ids", "count", "frozen") else torch.float64
            if x.dtype != dtype or x.shape != shapes[name]:
                raise ValueError(
                    f"state: {name} does not fit, expected {dtype} {list(shapes[name])}, "
                    f"got {x.dtype} {list(x.shape)}"
                )
            if not bool(x.isfinite().all()):
                raise ValueError(f"state: expected finite moments, got NaN or Inf in {name}")
        ids, count = state["class_ids"], state["count"]
        check_class_ids(ids)
        if bool((ids.diff() <= 0).any()) or bool((count < 1).any()):
            raise ValueError("state: expected ascending class_ids and counts >= 1")
        frozen = state["frozen"].tolist() if F else []
        if sorted(set(frozen) & set(ids.tolist())) != frozen or (frozen and (self.shared or self.diagonal)):
            raise ValueError("state: frozen: expected ascending ids of class_ids, with 'full' or 'lowrank'")
        if F:
            self.frozen, self.released = set(frozen), state["released"].clone()
        if self.shared:
            self.common = state["scatter"].sum(0)
        rows = {c: row for row, c in enumerate(c for c in ids.tolist() if c not in self.frozen)}
        for c, n, mean in zip(ids.tolist(), count.tolist(), state["mean"], strict=True):
            released = self.shared or c in self.frozen
            scatter = mean.new_zeros(()) if released else state["scatter"][rows[c]].clone()
            fourth = state["fourth"][rows[c]].clone() if self.fourth and c in rows else None
            self.stats[c] = Moments(n, mean.clone(), scatter, fourth)

    def _live(self) -> list[int]:
        return sorted(set(self.stats) - self.frozen)

    def _width(self, dim: int) -> int:
        return dim if self.diagonal else dim * (dim + 1) // 2


def names(ids: Collection[int]) -> str:
    return ", ".join(str(c) for c in sorted(set(ids)))


def _rows(rows: list[Tensor], width: int) -> Tensor:
    return torch.stack(rows) if rows else torch.zeros(0, width, dtype=torch.float64)
