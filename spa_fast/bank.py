"""Class-wise Gaussians that stand in for the images of old classes: fit, merge, store, draw."""

from __future__ import annotations

import math
import operator
import os
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from spa_fast._bank.class_moments import Moments, Shrink, of_rows
from spa_fast._bank.factor_store import Factors, FactorStore
from spa_fast._bank.moment_store import MomentStore, names
from spa_fast._checks import (
    check_choice,
    check_class_ids,
    check_float,
    check_integer,
    check_samples,
    check_shape,
    check_tensor,
)
from spa_fast._ops.gaussian import sample_gaussian as draw_gaussian
from spa_fast.gaussian import draw_seed
from spa_fast.reference.gaussian import pack_tril

__all__ = ["Covariance", "GaussianBank", "Shrink"]

Covariance = Literal["full", "diag", "lowrank", "shared"]

_KINDS = {"full": "tril", "shared": "tril", "diag": "diag", "lowrank": "lowrank"}
_DTYPES = {str(dtype): dtype for dtype in (torch.float32, torch.float16, torch.bfloat16)}
# How a setting is read back from text.
_SETTINGS: dict[str, Callable[[str], Any]] = {
    "covariance": str,
    "ridge": float,
    "shrink": str,
    "rank": int,
    "dtype": _DTYPES.__getitem__,
}
# Fourth-order sums of longer rows overflow fp64.
_LARGEST = 1e75


class GaussianBank:
    """Mean and covariance per class, gathered from a stream, and draws from them.

    Sigma_c = S_c / (n_c - 1) + ridge I,   S_c = sum (x - mean)(x - mean)^T,   or shrunk, see `shrink`.

    Batches are joined by the update of Chan, Golub and LeVeque (1979) in fp64, so any split or order of the
    data gives the same moments up to rounding. Classes may come at any time.

    Args:
        covariance: "full"; "diag"; "lowrank": the `rank` leading eigenpairs and the diagonal of the rest;
            "shared": one pooled within-class covariance for all.
        ridge: > 0, added to every variance, in squared units of the features.
        shrink: "none"; "average" adds the mean variance and the mean covariance; "ledoit_wolf" and "oas" (not
            with "diag") are scikit-learn's estimators (1 - w) S / n + w (tr S / (n D)) I, with w from the
            data. Ledoit and Wolf's w needs sum |x - mean|^4: to stay mergeable D + 1 more numbers are kept of
            a class, and its own scatter (so not with "shared").
        rank: of "lowrank".
        dtype: fp32, fp16 or bf16, in which factors are kept; draws are fp32. Rounding an entry of the factor
            to fp16 (bf16) blurs directions narrower than about 2^-11 (2^-8) of the widest.
        device: where draws are made; moments stay on the CPU.

    Notes:
        The factor of a class is computed in fp64 at the first draw after a change: Cholesky with jitter 1e-6
        to 1e-2 times trace/D where needed, else eigenvalues clipped at 0. In fp16 a badly scaled class takes
        a power of two along; where that does not help, a ValueError names it.
        A class of one image takes the diagonal of the pooled covariance, with one warning that names it.
        Memory of "full": the packed factor takes 2 D (D + 1) bytes a class in fp32 (53 MB for 100 classes of
        512), half of that in fp16; and until `freeze` the exact moments take 4 D (D + 1).
        A draw equals `sample_gaussian` with the labels as class ids; same seed, same machine, same bits. It
        can be captured in a CUDA graph once the same classes have been drawn outside of one; the graph keeps
        to the classes of its capture.
    """

    def __init__(
        self,
        *,
        covariance: Covariance = "full",
        ridge: float = 1e-4,
        shrink: Shrink = "none",
        rank: int = 32,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
    ) -> None:
        check_choice("covariance", covariance, get_args(Covariance))
        check_choice("shrink", shrink, get_args(Shrink))
        if covariance == "diag" and shrink in ("ledoit_wolf", "oas"):
            raise ValueError(f"shrink: {shrink!r} needs all covariances, got covariance 'diag'")
        if covariance == "shared" and shrink == "ledoit_wolf":
            raise ValueError("shrink: 'ledoit_wolf' needs every class's scatter, got covariance 'shared'")
        if not (ridge > 0 and math.isfinite(ridge)):
            raise ValueError(f"ridge: expected a finite number > 0, got {ridge}")
        check_integer("rank", rank)
        if rank < 1:
            raise ValueError(f"rank: expected >= 1, got {rank}")
        if dtype not in _DTYPES.values():
            raise TypeError(f"dtype: expected fp32, fp16 or bf16, got {dtype}")
        self.covariance = covariance
        self.ridge = ridge
        self.shrink = shrink
        self.rank = rank
        self.dtype = dtype
        self.device = torch.device(device)
        # What captured CUDA graphs read.
        self._captured: list[object] = []
        self._reset(*self._empty())

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

        `count` (default 2 a class, the fewest that carry a covariance) weighs later data against these and
        enters "oas"; `settings` are the constructor's, without "ledoit_wolf". Raises ValueError, naming the
        class, for a matrix that is not finite, not symmetric or not positive semi-definite beyond rounding.
        """
        bank = cls(**settings)
        if bank.shrink == "ledoit_wolf":
            raise ValueError("shrink: 'ledoit_wolf' needs the data: call fit")
        check_float("mean", mean)
        check_float("cov", cov)
        check_shape("mean", mean, "[C, D]", (None, None))
        C, D = mean.shape
        if D == 0:
            raise ValueError(f"mean: expected at least one column, got {list(mean.shape)}")
        if not (bank.covariance == "diag" and cov.shape == (C, D)):
            check_shape("cov", cov, "[C, D, D]", (C, D, D))
        ids = list(range(C)) if class_ids is None else _integers("class_ids", class_ids)
        counts = [2] * C if count is None else _integers("count", count)
        check_class_ids(torch.tensor(ids))
        if len(ids) != C or len(set(ids)) != C:
            raise ValueError(f"class_ids: expected {C} distinct ids, got {ids}")
        if len(counts) != C or any(n < 2 for n in counts):
            raise ValueError(f"count: expected {C} numbers >= 2, got {counts}")
        mean = mean.detach().to("cpu", torch.float64)
        for row, (c, n) in enumerate(zip(ids, counts, strict=True)):
            spread = cov[row].detach().to("cpu", torch.float64)
            _check_moments(c, mean[row], spread)
            if bank.covariance == "diag":
                scatter = spread if spread.dim() == 1 else spread.diagonal()
                if bool((scatter < 0).any()):
                    raise ValueError(f"class {c}: expected variances >= 0, got {float(scatter.min()):.3g}")
            else:
                scatter = pack_tril((spread + spread.T) / 2)
            bank._add(c, Moments(n, mean[row].clone(), scatter * (n - 1), None))
        if len(bank):
            bank._factors()
        return bank

    def __len__(self) -> int:
        return len(self._moments.stats)

    @property
    def class_ids(self) -> list[int]:
        """Classes held, ascending: the order of `sample`."""
        return sorted(self._moments.stats)

    def fit(self, features: Tensor, labels: Tensor) -> None:
        """Add features [n, D] with class labels int [n] to the moments; may be called any number of times.

        Raises ValueError for no rows, a width other than the bank's, a label outside [0, 2^32), a feature
        that is not finite (naming the classes) or a frozen class; the bank is then unchanged.
        """
        check_float("features", features)
        check_shape("features", features, "[n, D]", (None, None))
        if 0 in features.shape:
            raise ValueError(f"features: expected at least one row and column, got {list(features.shape)}")
        self._moments.check_width(features.shape[1])
        check_tensor("labels", labels)
        if labels.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"labels: expected int64 or int32, got {labels.dtype}")
        check_shape("labels", labels, "[n]", (features.shape[0],))
        features, labels = features.detach().cpu(), labels.cpu()
        check_class_ids(labels)
        bad = ~(torch.linalg.vector_norm(features, dim=1, dtype=torch.float64) < _LARGEST)
        if bool(bad.any()):
            found = names(labels[bad].tolist())
            raise ValueError(f"features: not finite or beyond {_LARGEST:g} for class {found}")
        classes = sorted(set(labels.tolist()))
        self._moments.check_live(classes)
        for c in classes:
            rows = features[labels == c]
            self._add(c, of_rows(rows, diagonal=self._moments.diagonal, fourth=self._moments.fourth))

    def merge(self, other: GaussianBank) -> None:
        """Add the data behind another bank of the same covariance and shrink.

        Raises ValueError for another kind or width, and for frozen classes; the bank is then unchanged.
        """
        for name in ("covariance", "shrink"):
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine != theirs:
                raise ValueError(f"other: expected {name} {mine!r}, got {theirs!r}")
        new = other._moments
        for store in (new, self._moments):
            store.check_live(new.stats)
        for m in new.stats.values():
            self._moments.check_width(len(m.mean))
        for c, m in new.stats.items():
            self._add(c, m)
        self._moments.common = self._moments.common + new.common

    def freeze(self) -> None:
        """Factorise all classes and release their exact scatter: they can still be drawn, but not be fitted.

        Call it when a task's classes are complete. With "diag" and "shared", whose scatter is small or serves
        later classes, it factorises only. A frozen class of one image keeps the pooled covariance of this
        moment, and `moments` of a frozen class are those of its rounded factor.
        """
        if len(self):
            self._factors()
            self._moments.release()

    def mean(self, classes: Sequence[int] | None = None) -> Tensor:
        """Class means [C, D], fp64."""
        return torch.stack([self._moments.stats[c].mean for c in self._known(classes)])

    def moments(self, classes: Sequence[int] | None = None) -> tuple[Tensor, Tensor]:
        """Mean [C, D] and the covariance drawn from [C, D, D], ridge and shrinkage included, fp64.

        "diag" gives diagonal matrices; "lowrank" the covariance before its rank is cut, unless frozen.
        """
        ids = self._known(classes)
        frozen = self._moments.frozen
        cov = [self._store.covariance_of(c) if c in frozen else self._covariance(c) for c in ids]
        return self.mean(ids), torch.stack([x.diag() if x.dim() == 1 else x for x in cov])

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
            generator: one seed is drawn from it; None is the default generator of the bank's device.
        """
        check_samples(n)
        ids = self._known(classes)
        mean, parts, scale, scaled = factors = self._factors()
        rows, labels = selected = self._select(ids)
        if self.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            self._captured += [factors, selected]
        diag = parts[1] if self.covariance == "lowrank" else None
        seed, kind = draw_seed(generator, self.device), _KINDS[self.covariance]
        draw: Tensor = draw_gaussian(mean, parts[0], diag, labels, seed, n, 0, kind, "auto", rows)
        if scaled:
            draw *= scale[rows][:, None, None]
        return draw.flatten(0, 1), labels[:, None].expand(-1, n).flatten()

    def state_dict(self) -> dict[str, Tensor]:
        """class_ids, count, mean and scatter (lower triangles by rows), exact in fp64.

        Beside them `fourth` with "ledoit_wolf"; and where classes are frozen `frozen` (their ids), `released`
        (the sum of their scatters' diagonals) and instead of a scatter their factor: `factor_scale`,
        `factor_0`, and with "lowrank" `factor_1`.
        """
        state = self._moments.state()
        if self._moments.frozen:
            state |= self._store.state(self._moments.frozen)
        return state

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Replace what is held by `state_dict` of a bank with the same settings.

        Raises ValueError for anything else; the bank is then unchanged.
        """
        moments, store = self._empty()
        factor = {name: x for name, x in state.items() if name.startswith("factor_")}
        moments.load({name: x for name, x in state.items() if name not in factor})
        if moments.frozen:
            store.load(factor, {c: moments.stats[c].mean for c in moments.frozen})
        elif factor:
            raise ValueError(f"state: expected no factors without frozen classes, got {sorted(factor)}")
        self._reset(moments, store)

    def save(self, path: str | Path) -> None:
        """Write state and settings to a safetensors file, by rename."""
        from safetensors.torch import save_file

        path = Path(path)
        settings = {name: str(getattr(self, name)) for name in _SETTINGS}
        temporary = path.with_name(path.name + ".tmp")
        save_file(self.state_dict(), temporary, metadata=settings)
        os.replace(temporary, path)

    @classmethod
    def load(cls, path: str | Path, device: str | torch.device = "cpu") -> GaussianBank:
        """Read what `save` wrote; ValueError naming the file for anything else."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, "pt") as file:
                text = file.metadata() or {}
                state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            settings = {name: read(text[name]) for name, read in _SETTINGS.items()}
            bank = cls(**settings, device=device)
            bank.load_state_dict(state)
        except (SafetensorError, KeyError, ValueError, TypeError) as error:
            raise ValueError(f"{path}: not a Gaussian bank: {error}") from error
        return bank

    def _empty(self) -> tuple[MomentStore, FactorStore]:
        moments = MomentStore(self.covariance, self.shrink)
        return moments, FactorStore(self.covariance, self.rank, self.dtype, self.device)

    def _reset(self, moments: MomentStore, store: FactorStore) -> None:
        self._moments, self._store = moments, store
        # Classes whose factor is not that of their moments.
        self._stale = set(moments.stats) - moments.frozen
        self._warned: set[int] = set()
        # Classes last drawn, their rows and labels.
        self._selected: tuple[list[int], Tensor, Tensor] | None = None

    def _add(self, c: int, m: Moments) -> None:
        self._moments.add(c, m)
        self._stale.add(c)

    def _known(self, classes: Sequence[int] | None) -> list[int]:
        if not len(self):
            raise ValueError("the bank is empty: call fit first")
        if classes is None:
            return self.class_ids
        ids = _integers("classes", classes)
        unknown = set(ids) - self._moments.stats.keys()
        if unknown:
            raise ValueError(f"classes: the bank holds no class {names(unknown)}")
        return ids

    def _covariance(self, c: int) -> Tensor:
        cov = self._moments.covariance(c)
        (cov if cov.dim() == 1 else cov.diagonal()).add_(self.ridge)
        return cov

    def _factors(self) -> Factors:
        """Brought up to date."""
        if self._store.held is not None and not self._stale:
            return self._store.held
        singles = self._moments.singles()
        if singles - self._warned:
            self._warned |= singles
            warnings.warn(
                f"class {names(singles)}: one image only, drawn with the pooled diagonal covariance",
                stacklevel=3,
            )
        # What is pooled changes with every class.
        changed = set(self.class_ids) if self.covariance == "shared" else self._stale | singles
        means = {c: m.mean for c, m in self._moments.stats.items()}
        factors = self._store.update(means, self._covariance, changed)
        self._stale, self._selected = set(), None
        return factors

    def _select(self, ids: list[int]) -> tuple[Tensor, Tensor]:
        """Rows of classes and their labels, int64 [C] on the device."""
        if self._selected is None or self._selected[0] != ids:
            rows = [self._store.rows[c] for c in ids]
            table = torch.tensor([rows, ids], dtype=torch.int64, device=self.device)
            self._selected = (ids, table[0], table[1])
        return self._selected[1:]


def _integers(name: str, values: Iterable[int]) -> list[int]:
    try:
        return [operator.index(x) for x in values]
    except TypeError as error:
        raise TypeError(f"{name}: expected integers: {error}") from None


def _check_moments(c: int, mean: Tensor, cov: Tensor) -> None:
    if not bool(mean.isfinite().all() & cov.isfinite().all()):
        raise ValueError(f"class {c}: expected a finite mean and covariance")
    if cov.dim() == 1:
        return
    # Rounding of a covariance computed in half precision stays below 1e-3 of its largest entry.
    gap, largest = float((cov - cov.T).abs().max()), float(cov.abs().max())
    if gap > 1e-3 * largest:
        raise ValueError(f"class {c}: covariance is not symmetric, entries differ by {gap:.3g}")
