"""From patches and tokens, masked, ragged or weighted, to similarities and weights that transport takes."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from spa_fast import _checks as checks
from spa_fast._ops.similarity import similarity as inner
from spa_fast._ops.unit import unit

NONFINITE = ("raise", "propagate", "zero")


def check_pair(
    patches: Tensor, tokens: Tensor, all_pairs: bool, patch_mask: Tensor | None, token_mask: Tensor | None
) -> None:
    checks.check_input("patches", patches)
    checks.check_float("tokens", tokens)
    checks.check_reverse("tokens", tokens)
    checks.check_shape("patches", patches, "[B, K, D]", (None, None, None))
    B, _, D = patches.shape
    if all_pairs and tokens.dim() == 4:
        checks.check_shape("tokens", tokens, "[B, C, M, D]", (B, None, None, D))
    elif all_pairs:
        checks.check_shape("tokens", tokens, "[C, M, D] or [B, C, M, D]", (None, None, D))
    else:
        checks.check_shape("tokens", tokens, "[B, M, D]", (B, None, D))
    checks.check_like("tokens", tokens, "patches", patches)
    for name, x, letter in (("patches", patches, "K"), ("tokens", tokens, "M")):
        if x.shape[-2] == 0:
            raise ValueError(f"{name}: expected {letter} >= 1, got {list(x.shape)}")
    if patch_mask is not None:
        checks.check_mask("patch_mask", patch_mask, "[B, K]", patches.shape[:-1], patches)
    if token_mask is not None:
        checks.check_tensor("token_mask", token_mask)
        shape = tokens.shape[1:-1] if token_mask.dim() == 2 and tokens.dim() == 4 else tokens.shape[:-1]
        checks.check_mask("token_mask", token_mask, "the shape of tokens without D", shape, tokens)


def prepare(
    name: str, x: Tensor, mask: Tensor | None, places: Sequence[str], normalize: bool, nonfinite: str
) -> Tensor:
    """x [..., D] in the accumulate dtype; masked rows are 0, so that nothing in them reaches a gradient."""
    if nonfinite == "raise":
        checks.check_finite(name, x, places, mask)
    x = x.to(checks.accumulate_dtype(x))
    if mask is not None:
        x = torch.where(mask[..., None], x, 0.0)
    if nonfinite == "zero":
        x = torch.where(x.isfinite().all(-1, keepdim=True), x, 0.0)
    return unit(x)[0] if normalize else x


def similarity(p: Tensor, s: Tensor, all_pairs: bool) -> Tensor:
    """[B, C, K, M] of p [B, K, D] and s [C, M, D] or [B, C, M, D]; else [B, K, M] of s [B, M, D].

    All pairs lie as one GEMM leaves them, [B, K, C, M].
    """
    sim: Tensor
    if not all_pairs:
        sim = inner(p, s)
        return sim
    B, K, D = p.shape
    C, M, _ = s.shape[-3:]
    if s.dim() == 4:
        sim = inner(p, s.reshape(B, C * M, D))
    else:
        sim = inner(p.reshape(1, B * K, D), s.reshape(1, C * M, D))
    return sim.view(B, K, C, M).transpose(1, 2)


def normalize_weights(weights: Tensor) -> Tensor:
    """Scaled to sum 1 over the last dimension; rows of zeros stay. Never overflows."""
    largest = weights.amax(-1, keepdim=True)
    weights = weights / largest.masked_fill(largest == 0, 1.0)
    total = weights.sum(-1, keepdim=True)
    return weights / total.masked_fill(total == 0, 1.0)


def masked_weights(
    name: str,
    weights: Tensor | None,
    mask: Tensor | None,
    features: Tensor,
    lead: tuple[int, ...],
    per_class: bool = False,
) -> Tensor | None:
    """Weights over the unmasked, broadcastable to [*lead, n]; None where uniform over all.

    per_class: a row [B, n] belongs to an image, whatever the class.
    """
    n = features.shape[-2]
    acc = checks.accumulate_dtype(features)
    if weights is not None:
        if per_class and isinstance(weights, Tensor) and weights.dim() == 2:
            weights = weights[:, None, :]
        checks.check_weights(name, weights, "the features", features, (*lead, n))
        weights = weights.to(acc)
    if mask is None:
        return weights
    if per_class:
        mask = mask[:, None, :]
    if weights is None:
        return mask.to(acc)
    masked = weights * mask
    if checks.values_checkable(masked):
        lost = (weights != 0).any(-1) & ~(masked != 0).any(-1)
        if bool(lost.any()):
            raise ValueError(
                f"{name}: expected no weight where all is masked, got a positive weight on the fully masked "
                f"{'image' if per_class else 'class'} at {lost.nonzero()[0].tolist()}"
            )
    return masked


def take(weights: Tensor | None, images: slice, lead: int) -> Tensor | None:
    """The rows of some images of weights that broadcast to [B, ..., n], `lead` dimensions before n."""
    if weights is None or weights.dim() <= lead or weights.shape[0] == 1:
        return weights
    return weights[images]


class Group(NamedTuple):
    """Classes of similar length: which they are [c], the rows of their tokens [m], their own offsets."""

    classes: Tensor
    rows: Tensor
    offsets: list[int]


def by_length(
    tokens: Tensor, token_mask: Tensor | None, cu_tokens: Tensor | Sequence[int] | None
) -> list[Group]:
    """Ragged classes in groups that differ by less than twice in length, where padding all of them to the
    longest would more than double them; else none. Grouped on a CPU and outside of torch.compile.
    """
    if cu_tokens is None or torch.compiler.is_compiling():
        return []
    checks.check_float("tokens", tokens)
    checks.check_shape("tokens", tokens, "[sum M, D] with cu_tokens", (None, None))
    offsets = _offsets(cu_tokens, tokens.shape[0])
    lengths = [end - start for start, end in pairwise(offsets)]
    padded, total = len(lengths) * max([1, *lengths]), max(len(lengths), tokens.shape[0])
    if tokens.device.type != "cpu" or padded <= 2 * total:
        return []
    if token_mask is not None:
        checks.check_mask("token_mask", token_mask, "[sum M]", tokens.shape[:1], tokens)
    groups = []
    for size in sorted({max(n, 1).bit_length() for n in lengths}):
        classes = [c for c, n in enumerate(lengths) if max(n, 1).bit_length() == size]
        rows = [row for c in classes for row in range(offsets[c], offsets[c + 1])]
        own = [0, *accumulate(lengths[c] for c in classes)]
        groups.append(Group(torch.tensor(classes), torch.tensor(rows, dtype=torch.int64), own))
    return groups


def in_order(groups: Sequence[Group], parts: Sequence[Tensor]) -> Tensor:
    """[B, C, ...] of the groups' [B, c, ...]."""
    return torch.cat(list(parts), 1)[:, torch.cat([group.classes for group in groups]).argsort()]


def _offsets(cu_tokens: Tensor | Sequence[int], total: int) -> list[int]:
    """As integers, rising from 0 to `total`."""
    offsets = _integers(cu_tokens)
    rising = all(start <= end for start, end in pairwise(offsets))
    if not offsets or offsets[0] != 0 or offsets[-1] != total or not rising:
        raise ValueError(f"cu_tokens: expected offsets rising from 0 to {total} tokens, got {offsets}")
    return offsets


def _integers(cu_tokens: Tensor | Sequence[int]) -> list[int]:
    if isinstance(cu_tokens, Tensor):
        checks.check_tensor("cu_tokens", cu_tokens)
        if cu_tokens.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"cu_tokens: expected int32 or int64, got {cu_tokens.dtype}")
        checks.check_shape("cu_tokens", cu_tokens, "[C + 1]", (None,))
        if cu_tokens.is_meta:
            raise ValueError("cu_tokens: expected a device that holds values, got meta")
        return [int(offset) for offset in cu_tokens.tolist()]
    if not isinstance(cu_tokens, (list, tuple)):
        kind = type(cu_tokens).__name__
        raise TypeError(f"cu_tokens: expected a tensor, list or tuple of C + 1 integers, got {kind}")
    for place, offset in enumerate(cu_tokens):
        if isinstance(offset, bool) or not isinstance(offset, int):
            kind = type(offset).__name__
            raise TypeError(f"cu_tokens: expected integers, got {kind} at [{place}]")
    return list(cu_tokens)


def pad_ragged(
    tokens: Tensor, b: Tensor | None, token_mask: Tensor | None, cu_tokens: Tensor | Sequence[int]
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Tokens [sum M, D], weights and mask [sum M] of ragged classes as [C, max M, ...] with a mask."""
    checks.check_float("tokens", tokens)
    checks.check_shape("tokens", tokens, "[sum M, D] with cu_tokens", (None, None))
    total = tokens.shape[0]
    offsets = _offsets(cu_tokens, total)
    M = max([1, *(end - start for start, end in pairwise(offsets))])
    step = torch.arange(M, device=tokens.device)
    # Where tokens are on a GPU, a copy from the host that is waited for would stall it.
    bounds = cu_tokens if isinstance(cu_tokens, Tensor) else torch.tensor(offsets)
    bounds = bounds.to(tokens.device, torch.int64, non_blocking=tokens.is_cuda)[:, None]
    start = bounds[:-1]
    mask = step < bounds[1:] - start
    # A class without tokens reads row 0 of a table that has at least one row; its mask hides it.
    table = tokens if total else tokens.new_zeros(1, tokens.shape[1]) + tokens.sum()
    index = torch.where(mask, start + step, 0)
    if token_mask is not None:
        checks.check_mask("token_mask", token_mask, "[sum M]", (total,), tokens)
        mask = mask & (token_mask[index] if total else False)
    if b is not None:
        checks.check_weights("b", b, "tokens", tokens, (total,))
        b = torch.where(mask, b[index], 0.0) if total else mask.to(b.dtype)
    return table[index], b, mask
