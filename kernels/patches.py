"""Patches selected by the semantic tokens of every class, without their similarities in memory."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ._tiles import MAX_REGISTERS, PatchConfig, default_patches, next_power_of_2
from .patches_cosine import (
    _LOWEST,
    cosines,
    inverse_norms,
    kept_places,
    ordered,
    relevance,
    selection_keys,
    unpack,
)


@triton.jit
def select(
    patches_ptr, inv_patches_ptr, tokens_ptr, inv_tokens_ptr, N, M, D,
    REDUCE: tl.constexpr, SCALE: tl.constexpr, CLASSES: tl.constexpr, N2: tl.constexpr, K2: tl.constexpr,
    M2: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Keys [CLASSES, K2] of the K2 most relevant patches of one image, falling."""
    # Below every key: what lies past the last block.
    keys = tl.full([CLASSES, N2 // BLOCK_N, BLOCK_N], -(2**63), tl.int64)
    block = tl.arange(0, N2 // BLOCK_N)[None, :, None]
    for start in range(0, N, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        sim = cosines(
            patches_ptr, inv_patches_ptr, n, tokens_ptr, inv_tokens_ptr, M, D,
            CLASSES * M2, M2, BLOCK_D, SCALE,
        )  # fmt: skip
        r, first = relevance(sim, REDUCE, CLASSES, M2)
        masked = tl.load(inv_patches_ptr + n)[:, None] == -1
        r = tl.where(masked, float("-inf"), tl.where(r == float("-inf"), 0.0, r))
        new = tl.trans(selection_keys(ordered(r), n[:, None], first, N2))
        keys = tl.where(block == start // BLOCK_N, new[:, None, :], keys)
    return tl.topk(tl.reshape(keys, [CLASSES, N2]), K2)


@triton.jit(do_not_specialize=["groups", "C", "N", "M", "k"])
def _topk_patches_kernel(
    patches_ptr, tokens_ptr, inv_patches_ptr, inv_tokens_ptr, scores_ptr, indices_ptr, argmax_ptr,
    groups, C, N, M, k, D,
    REDUCE: tl.constexpr, SCALE: tl.constexpr, CLASSES: tl.constexpr, N2: tl.constexpr, K2: tl.constexpr,
    M2: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The k largest r_n = reduce_j cos(p_n, s_j), their patches and tokens.

    A program owns an image and CLASSES classes. A block [BLOCK_N, CLASSES * M2] of similarities stays in
    registers; of each patch and class one key (r, patch, token) is left, and the keys are sorted there.
    """
    program = tl.program_id(0).to(tl.int64)
    b = program // groups
    c = program % groups * CLASSES
    keys = select(
        patches_ptr + b * N * D, inv_patches_ptr + b * N2, tokens_ptr + c * M * D, inv_tokens_ptr + c * M2,
        N, M, D, REDUCE, SCALE, CLASSES, N2, K2, M2, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    r, n, first = unpack(keys, N2)
    g = tl.arange(0, CLASSES)[:, None]
    i = tl.arange(0, K2)[None, :]
    at = (b * C + c) * k + (g * k + i)
    inside = (c + g < C) & (i < k)
    tl.store(scores_ptr + at, r, mask=inside)
    tl.store(indices_ptr + at, n.to(tl.int64), mask=inside)
    tl.store(argmax_ptr + at, first, mask=inside)


@triton.jit(do_not_specialize=["groups", "N", "M"])
def _best_relevance_kernel(
    patches_ptr, tokens_ptr, inv_patches_ptr, inv_tokens_ptr, best_ptr, groups, N, M, D,
    REDUCE: tl.constexpr, SCALE: tl.constexpr, CLASSES: tl.constexpr, N2: tl.constexpr, M2: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """best_bn = max_c r_bcn as an ordered integer, whose maximum no order of programs changes.

    A program owns an image and CLASSES classes. A class without tokens has no say.
    """
    program = tl.program_id(0).to(tl.int64)
    b = program // groups
    c = program % groups * CLASSES
    for start in range(0, N, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        sim = cosines(
            patches_ptr + b * N * D, inv_patches_ptr + b * N2, n, tokens_ptr + c * M * D,
            inv_tokens_ptr + c * M2, M, D, CLASSES * M2, M2, BLOCK_D, SCALE,
        )  # fmt: skip
        r, _ = relevance(sim, REDUCE, CLASSES, M2)
        best = tl.max(ordered(tl.where(r == float("-inf"), _LOWEST, r)), 1)
        tl.atomic_max(best_ptr + b * N2 + n, best, sem="relaxed")


@triton.jit(do_not_specialize=["k"])
def _select_best_kernel(
    best_ptr, inv_patches_ptr, indices_ptr, k, N2: tl.constexpr, K2: tl.constexpr
):  # fmt: skip
    """Patches of the k largest best_n. A program owns an image and all its keys."""
    b = tl.program_id(0).to(tl.int64)
    n = tl.arange(0, N2)[None, :]
    i = tl.arange(0, K2)[None, :]
    masked = tl.load(inv_patches_ptr + b * N2 + n) == -1
    # ordered(-inf)
    best = tl.where(masked, -2139095041, tl.load(best_ptr + b * N2 + n))
    keys = tl.topk(selection_keys(best, n, 0, N2), K2)
    tl.store(indices_ptr + b * k + i, unpack(keys, N2)[1].to(tl.int64), mask=i < k)


@triton.jit(do_not_specialize=["groups", "C", "N", "M", "k"])
def _relevance_kernel(
    patches_ptr, tokens_ptr, inv_patches_ptr, inv_tokens_ptr, indices_ptr, scores_ptr, argmax_ptr,
    groups, C, N, M, k, D,
    REDUCE: tl.constexpr, SCALE: tl.constexpr, CLASSES: tl.constexpr, N2: tl.constexpr, M2: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """r of the patches that indices [B, k] name, for all classes. A program owns an image and CLASSES."""
    program = tl.program_id(0).to(tl.int64)
    b = program // groups
    c = program % groups * CLASSES
    g = tl.arange(0, CLASSES)[None, :]
    for start in range(0, k, BLOCK_N):
        i = start + tl.arange(0, BLOCK_N)
        n = tl.load(indices_ptr + b * k + i, mask=i < k, other=0).to(tl.int32)
        sim = cosines(
            patches_ptr + b * N * D, inv_patches_ptr + b * N2, n, tokens_ptr + c * M * D,
            inv_tokens_ptr + c * M2, M, D, CLASSES * M2, M2, BLOCK_D, SCALE,
        )  # fmt: skip
        r, first = relevance(sim, REDUCE, CLASSES, M2)
        r = tl.where(r == float("-inf"), 0.0, tl.where(r == float("inf"), float("nan"), r))
        at = (b * C + c) * k + (g * k + i[:, None])
        inside = (c + g < C) & (i < k)[:, None]
        tl.store(scores_ptr + at, r, mask=inside)
        tl.store(argmax_ptr + at, first, mask=inside)


def topk_patches_fwd(
    patches: torch.Tensor,
    tokens: torch.Tensor,
    patch_mask: torch.Tensor | None,
    token_mask: torch.Tensor | None,
    k: int,
    reduce: str,
    class_conditional: bool,
    config: PatchConfig | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Select k patches per image and class by r_bcn = reduce_j cos(p_bn, s_cj).

    Args:
        patches, tokens: [B, N, D] and [C, M, D], fp16, bf16 or fp32, contiguous; B, C >= 1, N <= 1024.
        patch_mask, token_mask: bool [B, N], [C, M], True takes part.
        reduce: "max", "mean" or "softmax" (temperature 0.1).
        class_conditional: False keeps the same patches for all classes, by max_c r.
        config: launch geometry; None takes the default for N, k, M and the dtype.

    Returns:
        r [B, C, k] in fp32, falling unless chosen over all classes; indices int64 and the first token that
        attains the maximum int32, both [B, C, k]. Masked patches come last, in order of index, with r = 0.
    """
    (B, N, D), (C, M, _) = patches.shape, tokens.shape
    config = config or default_patches(N, k, M, patches.element_size())
    N2, K2, M2 = next_power_of_2(N), kept_places(k, N), next_power_of_2(M)
    groups = triton.cdiv(C, config.classes)
    inverse = inverse_norms(patches, patch_mask, B, N2)
    features = patches, tokens, inverse, inverse_norms(tokens, token_mask, groups * config.classes, M2)
    scores = torch.empty(B, C, k, dtype=torch.float32, device=patches.device)
    argmax = torch.empty(B, C, k, dtype=torch.int32, device=patches.device)
    indices = torch.empty(B, C if class_conditional else 1, k, dtype=torch.int64, device=patches.device)
    sizes = {"REDUCE": reduce, "SCALE": patches.dtype == torch.float32, "CLASSES": config.classes, "N2": N2}
    sizes |= {"M2": M2, "BLOCK_N": min(config.block_n, N2), "BLOCK_D": config.block_d}
    launch = {"num_warps": config.num_warps, "num_stages": config.num_stages, "maxnreg": MAX_REGISTERS}
    with torch.cuda.device_of(patches):
        if class_conditional:
            _topk_patches_kernel[(B * groups,)](
                *features, scores, indices, argmax, groups, C, N, M, k, D, K2=K2, **sizes, **launch
            )
            return scores, indices, argmax
        best = torch.full((B, N2), torch.iinfo(torch.int32).min, dtype=torch.int32, device=patches.device)
        _best_relevance_kernel[(B * groups,)](*features, best, groups, N, M, D, **sizes, **launch)
        _select_best_kernel[(B,)](best, inverse, indices, k, N2=N2, K2=K2, num_warps=4)
        _relevance_kernel[(B * groups,)](
            *features, indices, scores, argmax, groups, C, N, M, k, D, **sizes, **launch
        )
    return scores, indices.expand(B, C, k).contiguous(), argmax
