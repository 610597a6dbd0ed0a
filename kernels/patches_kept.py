"""Cosines of the patches that were kept for a class, in registers and in memory."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ._tiles import MAX_REGISTERS, default_kept, next_power_of_2
from .patches_cosine import inverse_norms


@triton.jit
def kept_cosines(
    patches_ptr, inv_patches_ptr, n, in_n, tokens_ptr, inv_tokens_ptr, j, M, D,
    M2: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, SCALE: tl.constexpr,
):  # fmt: skip
    """[classes, k, BLOCK_M] of patches n [classes, k] of one image and tokens from j on, 0 where a vector is
    zero or takes no part."""
    g = tl.arange(0, n.shape[0])[:, None]
    j += tl.arange(0, BLOCK_M)[None, :]
    inv_n = tl.load(inv_patches_ptr + n, mask=in_n, other=-1.0)
    inv_n = tl.where(inv_n == -1, 0.0, inv_n)[:, :, None]
    inv_row = tl.load(inv_tokens_ptr + (g * M2 + j))
    inv_row = tl.where(inv_row == -1, 0.0, inv_row)[:, :, None]
    row = (g * M + j)[:, :, None]
    n = n[:, :, None]
    d = tl.arange(0, BLOCK_D)[None, None, :]
    acc = tl.zeros([n.shape[0], n.shape[1], BLOCK_M], tl.float32)
    for start in tl.range(0, D, BLOCK_D, num_stages=2):
        p = tl.load(patches_ptr + (n * D + start + d), mask=(inv_n != 0) & (start + d < D), other=0.0)
        t = tl.load(tokens_ptr + (row * D + start + d), mask=(inv_row != 0) & (start + d < D), other=0.0)
        if SCALE:
            p *= inv_n
            t *= inv_row
        acc = tl.dot(p, tl.permute(t, (0, 2, 1)), acc, input_precision="ieee")
    return acc if SCALE else acc * inv_n * tl.permute(inv_row, (0, 2, 1))


@triton.jit(do_not_specialize=["groups", "C", "N", "M", "k"])
def _kept_similarity_kernel(
    patches_ptr, tokens_ptr, inv_patches_ptr, inv_tokens_ptr, indices_ptr, sim_ptr, groups, C, N, M, k, D,
    SCALE: tl.constexpr, CLASSES: tl.constexpr, N2: tl.constexpr, M2: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """sim [B, C, k, M] of kept patches. A program owns a block of it for CLASSES of an image."""
    program = tl.program_id(0).to(tl.int64)
    b = program // groups
    c = program % groups * CLASSES
    g = tl.arange(0, CLASSES)[:, None]
    first = tl.program_id(2) * BLOCK_M
    i = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    at = (b * C + c + g) * k + i
    inside = (c + g < C) & (i < k)
    n = tl.load(indices_ptr + at, mask=inside, other=0).to(tl.int32)
    sim = kept_cosines(
        patches_ptr + b * N * D, inv_patches_ptr + b * N2, n, inside, tokens_ptr + c * M * D,
        inv_tokens_ptr + c * M2, first, M, D, M2, BLOCK_M, BLOCK_D, SCALE,
    )  # fmt: skip
    j = first + tl.arange(0, BLOCK_M)[None, None, :]
    tl.store(sim_ptr + at[:, :, None] * M + j, sim, mask=inside[:, :, None] & (j < M))


def kept_similarity(
    patches: torch.Tensor,
    tokens: torch.Tensor,
    indices: torch.Tensor,
    patch_mask: torch.Tensor | None,
    token_mask: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Cosines of the patches that indices [B, C, k] name, [B * C, k, M] fp32, and the weights a [1 or B * C,
    k], b [1 or B * C, M], uniform over the unmasked."""
    (B, N, D), (C, M, _), k = patches.shape, tokens.shape, indices.shape[2]
    N2, M2 = next_power_of_2(N), next_power_of_2(M)
    config = default_kept(k, M, patches.element_size())
    groups, block_m = triton.cdiv(C, config.classes), min(M2, config.columns)
    inverse = inverse_norms(patches, patch_mask, B, N2)
    features = patches, tokens, inverse, inverse_norms(tokens, token_mask, groups * config.classes, M2)
    sim = torch.empty(B * C, k, M, dtype=torch.float32, device=patches.device)
    with torch.cuda.device_of(patches):
        _kept_similarity_kernel[(B * groups, triton.cdiv(k, config.block_n), triton.cdiv(M, block_m))](
            *features, indices, sim, groups, C, N, M, k, D, SCALE=patches.dtype == torch.float32,
            CLASSES=config.classes, N2=N2, M2=M2, BLOCK_N=config.block_n, BLOCK_M=block_m,
            BLOCK_D=config.block_d, num_warps=config.num_warps, num_stages=config.num_stages,
            maxnreg=MAX_REGISTERS,
        )  # fmt: skip
    a, b = sim.new_full((1, k), 1 / k), sim.new_full((1, M), 1 / M)
    if patch_mask is not None:
        on = patch_mask[:, None].expand(B, C, N).gather(2, indices).view(B * C, k).float()
        a = on / on.sum(-1, keepdim=True).clamp(min=1)
    if token_mask is not None:
        on = token_mask.expand(B, C, M).reshape(B * C, M).float()
        b = on / on.sum(-1, keepdim=True).clamp(min=1)
    return sim, a, b
