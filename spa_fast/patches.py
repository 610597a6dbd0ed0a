"""Patches scored by semantic tokens: selection, alignment of the selected ones, and both in one call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor

from spa_fast import _checks as checks
from spa_fast._backends import BACKENDS
from spa_fast._ops import patches as _ops
from spa_fast.reference.patches import SOFTMAX_TEMPERATURE, relevance
from spa_fast.transport import Grad, Plan, Score, align_similarity

__all__ = ["SOFTMAX_TEMPERATURE", "align_selected", "select_indices", "spa_scores", "topk_patches"]

Reduce = Literal["max", "mean", "softmax"]

# Kept similarities aligned at once where no gradient is wanted: 4 MiB in fp32, a few copies of it alive.
_CHUNK = 1 << 20


def topk_patches(
    patches: Tensor,
    tokens: Tensor,
    k: int,
    *,
    reduce: Reduce = "max",
    class_conditional: bool = True,
    patch_mask: Tensor | None = None,
    token_mask: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The k patches of each image that agree best with each class's semantic tokens.

    r_{b,c,n} = reduce_j cos(p_bn, s_cj); kept are the k largest over n, equal values by lowest index.

    Args:
        patches: [B, N, D], fp16, bf16, fp32 or fp64; accumulated in fp32 (fp64 for fp64).
        tokens: [C, M, D], M >= 1, the patches' dtype and device.
        k: patches kept, 1 <= k <= N.
        reduce: "max", "mean", or "softmax": sum_j softmax_j(cos_j / T) cos_j with T = SOFTMAX_TEMPERATURE.
        class_conditional: False selects once per image, by max_c r: the same indices for every class; the
            scores remain each class's own r.
        patch_mask, token_mask: bool [B, N] and [C, M], True takes part. Masked patches come after all
            others, in order of index, with score 0.
        backend: "auto" or "reference".

    Returns:
        scores [B, C, k] in the accumulate dtype and indices int64 [B, C, k]. A class whose tokens are all
        masked scores 0.

    Raises:
        ValueError: k outside 1..N, M = 0, shapes or devices that do not fit, NaN or Inf in an unmasked patch
            or token (values are looked at on a CPU, outside of torch.compile).
        TypeError: a dtype outside the list, or mixed dtypes.
        RuntimeError: a backend without an implementation.

    Notes:
        The gradient flows through the scores at fixed indices; for "max" to the first of equal tokens. A
        vector of norm 0 has cosine 0 and gradient 0. One GEMM over all images and classes, in blocks of
        8 MiB: extra memory is about 24 MiB and the kept similarities [B, C, k, M].
    """
    _check(patches, tokens, k, reduce, patch_mask, token_mask)
    _check_backend(backend)
    sim, indices = _ops.topk_patches(patches, tokens, patch_mask, token_mask, k, reduce, class_conditional)
    mask = None if token_mask is None else token_mask[:, None]
    if reduce == "max":
        best = sim.detach() if mask is None else sim.detach().masked_fill(~mask, -torch.inf)
        return sim.gather(-1, best.argmax(-1, keepdim=True)).squeeze(-1), indices
    return relevance(sim, mask, reduce, dim=-1), indices


def spa_scores(
    patches: Tensor,
    tokens: Tensor,
    k: int,
    eps: float = 0.1,
    *,
    max_iter: int = 100,
    tol: float = 1e-3,
    reduce: Reduce = "max",
    score: Score = "transport",
    grad: Grad = "envelope",
    solver: Plan = "sinkhorn",
    class_conditional: bool = True,
    patch_mask: Tensor | None = None,
    token_mask: Tensor | None = None,
    select_patches: Tensor | None = None,
    select_tokens: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Score every class for every image: keep k patches and align them with the class's tokens by transport.

    score_{b,c} = <P, S>, S the cosines of the kept patches to the tokens, P the plan of cost 1 - S with
    uniform marginals over the unmasked.

    Args:
        patches, tokens: [B, N, D], [C, M, D], the features that are aligned.
        k: patches kept per image and class, 1 <= k <= N.
        eps: regularisation > 0 in units of cost (cosine distance, 0 to 2).
        max_iter, tol, grad: as in `sinkhorn`.
        score, solver: as in `align_similarity`.
        reduce, class_conditional, patch_mask, token_mask: as in `topk_patches`. A masked patch that had to be
            kept has weight 0; without any patch or token left the score is 0.
        select_patches, select_tokens: [B, N, D'], [C, M', D'], both or neither: features to select by
            instead, say frozen ones where the others are projected. `token_mask` holds for them if M' = M.
        backend: of the transport, as in `sinkhorn`; the selection is plain PyTorch.

    Returns:
        [B, C] in the accumulate dtype.

    Raises:
        TypeError, ValueError, RuntimeError: as `topk_patches` and `sinkhorn`.

    Notes:
        The selection carries no gradient. The kept features of all classes never exist at once: similarities
        come from one GEMM per block of images, or from 1 MiB of gathered rows where the indices are known.
        Without gradient, images go through in chunks of 2^20 kept similarities: at most 64 MiB beside the
        output as long as one image and all classes stay below that number.
    """
    _check(patches, tokens, k, reduce, patch_mask, token_mask)
    mask = token_mask
    if (select_patches is None) != (select_tokens is None):
        raise ValueError("select_patches, select_tokens: expected both or neither")
    if select_patches is not None and select_tokens is not None:
        (B, N), C = patches.shape[:2], tokens.shape[0]
        checks.check_shape("select_patches", select_patches, f"[{B}, {N}, D']", (B, N, None))
        checks.check_shape("select_tokens", select_tokens, f"[{C}, M', D']", (C, None, None))
        mask = token_mask if select_tokens.shape[1] == tokens.shape[1] else None
        _check(select_patches, select_tokens, k, reduce, patch_mask, mask, "select_")

    def scores(images: slice) -> Tensor:
        kept = None if patch_mask is None else patch_mask[images]
        if select_patches is None or select_tokens is None:
            sim, indices = _ops.topk_patches(
                patches[images], tokens, kept, token_mask, k, reduce, class_conditional
            )
        else:
            _, indices = _ops.topk_patches(
                select_patches.detach()[images],
                select_tokens.detach(),
                kept,
                mask,
                k,
                reduce,
                class_conditional,
            )
            sim = _ops.selected_sim(patches[images], tokens, indices, kept, token_mask)
        out: Tensor = align_similarity(
            sim,
            None if kept is None else _gather_mask(kept, indices, sim.dtype),
            None if token_mask is None else token_mask.to(sim.dtype),
            eps=eps,
            max_iter=max_iter,
            tol=tol,
            score=score,
            grad=grad,
            solver=solver,
            backend=backend,
        )
        return out

    return _in_chunks(scores, patches, tokens, k)


def select_indices(
    patches: Tensor,
    tokens: Tensor,
    k: int,
    *,
    reduce: Reduce = "max",
    class_conditional: bool = True,
    patch_mask: Tensor | None = None,
    token_mask: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """The indices [B, C, k] of `topk_patches` alone: chosen once, they serve `align_selected` many times."""
    _check(patches, tokens, k, reduce, patch_mask, token_mask)
    _check_backend(backend)
    indices: Tensor = _ops.topk_patches(
        patches.detach(), tokens.detach(), patch_mask, token_mask, k, reduce, class_conditional
    )[1]
    return indices


def align_selected(
    patches: Tensor,
    tokens: Tensor,
    indices: Tensor,
    *,
    eps: float = 0.1,
    max_iter: int = 100,
    tol: float = 1e-3,
    score: Score = "transport",
    grad: Grad = "envelope",
    solver: Plan = "sinkhorn",
    weights: Tensor | None = None,
    patch_mask: Tensor | None = None,
    token_mask: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """The second half of `spa_scores`: align the patches `indices` int64 [B, C, K] with each class's tokens.

    Args:
        weights: of the kept patches, [K], [B, 1, K] or [B, C, K], >= 0 and constant; default uniform over the
            unmasked. Normalised per image and class.
        others: as in `spa_scores`.

    Returns:
        [B, C] in the accumulate dtype.
    """
    B, C = patches.shape[0], tokens.shape[0]
    if indices.dtype != torch.int64:
        raise TypeError(f"indices: expected int64, got {indices.dtype}")
    checks.check_shape("indices", indices, f"[{B}, {C}, K]", (B, C, None))
    _check(patches, tokens, indices.shape[2], "max", patch_mask, token_mask)
    checks.check_like("indices", indices, "patches", patches, dtype=False)
    if checks.values_checkable(indices) and indices.numel():
        low, high = int(indices.min()), int(indices.max())
        if low < 0 or high >= patches.shape[1]:
            raise ValueError(f"indices: expected 0 <= index < N = {patches.shape[1]}, got {low} to {high}")

    def scores(images: slice) -> Tensor:
        kept = None if patch_mask is None else patch_mask[images]
        index = indices[images]
        sim = _ops.selected_sim(patches[images], tokens, index, kept, token_mask)
        a = weights[images] if weights is not None and weights.dim() == 3 else weights
        if kept is not None:
            active = _gather_mask(kept, index, sim.dtype)
            a = active if a is None else a * active
        out: Tensor = align_similarity(
            sim,
            a,
            None if token_mask is None else token_mask.to(sim.dtype),
            eps=eps,
            max_iter=max_iter,
            tol=tol,
            score=score,
            grad=grad,
            solver=solver,
            backend=backend,
        )
        return out

    return _in_chunks(scores, patches, tokens, indices.shape[2])


def _in_chunks(scores: Callable[[slice], Tensor], patches: Tensor, tokens: Tensor, k: int) -> Tensor:
    """All images at once where a gradient is wanted or a graph is traced, else chunk by chunk."""
    B, images = patches.shape[0], max(1, _CHUNK // max(tokens.shape[0] * tokens.shape[1] * k, 1))
    wanted = torch.is_grad_enabled() and (patches.requires_grad or tokens.requires_grad)
    if torch.compiler.is_compiling() or wanted or images >= B:
        return scores(slice(None))
    return torch.cat([scores(slice(b, b + images)) for b in range(0, B, images)])


def _gather_mask(mask: Tensor, indices: Tensor, dtype: torch.dtype) -> Tensor:
    """1 for the unmasked among the kept patches, else 0: [B, C, K]."""
    return mask[:, None].expand(-1, indices.shape[1], -1).gather(2, indices).to(dtype)


def _check(
    patches: Tensor,
    tokens: Tensor,
    k: int,
    reduce: str,
    patch_mask: Tensor | None,
    token_mask: Tensor | None,
    prefix: str = "",
) -> None:
    for name, x, sizes in (("patches", patches, "[B, N, D]"), ("tokens", tokens, "[C, M, D]")):
        checks.check_float(prefix + name, x)
        checks.check_shape(prefix + name, x, sizes, (None, None, None))
    B, N, D = patches.shape
    C, M, _ = tokens.shape
    checks.check_like(f"{prefix}tokens", tokens, f"{prefix}patches", patches)
    checks.check_shape(f"{prefix}tokens", tokens, f"[C, M, {D}] with the width of patches", (None, None, D))
    if M == 0:
        raise ValueError(f"{prefix}tokens: expected M >= 1 tokens per class, got {list(tokens.shape)}")
    checks.check_k(k, N)
    checks.check_choice("reduce", reduce, get_args(Reduce))
    if patch_mask is not None:
        checks.check_mask("patch_mask", patch_mask, f"[{B}, {N}]", (B, N), patches)
    if token_mask is not None:
        checks.check_mask("token_mask", token_mask, f"[{C}, {M}]", (C, M), tokens)
    checks.check_finite(f"{prefix}patches", patches, ("image", "patch"), patch_mask)
    checks.check_finite(f"{prefix}tokens", tokens, ("class", "token"), token_mask)


def _check_backend(backend: str) -> None:
    checks.check_choice("backend", backend, BACKENDS)
    if backend not in ("auto", "reference"):
        raise RuntimeError(f"backend {backend!r} is not usable: patch selection has no such implementation")
