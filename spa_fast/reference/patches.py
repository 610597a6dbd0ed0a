"""Patch selection by semantic tokens and the cosine similarity of what was selected.

    sim_{b,c,n,j} = <p_bn, s_cj> / (|p_bn| |s_cj|),    r_{b,c,n} = reduce_j sim_{b,c,n,j}
    I_{b,c} = the k patches of largest r, ties by lowest index

A vector of norm 0 and a masked patch or token count as the zero vector: similarity 0, gradient 0. Masked
tokens take no part in the reduction; masked patches are chosen only after all others, in order of index.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

SOFTMAX_TEMPERATURE = 0.1
"""T of reduce="softmax": r = sum_j softmax_j(sim_j / T) sim_j."""

# Elements of the similarity held at once: 8 MiB in fp32, which stays in the last-level cache.
_BLOCK = 1 << 21
# Elements of gathered features held at once: 1 MiB in fp32.
_KEPT_BLOCK = 1 << 18


def topk_patches_fwd(
    patches: Tensor,
    tokens: Tensor,
    patch_mask: Tensor | None,
    token_mask: Tensor | None,
    k: int,
    reduce: str,
    class_conditional: bool,
) -> tuple[Tensor, Tensor]:
    """Select k patches [B, N, D] per image and class by tokens [C, M, D].

    Returns:
        Similarities [B, C, k, M] of the chosen patches and indices int64 [B, C, k] in order of falling r.
    """
    (B, N, _), (C, M, _) = patches.shape, tokens.shape
    u_tokens, _ = unit_rows(tokens, token_mask)
    indices = torch.empty(B, C, k, dtype=torch.int64, device=patches.device)
    sim = u_tokens.new_empty(B, C, k, M)
    token_mask = None if token_mask is None else token_mask[:, :, None, None]
    for images, class_blocks in _blocks(B, C, N, M):
        u, _ = unit_rows(patches[images], None if patch_mask is None else patch_mask[images])
        hidden = None if patch_mask is None else ~patch_mask[images]
        best = u.new_full((u.shape[0], N), -torch.inf)
        for classes in class_blocks:
            s = _similarity(u_tokens[classes], u)
            r = relevance(s, None if token_mask is None else token_mask[classes], reduce, dim=1)
            if not class_conditional:
                best = torch.maximum(best, r.amax(0))
                continue
            chosen = _first_topk(r if hidden is None else r.masked_fill_(hidden, -torch.inf), k)
            indices[images, classes] = chosen.transpose(0, 1)
            sim[images, classes] = _pick(s, chosen).permute(2, 0, 3, 1)
        if not class_conditional:
            chosen = _first_topk(best if hidden is None else best.masked_fill_(hidden, -torch.inf), k)
            indices[images] = chosen[:, None]
            kept = u.gather(1, chosen[..., None].expand(-1, -1, u.shape[2]))
            sim[images] = _similarity(u_tokens, kept).permute(2, 0, 3, 1)
    return sim, indices


def selected_sim_fwd(
    patches: Tensor, tokens: Tensor, indices: Tensor, patch_mask: Tensor | None, token_mask: Tensor | None
) -> Tensor:
    """Similarities [B, C, K, M] of the patches `indices` [B, C, K] to all tokens of the class."""
    (B, _, D), (C, M, _), K = patches.shape, tokens.shape, indices.shape[2]
    u_tokens, _ = unit_rows(tokens, token_mask)
    sim = u_tokens.new_empty(B, C, K, M)
    for images, class_blocks in _kept_blocks(patches, C, K):
        u, _ = unit_rows(patches[images], None if patch_mask is None else patch_mask[images])
        for classes in class_blocks:
            rows = _rows(indices[images, classes], u)
            kept = u.view(-1, D).index_select(0, rows.flatten()).view(*rows.shape, D)
            s = torch.bmm(kept, u_tokens[classes].mT)
            sim[images, classes] = s.view(-1, u.shape[0], K, M).transpose(0, 1)
    return sim


def selected_sim_bwd(
    grad_sim: Tensor,
    patches: Tensor,
    tokens: Tensor,
    indices: Tensor,
    patch_mask: Tensor | None,
    token_mask: Tensor | None,
    need_patches: bool,
    need_tokens: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of `selected_sim_fwd` with respect to patches and tokens; an unneeded one has size 0."""
    (_, _, D), (C, M, _), K = patches.shape, tokens.shape, indices.shape[2]
    u_tokens, inv_tokens = unit_rows(tokens, token_mask)
    d_patches = patches.new_empty(patches.shape if need_patches else (0,))
    d_u_tokens = u_tokens.new_zeros(u_tokens.shape)
    for images, class_blocks in _kept_blocks(patches, C, K):
        u, inv = unit_rows(patches[images], None if patch_mask is None else patch_mask[images])
        d_u = u.new_zeros(u.shape)
        for classes in class_blocks:
            rows = _rows(indices[images, classes], u)
            grad = grad_sim[images, classes].transpose(0, 1).reshape(*rows.shape, M)
            if need_patches:
                d_kept = torch.bmm(grad, u_tokens[classes]).view(-1, D)
                d_u.view(-1, D).scatter_add_(0, rows.reshape(-1, 1).expand(-1, D), d_kept)
            if need_tokens:
                kept = u.view(-1, D).index_select(0, rows.flatten()).view(*rows.shape, D)
                d_u_tokens[classes].baddbmm_(grad.mT, kept)
        if need_patches:
            d_patches[images] = _unit_rows_bwd(d_u, u, inv).to(patches.dtype)
    if not need_tokens:
        return d_patches, tokens.new_empty(0)
    return d_patches, _unit_rows_bwd(d_u_tokens, u_tokens, inv_tokens).to(tokens.dtype)


def relevance(sim: Tensor, token_mask: Tensor | None, reduce: str, dim: int) -> Tensor:
    """Reduce similarities over tokens: "max" | "mean" | "softmax" (see SOFTMAX_TEMPERATURE).

    `token_mask` broadcasts against `sim`. A class without tokens has r = 0 for "mean" and "softmax" and the
    most negative finite number for "max", so that its patches still come before masked ones.
    """
    if reduce == "mean":
        # Masked similarities are 0 already.
        return sim.mean(dim) if token_mask is None else sim.sum(dim) / token_mask.sum(dim).clamp(min=1)
    hidden = sim if token_mask is None else sim.masked_fill(~token_mask, torch.finfo(sim.dtype).min)
    if reduce == "max":
        return hidden.amax(dim)
    return ((hidden / SOFTMAX_TEMPERATURE).softmax(dim) * sim).sum(dim)


def unit_rows(x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """x [..., D] at norm 1 in the accumulate dtype and 1/|x| [..., 1]; both 0 where |x| = 0 or masked."""
    x = (x if x.dtype == torch.float64 else x.float()).contiguous()
    # Squares of 1e-30 or 1e30 do not fit fp32.
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float64)
    inverse = norm.reciprocal().masked_fill(norm < torch.finfo(x.dtype).tiny, 0.0).to(x.dtype)
    unit = x * inverse
    if mask is not None:
        unit.masked_fill_(~mask[..., None], 0.0)
        inverse.masked_fill_(~mask[..., None], 0.0)
    return unit, inverse


def _unit_rows_bwd(grad: Tensor, unit: Tensor, inverse: Tensor) -> Tensor:
    """(grad - unit <grad, unit>) / |x|, in place of grad."""
    along = (grad * unit).sum(-1, keepdim=True)
    return grad.addcmul_(unit, along, value=-1).mul_(inverse)


def _similarity(u_tokens: Tensor, u: Tensor) -> Tensor:
    """[C, M, B, N]: one GEMM, and the reduction over M then runs along whole rows of patches."""
    (C, M, D), (B, N, _) = u_tokens.shape, u.shape
    return (u_tokens.reshape(C * M, D) @ u.reshape(B * N, D).T).view(C, M, B, N)


def _pick(sim: Tensor, chosen: Tensor) -> Tensor:
    """[C, M, B, K] from sim [C, M, B, N] by chosen [C, B, K]."""
    return sim.gather(-1, chosen[:, None].expand(-1, sim.shape[1], -1, -1))


def _first_topk(r: Tensor, k: int) -> Tensor:
    """Indices of the k largest of r [..., N], falling, equal values by lowest index; NaN is largest."""
    if r.dtype == torch.float64:
        return r.sort(dim=-1, descending=True, stable=True).indices[..., :k]
    # An integer key that orders like the float (adding 0 makes -0 equal to +0) with the index below it: keys
    # are distinct, so any top-k is exact.
    bits = (r.nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf) + 0.0).view(torch.int32)
    order = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long() << 32
    return (order | torch.arange(r.shape[-1] - 1, -1, -1, device=r.device)).topk(k).indices


def _blocks(B: int, C: int, N: int, M: int) -> Iterator[tuple[slice, list[slice]]]:
    """Blocks of images and classes of at most _BLOCK similarities, but at least one pair."""
    classes = min(max(C, 1), max(1, _BLOCK // max(N * M, 1)))
    images = max(1, _BLOCK // max(N * M * classes, 1))
    return ((block, _split(C, classes)) for block in _split(B, images))


def _kept_blocks(patches: Tensor, C: int, K: int) -> Iterator[tuple[slice, list[slice]]]:
    """Blocks whose gathered rows [c, b K, D] stay in the level-2 cache.

    Gathering K of N rows class by class takes a third of the GEMM over all N at K = 16, N = 196, M = 6.
    """
    B, N, D = patches.shape
    images = min(max(B, 1), max(1, _BLOCK // max(N * D, 1)), max(1, _KEPT_BLOCK // max(K * D, 1)))
    classes = max(1, _KEPT_BLOCK // max(images * K * D, 1))
    return ((block, _split(C, classes)) for block in _split(B, images))


def _split(size: int, step: int) -> list[slice]:
    return [slice(i, min(i + step, size)) for i in range(0, size, step)]


def _rows(indices: Tensor, u: Tensor) -> Tensor:
    """indices [b, c, K] into u [b, N, D] as rows [c, b K] of its flat form [b N, D]."""
    b, c, K = indices.shape
    start = torch.arange(b, device=u.device)[:, None, None] * u.shape[1]
    return (indices + start).transpose(0, 1).reshape(c, b * K)
