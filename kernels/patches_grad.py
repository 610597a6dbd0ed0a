"""Gradients of cosines of kept patches: scattered to patches and tokens without atomics."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ._tiles import MAX_REGISTERS, default_grad, next_power_of_2
from .patches_cosine import inverse_norms
from .patches_kept import kept_similarity
from .sinkhorn_grad import sinkhorn_bwd


@triton.jit
def _unit_rows(x_ptr, row, inverse, d, D):
    """[rows, d] fp32 at norm 1; a zero or masked row, which may hold anything, is 0."""
    inverse = tl.where(inverse == -1, 0.0, inverse)[:, None]
    x = tl.load(x_ptr + (row[:, None] * D + d), mask=(inverse != 0) & (d < D), other=0.0)
    return x.to(tl.float32) * inverse


@triton.jit
def _product(x, y, acc, PRECISION: tl.constexpr):
    """acc + x y. For "tf32" x and y are rounded to nearest, as the hardware would cut their last 13 bits."""
    if PRECISION == "tf32":
        x = ((x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
        y = ((y.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
    return tl.dot(x, y, acc, input_precision=PRECISION)


@triton.jit(do_not_specialize=["blocks_n", "blocks_d", "C", "N", "M", "k"])
def _patch_grad_kernel(
    grad_ptr, tokens_ptr, inv_tokens_ptr, slots_ptr, out_ptr, blocks_n, blocks_d, C, N, M, k, D,
    PRECISION: tl.constexpr, CLASSES: tl.constexpr, M2: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """out_bn = sum_c sum_j grad_{b,c,i,j} s_cj / |s_cj|, i = slots_bcn the place of patch n, -1 if not kept.

    A program owns a block of an image's patches and of the features, and passes over all classes.
    """
    program = tl.program_id(0).to(tl.int64)
    b = program // (blocks_n * blocks_d)
    n = (program // blocks_d % blocks_n * BLOCK_N).to(tl.int32) + tl.arange(0, BLOCK_N)[:, None]
    d = (program % blocks_d * BLOCK_D).to(tl.int32) + tl.arange(0, BLOCK_D)[None, :]
    g = tl.arange(0, CLASSES * BLOCK_M) // BLOCK_M
    slots_ptr += b * C * N
    grad_ptr += b * C * k * M
    acc = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for c in range(0, C, CLASSES):
        for start in range(0, M, BLOCK_M):
            j = start + tl.arange(0, CLASSES * BLOCK_M) % BLOCK_M
            inside = (n < N) & ((c + g < C) & (j < M))[None, :]
            slot = tl.load(slots_ptr + (g[None, :] * N + n), mask=inside, other=-1).to(tl.int32)
            at = (g[None, :] * k + slot) * M + j[None, :]
            grad = tl.load(grad_ptr + at, mask=slot >= 0, other=0.0)
            inverse = tl.load(inv_tokens_ptr + g * M2 + j)
            token = _unit_rows(tokens_ptr, g * M + j, inverse, d, D)
            acc = _product(grad, token, acc, PRECISION)
        slots_ptr += CLASSES * N
        grad_ptr += CLASSES * k * M
        inv_tokens_ptr += CLASSES * M2
        tokens_ptr += CLASSES * M * D
    tl.store(out_ptr + b * N * D + (n * D + d), acc, mask=(n < N) & (d < D))


@triton.jit(do_not_specialize=["blocks_d", "rows", "C", "N", "M", "k"])
def _token_grad_kernel(
    grad_ptr, patches_ptr, inv_patches_ptr, indices_ptr, out_ptr, blocks_d, rows, C, N, M, k, D,
    PRECISION: tl.constexpr, N2: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """out_cj = sum_b sum_i grad_{b,c,i,j} p_bn / |p_bn|, n the patch kept in place i.

    A program owns a block of a class's tokens and of the features, and passes over the kept patches of all
    images.
    """
    program = tl.program_id(0).to(tl.int64)
    c = program // blocks_d
    d = (program % blocks_d * BLOCK_D).to(tl.int32) + tl.arange(0, BLOCK_D)[None, :]
    first = tl.program_id(1) * BLOCK_M
    j = first + tl.arange(0, BLOCK_M)[None, :]
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for start in range(0, rows, BLOCK_N):
        row = start + tl.arange(0, BLOCK_N)
        b = (row // k).to(tl.int64)
        at = (b * C + c) * k + row % k
        n = tl.load(indices_ptr + at, mask=row < rows, other=0)
        inverse = tl.load(inv_patches_ptr + b * N2 + n, mask=row < rows, other=-1.0)
        patch = _unit_rows(patches_ptr, b * N + n, inverse, d, D)
        inside = (row < rows)[:, None] & (j < M)
        grad = tl.load(grad_ptr + at[:, None] * M + j, mask=inside, other=0.0)
        acc = _product(tl.trans(grad), patch, acc, PRECISION)
    j = first + tl.arange(0, BLOCK_M)[:, None]
    tl.store(out_ptr + c * M * D + (j * D + d), acc, mask=(j < M) & (d < D))


@triton.jit(do_not_specialize=["rows", "S"])
def _unit_grad_kernel(
    grad_ptr, x_ptr, inverse_ptr, out_ptr, rows, S, D,
    S2: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """out = (grad - u <grad, u>) / |x| of rows u = x / |x|, 0 for a zero or masked one.

    A program owns ROWS rows. grad and out may be the same.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inverse = tl.load(inverse_ptr + row // S * S2 + row % S, mask=row < rows, other=-1.0)
    use = ((inverse != 0) & (inverse != -1))[:, None]
    along = tl.zeros([ROWS, 1], tl.float32)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)[None, :]
        grad = tl.load(grad_ptr + (row[:, None] * D + d), mask=use & (d < D), other=0.0)
        along += tl.sum(grad * _unit_rows(x_ptr, row, inverse, d, D), 1, keep_dims=True)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)[None, :]
        at = row[:, None] * D + d
        grad = tl.load(grad_ptr + at, mask=use & (d < D), other=0.0)
        grad = (grad - _unit_rows(x_ptr, row, inverse, d, D) * along) * inverse[:, None]
        inside = (row < rows)[:, None] & (d < D)
        tl.store(out_ptr + at, tl.where(use, grad, 0.0).to(out_ptr.dtype.element_ty), mask=inside)


def _unit_grad(grad: torch.Tensor, x: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
    (sets, S, D), rows = x.shape, 8
    out = grad if x.dtype == torch.float32 else torch.empty_like(x)
    _unit_grad_kernel[(triton.cdiv(sets * S, rows),)](
        grad, x, inverse, out, sets * S, S, D, S2=inverse.shape[1], ROWS=rows, BLOCK_D=256, num_warps=4
    )
    return out


def kept_bwd(
    grad: torch.Tensor,
    patches: torch.Tensor,
    tokens: torch.Tensor,
    indices: torch.Tensor,
    patch_mask: torch.Tensor | None,
    token_mask: torch.Tensor | None,
    need_patches: bool,
    need_tokens: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of patches and tokens for grad [B * C, k, M] fp32 of the kept patches' cosines; an unneeded
    one has size 0. Sums run in one order. Products of 16-bit features with grad are taken in TF32."""
    (B, N, D), (C, M, _), k = patches.shape, tokens.shape, indices.shape[2]
    N2, M2 = next_power_of_2(N), next_power_of_2(M)
    config = default_grad(M, patches.element_size())
    block_m, blocks_d = min(M2, config.columns), triton.cdiv(D, config.block_d)
    inv_patches = inverse_norms(patches, patch_mask, B, N2)
    inv_tokens = inverse_norms(tokens, token_mask, triton.cdiv(C, config.classes) * config.classes, M2)
    d_patches, d_tokens = patches.new_empty(0), tokens.new_empty(0)
    sizes = {"PRECISION": "ieee" if patches.dtype == torch.float32 else "tf32", "BLOCK_M": block_m}
    sizes |= {"BLOCK_N": config.block_n, "BLOCK_D": config.block_d}
    launch = {"num_warps": config.num_warps, "num_stages": config.num_stages, "maxnreg": MAX_REGISTERS}
    with torch.cuda.device_of(patches):
        if need_patches:
            place = torch.arange(k, dtype=torch.int16, device=patches.device).expand_as(indices)
            slots = torch.full((B, C, N), -1, dtype=torch.int16, device=patches.device)
            slots.scatter_(2, indices, place)
            d_patches = torch.empty(B, N, D, dtype=torch.float32, device=patches.device)
            blocks_n = triton.cdiv(N, config.block_n)
            _patch_grad_kernel[(B * blocks_n * blocks_d,)](
                grad, tokens, inv_tokens, slots, d_patches, blocks_n, blocks_d, C, N, M, k, D,
                CLASSES=config.classes, M2=M2, **sizes, **launch,
            )  # fmt: skip
            d_patches = _unit_grad(d_patches, patches, inv_patches)
        if need_tokens:
            d_tokens = torch.empty(C, M, D, dtype=torch.float32, device=patches.device)
            _token_grad_kernel[(C * blocks_d, triton.cdiv(M, block_m))](
                grad, patches, inv_patches, indices, d_tokens, blocks_d, B * k, C, N, M, k, D,
                N2=N2, **sizes, **launch,
            )  # fmt: skip
            d_tokens = _unit_grad(d_tokens, tokens, inv_tokens)
    return d_patches, d_tokens


def spa_scores_bwd(
    grad_score: torch.Tensor,
    patches: torch.Tensor,
    tokens: torch.Tensor,
    indices: torch.Tensor,
    patch_mask: torch.Tensor | None,
    token_mask: torch.Tensor | None,
    f: torch.Tensor,
    g: torch.Tensor,
    n_iter: torch.Tensor,
    eps: float,
    value: bool,
    mode: str,
    need_patches: bool,
    need_tokens: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of patches and tokens for the score that `spa_scores_fwd` returned, at fixed indices.

    Args:
        grad_score: [B, C] fp32; the others as given to and returned by `spa_scores_fwd`.
        mode: as in `sinkhorn_bwd`, which recomputes the plan.

    Returns:
        Gradients in the dtype of patches, an unneeded one of size 0. Deterministic. Takes twice the kept
        cosines [B, C, k, M] in fp32 beside it, and gradients in fp32 for 16-bit features.
    """
    sim, a, b = kept_similarity(patches, tokens, indices, patch_mask, token_mask)
    P, k, M = sim.shape
    grad = sinkhorn_bwd(
        grad_score.reshape(P).contiguous(),
        sim,
        a,
        b,
        f.view(P, k),
        g.view(P, M),
        n_iter.view(P),
        eps,
        value,
        mode,
        similarity=True,
    )
    return kept_bwd(grad, patches, tokens, indices, patch_mask, token_mask, need_patches, need_tokens)
