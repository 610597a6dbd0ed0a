"""Select, align and score: the patches kept for a class and their transport to its tokens."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from ._tiles import MAX_REGISTERS, PatchConfig, default_scores, next_power_of_2
from .patches import select, topk_patches_fwd
from .patches_cosine import inverse_norms, kept_places, unpack
from .patches_kept import kept_cosines, kept_similarity
from .sinkhorn import _max, _scaling_loop, _sum, sinkhorn_fwd

# Costs 1 - cos span 2: from this eps on e^(-cost / eps) and both scalings are normal fp32 numbers.
MIN_FUSED_EPS = 2 / 80
# f and g are good to 5e-7 eps: beyond, `sinkhorn_fwd` finds them more exactly.
MAX_FUSED_EPS = 1.0


@triton.jit
def _align(
    sim, a, b, to_log2, from_log2, max_iter, tol, VALUE: tl.constexpr
):  # fmt: skip
    """score, f, g, n_iter of similarities [K2, M2, classes, 1, 1], which `_scaling_loop` of the transport
    takes, between a [K2, 1, ...] and b [1, M2, ...], uniform over what is positive."""
    a /= tl.maximum(_sum(a, 0, 3), 1.0)
    b /= tl.maximum(_sum(b, 1, 4), 1.0)
    active = (a > 0) & (b > 0)
    nan = _max(_max((active & (sim != sim)).to(tl.int32), 1, 4), 0, 3) > 0
    top = _max(tl.where(active, sim, float("-inf")), 1, 4)
    top = tl.where(top == float("-inf"), 0.0, top)
    tile = tl.where(active, tl.exp2((sim - top) * to_log2), 1.0)
    live = (_max(a, 0, 3) > 0) & (_max(b, 1, 4) > 0) & (nan == 0)
    found = _scaling_loop(tile, a, b, live, max_iter, tol)
    row_sum, col_sum, n = found[0], found[1], found[-2]
    f = tl.where(live & (a > 0), 1 - top - tl.log2(row_sum) * from_log2, 0.0)
    g = tl.where(live & (b > 0), -tl.log2(col_sum) * from_log2, 0.0)
    if VALUE:
        # <P, f + g>: columns of P are exact, its mass is 1 and so is that of a b^T.
        score = _sum(_sum(tile * (b / col_sum), 1, 4) * (a / row_sum) * f, 0, 3) + _sum(b * g, 1, 4)
    else:
        score = _sum(_sum(tile * (b / col_sum) * sim, 1, 4) * (a / row_sum), 0, 3)
    score = tl.where(nan, float("nan"), tl.where(live, score, 0.0))
    return score, tl.where(nan & (a > 0), float("nan"), f), tl.where(nan & (b > 0), float("nan"), g), n


@triton.jit
def _score_kept(
    patches_ptr, inv_patches_ptr, tokens_ptr, inv_tokens_ptr, indices_ptr, score_ptr, f_ptr, g_ptr,
    n_iter_ptr, C, M, k, D, to_log2, from_log2, max_iter, tol,
    VALUE: tl.constexpr, SCALE: tl.constexpr, CLASSES: tl.constexpr, K2: tl.constexpr, M2: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Transport of one image's patches indices [C, k] to the tokens of its first min(C, CLASSES) classes."""
    g = tl.arange(0, CLASSES)[:, None]
    i = tl.arange(0, K2)[None, :]
    inside = (g < C) & (i < k)
    n = tl.load(indices_ptr + (g * k + i), mask=inside, other=0).to(tl.int32)
    sim = kept_cosines(
        patches_ptr, inv_patches_ptr, n, inside, tokens_ptr, inv_tokens_ptr, 0, M, D, M2, M2, BLOCK_D, SCALE
    )
    a = tl.where(tl.load(inv_patches_ptr + n, mask=inside, other=-1.0) == -1, 0.0, 1.0)
    j = tl.arange(0, M2)[:, None]
    g = tl.arange(0, CLASSES)[None, :]
    b = tl.where(tl.load(inv_tokens_ptr + (g * M2 + j)) == -1, 0.0, 1.0)
    score, phi, psi, steps = _align(
        tl.reshape(tl.permute(sim, (1, 2, 0)), [K2, M2, CLASSES, 1, 1]),
        tl.reshape(tl.trans(a), [K2, 1, CLASSES, 1, 1]), tl.reshape(b, [1, M2, CLASSES, 1, 1]),
        to_log2, from_log2, max_iter, tol, VALUE,
    )  # fmt: skip
    i = tl.arange(0, K2)[:, None]
    tl.store(score_ptr + g, tl.reshape(score, [1, CLASSES]), mask=g < C)
    tl.store(n_iter_ptr + g, tl.reshape(steps, [1, CLASSES]), mask=g < C)
    tl.store(f_ptr + (g * k + i), tl.reshape(phi, [K2, CLASSES]), mask=(g < C) & (i < k))
    tl.store(g_ptr + (g * M + j), tl.reshape(psi, [M2, CLASSES]), mask=(g < C) & (j < M))


@triton.jit(do_not_specialize=["groups", "C", "N", "M", "by_M", "k", "max_iter"])
def _spa_scores_kernel(
    patches_ptr, tokens_ptr, inv_patches_ptr, inv_tokens_ptr,
    by_patches_ptr, by_tokens_ptr, by_inv_patches_ptr, by_inv_tokens_ptr,
    score_ptr, indices_ptr, f_ptr, g_ptr, n_iter_ptr, groups, C, N, M, by_M, k, D, by_D,
    to_log2, from_log2, max_iter, tol,
    VALUE: tl.constexpr, REDUCE: tl.constexpr, SCALE: tl.constexpr, BY_SCALE: tl.constexpr,
    CLASSES: tl.constexpr, ALIGNED: tl.constexpr, N2: tl.constexpr, K2: tl.constexpr, M2: tl.constexpr,
    BY_M2: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """score = <P, S> or the transport's value: S the cosines of the k patches selected by `by_*` features.

    A program owns an image and CLASSES classes. It selects in registers as `_topk_patches_kernel` does, then
    takes ALIGNED classes at a time: their indices come back from the output, the kept rows from L2, and
    similarities and transport stay in registers.
    """
    program = tl.program_id(0).to(tl.int64)
    b = program // groups
    c = program % groups * CLASSES
    keys = select(
        by_patches_ptr + b * N * by_D, by_inv_patches_ptr + b * N2, by_tokens_ptr + c * by_M * by_D,
        by_inv_tokens_ptr + c * BY_M2, N, by_M, by_D,
        REDUCE, BY_SCALE, CLASSES, N2, K2, BY_M2, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    g = tl.arange(0, CLASSES)[:, None]
    i = tl.arange(0, K2)[None, :]
    tl.store(
        indices_ptr + (b * C + c) * k + (g * k + i),
        unpack(keys, N2)[1].to(tl.int64),
        mask=(c + g < C) & (i < k),
    )
    tl.debug_barrier()
    for first in range(0, CLASSES, ALIGNED):
        here = c + first
        pair = b * C + here
        _score_kept(
            patches_ptr + b * N * D, inv_patches_ptr + b * N2, tokens_ptr + here * M * D,
            inv_tokens_ptr + here * M2, indices_ptr + pair * k, score_ptr + pair, f_ptr + pair * k,
            g_ptr + pair * M, n_iter_ptr + pair, C - here, M, k, D, to_log2, from_log2, max_iter, tol,
            VALUE, SCALE, ALIGNED, K2, M2, BLOCK_D // 2 if BLOCK_D > 16 else 16,
        )  # fmt: skip


def spa_scores_fwd(
    patches: torch.Tensor,
    tokens: torch.Tensor,
    select_patches: torch.Tensor | None,
    select_tokens: torch.Tensor | None,
    patch_mask: torch.Tensor | None,
    token_mask: torch.Tensor | None,
    select_token_mask: torch.Tensor | None,
    k: int,
    eps: float,
    max_iter: int,
    tol: float,
    reduce: str,
    class_conditional: bool,
    value: bool,
    config: PatchConfig | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Select k patches per image and class and align them with the class's tokens.

    Args:
        patches, tokens: [B, N, D] and [C, M, D] as `topk_patches_fwd` takes them, k and M <= 256.
        select_patches, select_tokens: [B, N, D'], [C, M', D'] to select by instead; both or neither.
        select_token_mask: bool [C, M'], for these; the other masks, reduce, class_conditional: as there.
        eps, max_iter, tol: as in `sinkhorn_fwd`, the cost being 1 - cos; weights are uniform.
        value: score is the regularised value of the transport instead of <P, cos>.
        config: launch geometry; None takes the default for N, k, M and the dtype. One launch does all where
            `aligned` is positive, every class chooses by itself and eps is in the range of the fused kernel
            (MIN_FUSED_EPS to MAX_FUSED_EPS); else one selects, one writes the kept cosines
            [B * C, k, M] and one solves.

    Returns:
        score [B, C], indices int64 [B, C, k], f [B, C, k], g [B, C, M], n_iter int32 [B, C].
    """
    one_space = select_patches is None or select_tokens is None
    if one_space:
        select_patches, select_tokens, select_token_mask = patches, tokens, token_mask
    (B, N, D), (C, M, _), (_, by_M, by_D) = patches.shape, tokens.shape, select_tokens.shape
    config = config or default_scores(
        N, k, M, by_M, max(patches.element_size(), select_patches.element_size())
    )
    fits = MIN_FUSED_EPS <= eps <= MAX_FUSED_EPS
    if not (config.aligned and fits and class_conditional):
        indices = topk_patches_fwd(
            select_patches, select_tokens, patch_mask, select_token_mask, k, reduce, class_conditional
        )[1]
        sim, a, b = kept_similarity(patches, tokens, indices, patch_mask, token_mask)
        score, f, g, n_iter, _ = sinkhorn_fwd(sim, a, b, eps, max_iter, tol, value, similarity=True)
        return score.view(B, C), indices, f.view(B, C, k), g.view(B, C, M), n_iter.view(B, C)
    N2, M2, by_M2 = (next_power_of_2(n) for n in (N, M, by_M))
    groups = triton.cdiv(C, config.classes)
    padded = groups * config.classes
    inverse = by_inverse = (
        inverse_norms(patches, patch_mask, B, N2),
        inverse_norms(tokens, token_mask, padded, M2),
    )
    if not one_space:
        by_inverse = (
            inverse_norms(select_patches, patch_mask, B, N2),
            inverse_norms(select_tokens, select_token_mask, padded, by_M2),
        )
    score = torch.empty(B, C, dtype=torch.float32, device=patches.device)
    indices = torch.empty(B, C, k, dtype=torch.int64, device=patches.device)
    f = torch.empty(B, C, k, dtype=torch.float32, device=patches.device)
    g = torch.empty(B, C, M, dtype=torch.float32, device=patches.device)
    n_iter = torch.empty(B, C, dtype=torch.int32, device=patches.device)
    with torch.cuda.device_of(patches):
        _spa_scores_kernel[(B * groups,)](
            patches, tokens, *inverse, select_patches, select_tokens, *by_inverse, score, indices, f, g,
            n_iter, groups, C, N, M, by_M, k, D, by_D,
            math.log2(math.e) / eps, math.log(2) * eps, max_iter, tol if tol > 0 else -1.0,
            VALUE=value, REDUCE=reduce, SCALE=patches.dtype == torch.float32,
            BY_SCALE=select_patches.dtype == torch.float32, CLASSES=config.classes, ALIGNED=config.aligned,
            N2=N2, K2=kept_places(k, N), M2=M2, BY_M2=by_M2, BLOCK_N=min(config.block_n, N2),
            BLOCK_D=config.block_d, num_warps=config.num_warps, num_stages=config.num_stages,
            maxnreg=MAX_REGISTERS,
        )  # fmt: skip
    return score, indices, f, g, n_iter
