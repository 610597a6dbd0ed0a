"""Cosine similarities of all patches, or of selected ones, to the tokens of every class.

    sim_{b,c,n,j} = <p_bn, s_cj> / (|p_bn| |s_cj|)

A vector of norm 0 and a masked patch or token count as the zero vector: similarity 0, gradient 0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

# Elements held at once: of all similarities (4 MiB in fp32, which stays in the last-level cache), of those of
# kept patches, which a solver copies a few times, and of gathered features (1 MiB).
BLOCK = 1 << 20
_SIM_BLOCK = 1 << 19
_KEPT_BLOCK = 1 << 18


def selected_sim_fwd(
    patches: Tensor, tokens: Tensor, indices: Tensor, patch_mask: Tensor | None, token_mask: Tensor | None
) -> Tensor:
    """Similarities [B, C, K, M] of the patches `indices` [B, C, K] to all tokens of the class."""
    (C, M, _), (B, _, K) = tokens.shape, indices.shape
    u_tokens, _ = unit_rows(tokens, token_mask)
    sim = u_tokens.new_empty(B, C, K, M)
    for images, class_blocks in kept_blocks(patches, C, K, M):
        u, _ = unit_rows(patches[images], part(patch_mask, images))
        for classes in class_blocks:
            sim[images, classes] = kept_similarity(u, u_tokens[classes], indices[images, classes])
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

    def given(images: slice, classes: slice, sim: Tensor) -> Tensor:
        return grad_sim[images, classes]

    return similarity_bwd(given, patches, tokens, indices, patch_mask, token_mask, need_patches, need_tokens)


def similarity_bwd(
    grad_of: Callable[[slice, slice, Tensor], Tensor],
    patches: Tensor,
    tokens: Tensor,
    indices: Tensor,
    patch_mask: Tensor | None,
    token_mask: Tensor | None,
    need_patches: bool,
    need_tokens: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of patches and tokens, size 0 where not needed.

    `grad_of(images, classes, sim)`: gradient [b, c, K, M] of the selected similarities `sim` of a block.
    """
    (C, M, D), K = tokens.shape, indices.shape[2]
    u_tokens, inv_tokens = unit_rows(tokens, token_mask)
    d_patches = patches.new_empty(patches.shape if need_patches else (0,))
    d_u_tokens = torch.zeros_like(u_tokens)
    for images, class_blocks in kept_blocks(patches, C, K, M):
        u, inv = unit_rows(patches[images], part(patch_mask, images))
        d_u = torch.zeros_like(u)
        for classes in class_blocks:
            index = indices[images, classes]
            sim = kept_similarity(u, u_tokens[classes], index)
            grad = grad_of(images, classes, sim).transpose(0, 1).reshape(index.shape[1], -1, M)
            for few, rows, kept in _kept(u, index):
                if need_patches:
                    d_kept = torch.bmm(grad[few], u_tokens[classes][few]).flatten(0, 1)
                    d_u.flatten(0, 1).scatter_add_(0, rows.reshape(-1, 1).expand(-1, D), d_kept)
                if need_tokens:
                    d_u_tokens[classes][few].baddbmm_(grad[few].mT, kept)
        if need_patches:
            d_patches[images] = _unit_rows_bwd(d_u, u, inv).to(patches.dtype)
    if not need_tokens:
        return d_patches, tokens.new_empty(0)
    return d_patches, _unit_rows_bwd(d_u_tokens, u_tokens, inv_tokens).to(tokens.dtype)


def similarity(u_tokens: Tensor, u: Tensor) -> Tensor:
    """[C, M, B, N]: one GEMM, and the reduction over M then runs along whole rows of patches."""
    (C, M, D), (B, N, _) = u_tokens.shape, u.shape
    return (u_tokens.reshape(C * M, D) @ u.reshape(B * N, D).T).view(C, M, B, N)


def kept_similarity(u: Tensor, u_tokens: Tensor, indices: Tensor) -> Tensor:
    """[b, c, K, M] of unit patches u [b, N, D] at indices [b, c, K] and unit tokens [c, M, D]."""
    (b, c, K), M = indices.shape, u_tokens.shape[1]
    sim = u.new_empty(b, c, K, M)
    for few, _, kept in _kept(u, indices):
        sim[:, few] = torch.bmm(kept, u_tokens[few].mT).view(-1, b, K, M).transpose(0, 1)
    return sim


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


def first_topk(r: Tensor, k: int) -> Tensor:
    """Indices of the k largest of r [..., N], falling, equal values by lowest index; NaN is largest."""
    if r.dtype == torch.float64:
        return r.sort(dim=-1, descending=True, stable=True).indices[..., :k]
    # An integer key that orders like the float (adding 0 makes -0 equal to +0) with the index below it: keys
    # are distinct, so any top-k is exact.
    bits = (r.nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf) + 0.0).view(torch.int32)
    order = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long() << 32
    return (order | torch.arange(r.shape[-1] - 1, -1, -1, device=r.device)).topk(k).indices


def blocks(B: int, C: int, pair: int, limit: int) -> Iterator[tuple[slice, list[slice]]]:
    """Blocks of images and classes, one pair or more, of at most `limit` elements at `pair` elements each."""
    classes = min(max(C, 1), max(1, limit // max(pair, 1)))
    images = max(1, limit // max(pair * classes, 1))
    return ((block, _split(C, classes)) for block in _split(B, images))


def kept_blocks(patches: Tensor, C: int, K: int, M: int) -> Iterator[tuple[slice, list[slice]]]:
    """Blocks of at most _SIM_BLOCK similarities of kept patches, whose images hold at most BLOCK features."""
    B, N, D = patches.shape
    images = min(max(B, 1), max(1, BLOCK // max(N * D, 1)), max(1, _SIM_BLOCK // max(K * M, 1)))
    classes = max(1, _SIM_BLOCK // max(images * K * M, 1))
    return ((block, _split(C, classes)) for block in _split(B, images))


def part(x: Tensor | None, rows: slice) -> Tensor | None:
    return None if x is None else x[rows]


def _kept(u: Tensor, indices: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Classes, rows [c, b K] of flat u [b N, D] that indices [b, c, K] name, and those rows [c, b K, D].

    As many classes at a time as stay in the level-2 cache: gathering K of N rows class by class takes a third
    of the GEMM over all N at K = 16, N = 196, M = 6.
    """
    (b, c, K), (_, N, D) = indices.shape, u.shape
    start = torch.arange(b, device=u.device)[:, None, None] * N
    rows = (indices + start).transpose(0, 1).reshape(c, b * K)
    for few in _split(c, max(1, _KEPT_BLOCK // max(b * K * D, 1))):
        yield few, rows[few], u.flatten(0, 1).index_select(0, rows[few].flatten()).view(*rows[few].shape, D)


def _split(size: int, step: int) -> list[slice]:
    return [slice(i, min(i + step, size)) for i in range(0, size, step)]
