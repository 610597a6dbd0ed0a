"""Draws from class-wise Gaussians."""

from __future__ import annotations

import torch
from torch import Tensor

from spa_fast._checks import (
    check_class_ids,
    check_float,
    check_integer,
    check_like,
    check_samples,
    check_shape,
    check_tensor,
)
from spa_fast._ops.gaussian import sample_gaussian as draw_gaussian
from spa_fast.reference.gaussian import Factor, pack_tril

__all__ = ["sample_gaussian"]


def sample_gaussian(
    mean: Tensor,
    factor: Factor,
    n: int,
    *,
    seed: int | None = None,
    class_ids: Tensor | None = None,
    generator: torch.Generator | None = None,
    backend: str = "auto",
) -> Tensor:
    """Draw mean_c + L_c z, n times for every class.

    The normal z of (seed, class id, sample index, dimension) is fixed (Philox4x32-10, Box and Muller): a
    draw depends neither on the classes drawn with it nor on the device, and the first samples of a larger n
    are those of a smaller.

    Args:
        mean: [C, D], fp16, bf16, fp32 or fp64.
        factor: lower triangles packed by rows [C, D(D+1)/2], standard deviations [C, D], or (F [C, D, r],
            standard deviations [C, D]): F F^T + diag^2. Square [C, D, D] of any strides (the upper triangle
            is not read) is packed at every call. A first dimension of 1 serves all classes.
        n: samples per class, >= 0.
        seed: 0 <= seed < 2^64; None draws one from `generator`, which advances by one randint.
        class_ids: int64 [C], 0 <= id < 2^32; default 0..C-1.
        generator: None is torch's default generator of mean's device.
        backend: "auto", "native", "triton" or "reference".

    Returns:
        [C, n, D] in mean's dtype, accumulated in fp32 (fp64 for fp64). It carries no gradient.

    Raises:
        ValueError: shapes or devices that do not fit, n < 0, seed or class id out of range.
        TypeError: a dtype outside the list, n or seed not an integer.
        RuntimeError: the backend cannot run this.

    Notes:
        With a generator on mean's device a captured CUDA graph draws anew at every replay.
    """
    check_float("mean", mean)
    check_shape("mean", mean, "[C, D]", (None, None))
    C, D = mean.shape
    _check_factor(factor, mean)
    check_samples(n)
    ids = torch.arange(C, device=mean.device) if class_ids is None else class_ids
    check_tensor("class_ids", ids)
    if ids.dtype != torch.int64:
        raise TypeError(f"class_ids: expected int64, got {ids.dtype}")
    check_shape("class_ids", ids, "[C]", (C,))
    check_like("class_ids", ids, "mean", mean, dtype=False)
    check_class_ids(ids)
    if seed is None:
        drawn = draw_seed(generator, mean.device)
    else:
        check_integer("seed", seed)
        if not 0 <= seed < 1 << 64:
            raise ValueError(f"seed: expected 0 <= seed < 2^64, got {seed}")
        drawn = torch.tensor([seed - (seed >> 63 << 64)], device=mean.device)
    diag = None
    if isinstance(factor, tuple):
        kind, (factor, diag) = "lowrank", factor
    else:
        kind = "diag" if factor.shape[1:] == (D,) else "tril"
        factor = pack_tril(factor) if factor.dim() == 3 else factor
    draw: Tensor = draw_gaussian(mean, factor, diag, ids, drawn, n, 0, kind, backend)
    return draw


def draw_seed(generator: torch.Generator | None, device: torch.device) -> Tensor:
    """int64 [1] on `device`, drawn where the generator lives."""
    source = device if generator is None else generator.device
    return torch.randint((1 << 63) - 1, (1,), generator=generator, device=source).to(device)


def _check_factor(factor: Factor, mean: Tensor) -> None:
    C, D = mean.shape
    parts = factor if isinstance(factor, tuple) else (factor,)
    for part in parts:
        check_float("factor", part)
        check_like("factor", part, "mean", mean, dtype=False)
    tails = [tuple(part.shape[1:]) for part in parts]
    if isinstance(factor, tuple):
        fits = factor[0].dim() == 3 and [tails[0][0], tails[1]] == [D, (D,)]
    else:
        fits = tails[0] in ((D, D), (D * (D + 1) // 2,), (D,))
    if not fits or any(part.shape[0] not in (1, C) for part in parts):
        got = " and ".join(str(list(part.shape)) for part in parts)
        known = f"[{C}, {D}, {D}], [{C}, {D * (D + 1) // 2}], [{C}, {D}] or ([{C}, {D}, r], [{C}, {D}])"
        raise ValueError(f"factor: expected {known}, got {got}")
