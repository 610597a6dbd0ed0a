"""Class-wise Gaussians that stand in for the images of old classes: fit, merge, store, draw."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from spa_fast._checks import check_choice, check_float, check_shape
from spa_fast.reference import gaussian as reference
from spa_fast.reference.gaussian import Factor, pack_tril, unpack_tril

__all__ = ["Covariance", "GaussianBank", "sample_gaussian"]

Covariance = Literal["full", "diag", "lowrank", "shared"]

_STATE = ("class_ids", "count", "mean", "scatter")


def sample_gaussian(
    mean: Tensor,
    factor: Factor,
    n: int,
    *,
    seed: int | None = None,
    class_ids: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw mean_c + L_c z, n times for every class.

    The normal z of (seed, class id, sample index, dimension) is fixed (Philox4x32-10, Box and Muller): a
    draw depends neither on the classes drawn with it nor on the device, and the first samples of a larger n
    are those of a smaller.

    Args:
        mean: [C, D], fp16, bf16, fp32 or fp64.
        factor: lower triangle [C, D, D] (the rest is not read), the same packed by rows [C, D(D+1)/2],
            standard deviations [C, D], or (F [C, D, r], standard deviations [C, D]): F F^T + diag^2.
        n: samples per class, >= 0.
        seed: 0 <= seed < 2^64; None draws one from `generator`, which advances.
        class_ids: int64 [C], 0 <= id < 2^32; default 0..C-1.
        generator: None is torch's default generator.

    Returns:
        [C, n, D] in mean's dtype, accumulated in fp32 (fp64 for fp64).

    Raises:
        ValueError: shapes that do not fit, n < 0, seed or class id out of range.
        TypeError: a dtype outside the list.
    """
    check_float("mean", mean)
    check_shape("mean", mean, "[C, D]", (None, None))
    C, D = mean.shape
    _check_factor(factor, C, D)
    _check_samples(n)
    ids = torch.arange(C) if class_ids is None else class_ids
    if ids.dtype != torch.int64:
        raise TypeError(f"class_ids: expected int64, got {ids.dtype}")
    check_shape("class_ids", ids, f"[{C}]", (C,))
    _check_ids(ids)
    if seed is None:
        seed = _draw_seed(generator)
    elif not 0 <= seed < 1 << 64:
        raise ValueError(f"seed: expected 0 <= seed < 2^64, got {seed}")
    return reference.sample_gaussian(mean, factor, n, seed, ids)


class GaussianBank:
    """Mean and covariance per class, gathered from a stream, and draws from them.

    Sigma_c = S_c / (n_c - 1) [+ a I + o (11^T - I) with shrink] + ridge I,   S_c = sum (x - mean)(x - mean)^T

    with a, o the means of the diagonal and of the other entries. Batches are joined by the update of Chan,
    Golub and LeVeque (1979) in fp64, so any split or order of the data gives the same moments up to rounding.

    Args:
        covariance: "full"; "diag"; "lowrank": the `rank` leading eigenpairs and the diagonal of the rest;
            "shared": one pooled within-class covariance for all.
        ridge: > 0, added to every variance, in squared units of the features.
        shrink: add the average variance and covariance, see above.
        rank: of "lowrank".
        device: where draws are made; moments stay on the CPU.

    Notes:
        A class of one image takes the diagonal of the pooled covariance, with one warning that names it. The
        factor of a class is computed in fp64 at the first draw after a change and kept in fp32.
        Memory of "full": 4 D (D + 1) bytes a class for the exact moments (105 MB for 100 classes of 512) and,
        once drawn from, 4 D^2 for the square factors (105 MB), which a batched product reads in place.
        A draw equals `sample_gaussian` with the labels as class ids.
    """

    def __init__(
        self,
        *,
        covariance: Covariance = "full",
        ridge: float = 1e-4,
        shrink: bool = False,
        rank: int = 32,
        device: str | torch.device = "cpu",
    ) -> None:
        check_choice("covariance", covariance, get_args(Covariance))
        if not (ridge > 0 and math.isfinite(ridge)):
            raise ValueError(f"ridge: expected a finite number > 0, got {ridge}")
        if rank < 1:
            raise ValueError(f"rank: expected >= 1, got {rank}")
        self.covariance = covariance
        self.ridge = ridge
        self.shrink = shrink
        self.rank = rank
        self.device = torch.device(device)
        self._common: Tensor
        self._clear()

    @classmethod
    def from_moments(
        cls,
        mean: Tensor,
        cov: Tensor,
        *,
        class_ids: Sequence[int] | None = None,
        count: Sequence[int] | None = None,
        **settings: Any,
    ) -> GaussianBank:
        """A bank of ready moments: mean [C, D] and cov [C, D, D]; "diag" also takes variances [C, D].

        `count` (default 2 a class, the fewest that carry a covariance) only weighs later data against these;
        `settings` are the constructor's. Raises ValueError, naming the class, for a matrix that is not
        finite, not symmetric or not positive semi-definite beyond rounding.
        """
        bank = cls(**settings)
        check_shape("mean", mean, "[C, D]", (None, None))
        C, D = mean.shape
        if not (bank.covariance == "diag" and cov.shape == (C, D)):
            check_shape("cov", cov, f"[{C}, {D}, {D}]", (C, D, D))
        ids = list(range(C)) if class_ids is None else [int(c) for c in class_ids]
        counts = [2] * C if count is None else [int(n) for n in count]
        _check_ids(torch.tensor(ids))
        if len(ids) != C or len(set(ids)) != C:
            raise ValueError(f"class_ids: expected {C} distinct ids, got {ids}")
        if len(counts) != C or any(n < 2 for n in counts):
            raise ValueError(f"count: expected {C} numbers >= 2, got {counts}")
        mean, cov = mean.detach().to("cpu", torch.float64), cov.detach().to("cpu", torch.float64)
        for c, n, center, spread in zip(ids, counts, mean, cov, strict=True):
            _check_moments(c, center, spread)
            if bank.covariance == "diag":
                row = spread if spread.dim() == 1 else spread.diagonal()
            else:
                row = pack_tril((spread + spread.T) / 2)
            bank._add(c, n, center, row * (n - 1))
        if len(bank):
            bank._factors()
        return bank

    def __len__(self) -> int:
        return len(self._stats)

    @property
    def class_ids(self) -> list[int]:
        """Classes held, ascending: the order of `sample`."""
        return sorted(self._stats)

    def fit(self, features: Tensor, labels: Tensor) -> None:
        """Add features [n, D] with class labels int [n] to the moments; may be called any number of times.

        Raises ValueError for no rows, a width other than the bank's, a label outside [0, 2^32), or a feature
        that is not finite (naming the classes); the bank is then unchanged.
        """
        check_float("features", features)
        check_shape("features", features, "[n, D]", (None, None))
        if features.shape[0] == 0:
            raise ValueError("features: expected at least one row, got none")
        self._check_width(features.shape[1])
        if labels.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"labels: expected int64 or int32, got {labels.dtype}")
        check_shape("labels", labels, f"[{features.shape[0]}]", (features.shape[0],))
        features, labels = features.detach().cpu(), labels.cpu()
        _check_ids(labels)
        bad = ~features.isfinite().all(1)
        if bool(bad.any()):
            raise ValueError(f"features: not finite for class {_names(labels[bad].tolist())}")
        for c in sorted(set(labels.tolist())):
            x = features[labels == c].double()
            mean = x.mean(0)
            x = x - mean
            self._add(c, len(x), mean, x.square().sum(0) if self.covariance == "diag" else pack_tril(x.T @ x))

    def merge(self, other: GaussianBank) -> None:
        """Add the data behind another bank of the same covariance kind."""
        if other.covariance != self.covariance:
            raise ValueError(f"other: expected covariance {self.covariance!r}, got {other.covariance!r}")
        for c, (count, mean, scatter) in other._stats.items():
            self._check_width(len(mean))
            self._add(c, count, mean, scatter)
        self._common = self._common + other._common

    def mean(self, classes: Sequence[int] | None = None) -> Tensor:
        """Class means [C, D], fp64."""
        return torch.stack([self._stats[c][1] for c in self._known(classes)])

    def moments(self, classes: Sequence[int] | None = None) -> tuple[Tensor, Tensor]:
        """Mean [C, D] and the covariance drawn from [C, D, D], ridge and shrinkage included, fp64.

        "diag" gives diagonal matrices; "lowrank" the covariance before its rank is cut.
        """
        ids = self._known(classes)
        mean = self.mean(ids)
        cov = torch.stack([self._covariance(c) for c in ids])
        return mean, torch.diag_embed(cov) if self.covariance == "diag" else cov

    def sample(
        self,
        n: int,
        classes: Sequence[int] | None = None,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Draw n features of each class: fp32 [C*n, D] and labels int64 [C*n], class by class.

        Args:
            n: >= 0.
            classes: class ids, default all, ascending. A class's draws do not depend on the others.
            generator: one 64-bit seed is drawn from it; None is torch's default generator.
        """
        _check_samples(n)
        ids = self._known(classes)
        mean, *factor = self._factors()
        rows = [self._rows[c] for c in ids]
        first = rows[0] if rows else 0
        # A slice reads the factors in place; a list copies those it names.
        consecutive = rows == list(range(first, first + len(rows)))
        index: slice | list[int] = slice(first, first + len(rows)) if consecutive else rows
        labels = torch.tensor(ids, dtype=torch.int64, device=self.device)
        seed = _draw_seed(generator)
        mean = mean[index]
        if self.covariance in ("full", "shared"):
            z = reference.normals(seed, labels, n, mean.shape[1]).float()
            tril = factor[0] if self.covariance == "shared" else factor[0][index]
            draw = mean[:, None] + reference.triangular_product(tril, z)
        elif self.covariance == "diag":
            draw = reference.sample_gaussian(mean, factor[0][index], n, seed, labels)
        else:
            draw = reference.sample_gaussian(mean, (factor[0][index], factor[1][index]), n, seed, labels)
        return draw.flatten(0, 1), labels.repeat_interleave(n)

    def state_dict(self) -> dict[str, Tensor]:
        """The exact moments: class_ids, count, mean, scatter (lower triangles by rows, fp64)."""
        if not self._stats:
            empty = torch.zeros(0, 0, dtype=torch.float64)
            return dict(
                zip(_STATE, (torch.zeros(0).long(), torch.zeros(0).long(), empty, empty), strict=True)
            )
        ids = self.class_ids
        count, mean, scatter = zip(*(self._stats[c] for c in ids), strict=True)
        pooled = self._common[None].clone() if self.covariance == "shared" else torch.stack(scatter)
        values = (torch.tensor(ids), torch.tensor(count), torch.stack(mean), pooled)
        return dict(zip(_STATE, values, strict=True))

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Replace the moments by those of `state_dict` of a bank with the same settings."""
        if set(state) != set(_STATE):
            raise ValueError(f"state: expected the keys {list(_STATE)}, got {sorted(state)}")
        ids, count, mean, scatter = (state[name].detach().cpu() for name in _STATE)
        C, D = mean.shape if mean.dim() == 2 else (-1, -1)
        rows = min(C, 1) if self.covariance == "shared" else C
        fits = ids.shape == count.shape == (C,) and scatter.shape == (rows, self._packed(D))
        types = (ids.dtype, count.dtype, mean.dtype, scatter.dtype)
        if not fits or types != (torch.int64, torch.int64, torch.float64, torch.float64):
            got = ", ".join(f"{name} {list(state[name].shape)} {state[name].dtype}" for name in _STATE)
            raise ValueError(f"state: does not fit covariance {self.covariance!r}: {got}")
        if not bool(mean.isfinite().all() & scatter.isfinite().all() & (count >= 1).all()):
            raise ValueError("state: expected finite moments and counts >= 1")
        if bool((ids.diff() <= 0).any()):
            raise ValueError("state: expected ascending class_ids")
        _check_ids(ids)
        self._clear()
        if self.covariance == "shared":
            self._common = scatter.sum(0)
            scatter = scatter.new_zeros(C, 0)
        for c, n, center, row in zip(ids.tolist(), count.tolist(), mean, scatter, strict=True):
            self._stats[c] = (n, center.clone(), row.clone())
            self._stale.add(c)

    def save(self, path: str | Path) -> None:
        """Write moments and settings to a safetensors file, by rename."""
        from safetensors.torch import save_file

        path = Path(path)
        settings = {name: repr(getattr(self, name)) for name in ("ridge", "shrink", "rank")}
        temporary = path.with_name(path.name + ".tmp")
        save_file(self.state_dict(), temporary, metadata={"covariance": self.covariance, **settings})
        os.replace(temporary, path)

    @classmethod
    def load(cls, path: str | Path, device: str | torch.device = "cpu") -> GaussianBank:
        """Read what `save` wrote; ValueError naming the file for anything else."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, "pt") as file:
                text = file.metadata() or {}
                state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            bank = cls(
                covariance=text["covariance"],
                ridge=float(text["ridge"]),
                shrink={"True": True, "False": False}[text["shrink"]],
                rank=int(text["rank"]),
                device=device,
            )
            bank.load_state_dict(state)
        except (SafetensorError, KeyError, ValueError) as error:
            raise ValueError(f"{path}: not a Gaussian bank: {error}") from error
        return bank

    def _clear(self) -> None:
        # Per class: images seen, mean [D], scatter (empty where it is common to all classes).
        self._stats: dict[int, tuple[int, Tensor, Tensor]] = {}
        self._common = torch.zeros((), dtype=torch.float64)
        self._warned: set[int] = set()
        self._stale: set[int] = set()
        self._rows: dict[int, int] = {}
        self._cache: tuple[Tensor, ...] = ()

    def _packed(self, dim: int) -> int:
        return dim if self.covariance == "diag" else dim * (dim + 1) // 2

    def _add(self, c: int, count: int, mean: Tensor, scatter: Tensor) -> None:
        """Join `count` more images of class c with their own mean and scatter."""
        before, center, old = self._stats.get(c, (0, mean, mean.new_zeros(())))
        total = before + count
        delta = mean - center
        if before:
            between = delta.square() if self.covariance == "diag" else pack_tril(delta.outer(delta))
            scatter = (scatter if scatter.numel() else 0) + between * (before * count / total)
        if self.covariance == "shared":
            self._common = self._common + (scatter if scatter.numel() else 0)
            scatter = mean.new_zeros(0)
        elif before:
            scatter = scatter + old
        self._stats[c] = (total, center + delta * (count / total), scatter)
        self._stale.add(c)

    def _check_width(self, dim: int) -> None:
        for _, mean, _ in self._stats.values():
            if len(mean) != dim:
                raise ValueError(f"features: expected width {len(mean)} as before, got {dim}")
            return

    def _known(self, classes: Sequence[int] | None) -> list[int]:
        if not self._stats:
            raise ValueError("the bank is empty: call fit first")
        if classes is None:
            return self.class_ids
        ids = [int(c) for c in classes]
        unknown = [c for c in ids if c not in self._stats]
        if unknown:
            raise ValueError(f"classes: the bank holds no class {_names(unknown)}")
        return ids

    def _pooled(self) -> Tensor:
        """Pooled within-class covariance, packed (variances with "diag")."""
        freedom = max(sum(count - 1 for count, _, _ in self._stats.values()), 1)
        total = self._common
        if self.covariance != "shared":
            for _, _, scatter in self._stats.values():
                total = total + scatter
        return total / freedom

    def _covariance(self, c: int) -> Tensor:
        """Covariance [D, D] of class c, or variances [D] with "diag"."""
        count, mean, scatter = self._stats[c]
        single = count == 1 and self.covariance != "shared"
        cov = self._pooled() if single or self.covariance == "shared" else scatter / (count - 1)
        if self.covariance == "diag":
            return cov + (cov.mean() if self.shrink else 0.0) + self.ridge
        tril = unpack_tril(cov, len(mean))
        cov = tril.diagonal().diag() if single else tril + tril.tril(-1).T
        eye = torch.eye(len(mean), dtype=torch.float64)
        if self.shrink:
            average = cov.diagonal().mean()
            other = (cov.sum() - cov.diagonal().sum()) / max(cov.numel() - len(mean), 1)
            cov = cov + average * eye + other * (1 - eye)
        return cov + self.ridge * eye

    def _factors(self) -> tuple[Tensor, ...]:
        """Mean [C, D] and factor, fp32 on the device, in the order of `class_ids`; brought up to date."""
        if not self._stale:
            return self._cache
        ids, shared = self.class_ids, self.covariance == "shared"
        single = [] if shared else [c for c in ids if self._stats[c][0] == 1]
        if set(single) - self._warned:
            self._warned.update(single)
            warnings.warn(
                f"class {_names(single)}: one image only, drawn with the pooled diagonal covariance",
                stacklevel=3,
            )
        # What is pooled changes with every class.
        fresh = set(ids) if shared else self._stale.union(single)
        rows: list[tuple[Tensor, ...]] = []
        for c in ids[:1] if shared else ids:
            if c in fresh:
                rows.append(tuple(part.float().to(self.device) for part in self._factorise(c)))
            else:
                rows.append(tuple(part[self._rows[c]] for part in self._cache[1:]))
        mean = torch.stack([self._stats[c][1] for c in ids]).float().to(self.device)
        self._cache = (mean, *(torch.stack(part) for part in zip(*rows, strict=True)))
        self._rows = {c: row for row, c in enumerate(ids)}
        self._stale = set()
        return self._cache

    def _factorise(self, c: int) -> tuple[Tensor, ...]:
        cov = self._covariance(c)
        try:
            if self.covariance == "diag":
                return (cov.sqrt(),)
            if self.covariance == "lowrank":
                return reference.low_rank_factor(cov, self.rank)
            return (reference.cholesky(cov),)
        except ValueError as error:
            raise ValueError(f"class {c}: {error}") from error


def _draw_seed(generator: torch.Generator | None) -> int:
    device = "cpu" if generator is None else generator.device
    return int(torch.randint((1 << 63) - 1, (), generator=generator, device=device))


def _names(ids: Sequence[int]) -> str:
    return ", ".join(str(c) for c in sorted(set(ids)))


def _check_samples(n: int) -> None:
    if n < 0:
        raise ValueError(f"n: expected >= 0 samples per class, got {n}")


def _check_ids(ids: Tensor) -> None:
    if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < 1 << 32:
        raise ValueError(f"class ids: expected 0 <= id < 2^32, got {int(ids.min())} to {int(ids.max())}")


def _check_moments(c: int, mean: Tensor, cov: Tensor) -> None:
    if not bool(mean.isfinite().all() & cov.isfinite().all()):
        raise ValueError(f"class {c}: expected a finite mean and covariance")
    if cov.dim() == 1:
        if bool((cov < 0).any()):
            raise ValueError(f"class {c}: expected variances >= 0, got {float(cov.min()):.3g}")
        return
    # Rounding of a covariance computed in half precision stays below 1e-3 of its largest entry.
    gap, largest = float((cov - cov.T).abs().max()), float(cov.abs().max())
    if gap > 1e-3 * largest:
        raise ValueError(f"class {c}: covariance is not symmetric, entries differ by {gap:.3g}")


def _check_factor(factor: Factor, C: int, D: int) -> None:
    parts = factor if isinstance(factor, tuple) else (factor,)
    for part in parts:
        check_float("factor", part)
    if isinstance(factor, tuple):
        fits = factor[0].dim() == 3 and factor[0].shape[:2] == (C, D) and factor[1].shape == (C, D)
    else:
        fits = tuple(factor.shape) in ((C, D, D), (C, D * (D + 1) // 2), (C, D))
    if not fits:
        got = " and ".join(str(list(part.shape)) for part in parts)
        known = f"[{C}, {D}, {D}], [{C}, {D * (D + 1) // 2}], [{C}, {D}] or ([{C}, {D}, r], [{C}, {D}])"
        raise ValueError(f"factor: expected {known}, got {got}")
