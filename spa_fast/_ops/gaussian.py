"""spa_fast::_sample_gaussian: schema, implementation, fake. It carries no gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from spa_fast import _backends, _native
from spa_fast._checks import FLOATS, values_checkable
from spa_fast._ops.sinkhorn_native import DTYPES
from spa_fast.reference import gaussian as reference

# In the order of FactorKind in csrc/gaussian.h.
KINDS = ("tril", "diag", "lowrank")

# Words of the counter: a sample index or a class id beyond would draw another's normals.
_MAX_INDEX = 1 << 32


@torch.library.custom_op("spa_fast::_sample_gaussian", mutates_args=())
def sample_gaussian(
    mean: Tensor,
    factor: Tensor,
    diag: Tensor | None,
    class_ids: Tensor,
    seed: Tensor,
    n: int,
    first: int,
    kind: str,
    backend: str,
    rows: Tensor | None = None,
) -> Tensor:
    """mean_c + L_c z [C, n, D] in the dtype of mean [C, D], samples first .. first + n - 1.

    factor, by kind: "tril" lower triangles packed by rows [C, D(D+1)/2]; "diag" standard deviations [C, D];
    "lowrank" F [C, D, r] beside `diag` [C, D], for F F^T + diag^2. A first dimension of 1 serves all classes.
    class_ids int64 [C]; seed int64 [1] on mean's device, so that a captured graph draws anew when it changes.
    With rows int64 [C], class c's mean and factor are those of rows[c], read where they lie; on CUDA nobody
    looks whether such a row exists.
    """
    _check(mean, factor, diag, class_ids, seed, n, first, kind, rows)
    if diag is not None:
        common = torch.promote_types(factor.dtype, diag.dtype)
        factor, diag = factor.to(common), diag.to(common)
    if _backends.resolve_sampler(backend, mean, factor) == "native":
        return _native_draw(mean, factor, diag, class_ids, seed, n, first, kind, rows)
    mean, factor = _picked(mean, rows), _picked(factor, rows)
    both = factor if diag is None else (factor, _picked(diag, rows))
    return reference.sample_gaussian(mean, both, n, seed, class_ids, first)


def _native_draw(
    mean: Tensor,
    factor: Tensor,
    diag: Tensor | None,
    class_ids: Tensor,
    seed: Tensor,
    n: int,
    first: int,
    kind: str,
    rows: Tensor | None,
) -> Tensor:
    out = mean.new_empty(class_ids.shape[0], n, mean.shape[1])
    if out.numel() == 0:
        return out
    if diag is not None and factor.shape[2] == 0:
        factor, diag, kind = diag, None, "diag"
    # Held by these names until the launch: the arguments are bare addresses.
    mean, factor, class_ids = mean.contiguous(), factor.contiguous(), class_ids.contiguous()
    diag = None if diag is None else diag.contiguous()
    rows = None if rows is None else rows.contiguous()
    extension: Any = _native.extension()
    draw = extension.GaussianArgs(
        rows=0 if rows is None else rows.data_ptr(),
        mean=mean.data_ptr(),
        mean_dtype=DTYPES[mean.dtype],
        factor=factor.data_ptr(),
        factor_dtype=DTYPES[factor.dtype],
        factor_stride=_stride(factor),
        diag=0 if diag is None else diag.data_ptr(),
        diag_stride=0 if diag is None else _stride(diag),
        class_ids=class_ids.data_ptr(),
        seed=seed.data_ptr(),
        out=out.data_ptr(),
        kind=KINDS.index(kind),
        C=class_ids.shape[0],
        D=mean.shape[1],
        n=n,
        rank=factor.shape[2] if kind == "lowrank" else 0,
        first=first,
    )
    if mean.device.type == "cpu":
        extension.sample_gaussian_cpu(draw, torch.get_num_threads())
    else:
        with torch.cuda.device(mean.device):
            stream = torch.cuda.current_stream(mean.device).cuda_stream
            extension.sample_gaussian_cuda(draw, mean.device.index, stream)
    return out


def _picked(x: Tensor, rows: Tensor | None) -> Tensor:
    return x if rows is None or x.shape[0] == 1 else x[rows]


def _stride(x: Tensor) -> int:
    """Entries from a row to the next; one row serves all."""
    return 0 if x.shape[0] == 1 else x.stride(0)


def _check(
    mean: Tensor,
    factor: Tensor,
    diag: Tensor | None,
    class_ids: Tensor,
    seed: Tensor,
    n: int,
    first: int,
    kind: str,
    rows: Tensor | None,
) -> None:
    """What raw pointers need: sizes that fit, floats, one device."""
    if kind not in KINDS:
        raise ValueError(f"kind: expected one of {', '.join(map(repr, KINDS))}, got {kind!r}")
    if mean.dim() != 2:
        raise ValueError(f"mean: expected [C, D], got {list(mean.shape)}")
    C, D = mean.shape
    tail = {"tril": (D * (D + 1) // 2,), "diag": (D,), "lowrank": (D, *factor.shape[-1:])}[kind]
    if factor.dim() != len(tail) + 1 or factor.shape[0] not in (1, C) or factor.shape[1:] != tail:
        raise ValueError(f"factor: expected {[C, *tail]} or {[1, *tail]}, got {list(factor.shape)}")
    if (diag is None) != (kind != "lowrank"):
        raise ValueError(f"diag: expected with kind 'lowrank' only, got {type(diag).__name__} with {kind!r}")
    if diag is not None and (diag.dim() != 2 or diag.shape[0] not in (1, C) or diag.shape[1] != D):
        raise ValueError(f"diag: expected {[C, D]} or {[1, D]}, got {list(diag.shape)}")
    for name, y in (("mean", mean), ("factor", factor), ("diag", diag)):
        if y is not None and y.dtype not in FLOATS:
            raise TypeError(f"{name}: expected fp16, bf16, fp32 or fp64, got {y.dtype}")
    drawn = C if rows is None else class_ids.numel()
    for name, x, size in (("class_ids", class_ids, drawn), ("seed", seed, 1), ("rows", rows, drawn)):
        if x is not None and (x.dtype != torch.int64 or x.shape != (size,)):
            raise ValueError(f"{name}: expected int64 [{size}], got {x.dtype} {list(x.shape)}")
    on_device = {"factor": factor, "diag": diag, "class_ids": class_ids, "seed": seed, "rows": rows}
    for name, y in on_device.items():
        if y is not None and y.device != mean.device:
            raise ValueError(f"{name}: expected the device of mean, {mean.device}, got {y.device}")
    looked_at = rows.tolist() if rows is not None and values_checkable(rows) else []
    if looked_at and not 0 <= min(looked_at) <= max(looked_at) < C:
        raise ValueError(f"rows: expected 0 <= row < {C}, got {min(looked_at)} to {max(looked_at)}")
    if n < 0 or first < 0 or first + n > _MAX_INDEX:
        raise ValueError(f"n, first: expected >= 0 and first + n <= 2^32, got {n} and {first}")


@sample_gaussian.register_fake
def _(
    mean: Tensor, factor: Tensor, diag: Tensor | None, class_ids: Tensor, seed: Tensor, n: int, *rest: Any
) -> Tensor:
    return mean.new_empty(class_ids.shape[0], n, mean.shape[1])
