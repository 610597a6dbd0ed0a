"""Patch selection by semantic tokens, and transport between what was selected and the tokens.

    r_{b,c,n} = reduce_j sim_{b,c,n,j},    I_{b,c} = the k patches of largest r, ties by lowest index
    score_{b,c} = <P, S>,  S = sim_{b,c,I,:},  P the plan of cost 1 - S between uniform weights

Masked tokens take no part in the reduction; masked patches are chosen only after all others, in order of
index, and have weight 0. A class without any token is chosen for in order of index, scores 0 and has no say
in a choice over all classes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from spa_fast.reference.similarity import (
    BLOCK,
    blocks,
    first_topk,
    kept_blocks,
    kept_similarity,
    part,
    similarity,
    similarity_bwd,
    unit_rows,
)
from spa_fast.reference.sinkhorn import sinkhorn_bwd, sinkhorn_fwd

SOFTMAX_TEMPERATURE = 0.1
"""T of reduce="softmax": r = sum_j softmax_j(sim_j / T) sim_j."""


def topk_patches_fwd(
    patches: Tensor,
    tokens: Tensor,
    patch_mask: Tensor | None,
    token_mask: Tensor | None,
    k: int,
    reduce: str,
    class_conditional: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Select k patches [B, N, D] per image and class by tokens [C, M, D].

    Returns:
        Scores r [B, C, k] falling, indices int64 [B, C, k] and, for reduce "max", the first token that
        attains r, int32 [B, C, k]; zeros for the others.
    """
    (B, N, D), (C, M, _) = patches.shape, tokens.shape
    u_tokens, _ = unit_rows(tokens, token_mask)
    scores = u_tokens.new_empty(B, C, k)
    indices = torch.empty(B, C, k, dtype=torch.int64, device=patches.device)
    argmax = torch.zeros(B, C, k, dtype=torch.int32, device=patches.device)
    token_mask = None if token_mask is None else token_mask[:, :, None, None]
    for images, class_blocks in blocks(B, C, N * M, BLOCK):
        u, _ = unit_rows(patches[images], part(patch_mask, images))
        hidden = None if patch_mask is None else ~patch_mask[images]
        if not class_conditional:
            best = u.new_full((u.shape[0], N), torch.finfo(u.dtype).min)
            for classes in class_blocks:
                on = part(token_mask, classes)
                r = relevance(similarity(u_tokens[classes], u), on, reduce, dim=1)
                r = r if on is None else r.masked_fill(~on.any(1), torch.finfo(r.dtype).min)
                best = torch.maximum(best, r.amax(0))
            shared = first_topk(best if hidden is None else best.masked_fill_(hidden, -torch.inf), k)
            indices[images] = shared[:, None]
            u = u.gather(1, shared[..., None].expand(-1, -1, D))
        for classes in class_blocks:
            on = part(token_mask, classes)
            sim = similarity(u_tokens[classes], u)
            if class_conditional:
                r = relevance(sim, on, reduce, dim=1)
                chosen = first_topk(r if hidden is None else r.masked_fill_(hidden, -torch.inf), k)
                indices[images, classes] = chosen.transpose(0, 1)
                sim = sim.gather(-1, chosen[:, None].expand(-1, M, -1, -1))
            r = relevance(sim, on, reduce, dim=1)
            if reduce == "max":
                first = (sim if on is None else sim.masked_fill(~on, -torch.inf)).argmax(1, keepdim=True)
                argmax[images, classes] = first.squeeze(1).transpose(0, 1).int()
                r = sim.gather(1, first).squeeze(1)
            scores[images, classes] = r.transpose(0, 1)
    return scores, indices, argmax


def topk_patches_bwd(
    grad_scores: Tensor,
    patches: Tensor,
    tokens: Tensor,
    indices: Tensor,
    argmax: Tensor,
    patch_mask: Tensor | None,
    token_mask: Tensor | None,
    reduce: str,
    need_patches: bool,
    need_tokens: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of the scores at fixed indices and argmax; an unneeded one has size 0."""

    def grad_sim(images: slice, classes: slice, sim: Tensor) -> Tensor:
        grad = grad_scores[images, classes, :, None]
        if reduce == "max":
            return torch.zeros_like(sim).scatter_(-1, argmax[images, classes, :, None].long(), grad)
        on = None if token_mask is None else token_mask[classes, None]
        if reduce == "mean":
            return (grad / (sim.shape[-1] if on is None else on.sum(-1, True).clamp(min=1))).expand_as(sim)
        p = _softmax(sim, on, -1)
        return grad * p * (1 + (sim - (p * sim).sum(-1, keepdim=True)) / SOFTMAX_TEMPERATURE)

    return similarity_bwd(
        grad_sim, patches, tokens, indices, patch_mask, token_mask, need_patches, need_tokens
    )


def spa_scores_fwd(
    patches: Tensor,
    tokens: Tensor,
    select_patches: Tensor | None,
    select_tokens: Tensor | None,
    patch_mask: Tensor | None,
    token_mask: Tensor | None,
    select_token_mask: Tensor | None,
    k: int,
    eps: float,
    max_iter: int,
    tol: float,
    reduce: str,
    class_conditional: bool,
    value: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Select k patches by `select_*` (None: by `patches`, `tokens`) and align them with the class's tokens.

    Returns:
        score [B, C], <P, S> or with `value` <P, 1 - S> + eps KL(P | a b^T); indices int64 [B, C, k]; f
        [B, C, k], g [B, C, M] in units of cost; n_iter int32 [B, C].
    """
    (B, _, _), (C, M, _) = patches.shape, tokens.shape
    if select_patches is None or select_tokens is None:
        select_patches, select_tokens, select_token_mask = patches, tokens, token_mask
    _, indices, _ = topk_patches_fwd(
        select_patches, select_tokens, patch_mask, select_token_mask, k, reduce, class_conditional
    )
    u_tokens, _ = unit_rows(tokens, token_mask)
    score, f, g = u_tokens.new_empty(B, C), u_tokens.new_empty(B, C, k), u_tokens.new_empty(B, C, M)
    n_iter = torch.empty(B, C, dtype=torch.int32, device=patches.device)
    for images, class_blocks in kept_blocks(patches, C, k, M):
        u, _ = unit_rows(patches[images], part(patch_mask, images))
        for classes in class_blocks:
            here, index = (images, classes), indices[images, classes]
            sim = kept_similarity(u, u_tokens[classes], index).view(-1, k, M)
            a, b = _weights(index, M, part(patch_mask, images), part(token_mask, classes), sim)
            out = sinkhorn_fwd(sim, a, b, eps, max_iter, tol, value, similarity=True)
            score[here], f[here], g[here], n_iter[here] = (
                x.view_as(y[here]) for x, y in zip(out[:4], (score, f, g, n_iter), strict=True)
            )
    return score, indices, f, g, n_iter


def spa_scores_bwd(
    grad_score: Tensor,
    patches: Tensor,
    tokens: Tensor,
    indices: Tensor,
    patch_mask: Tensor | None,
    token_mask: Tensor | None,
    f: Tensor,
    g: Tensor,
    n_iter: Tensor,
    eps: float,
    value: bool,
    mode: str,
    need_patches: bool,
    need_tokens: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of the score at fixed indices, as `sinkhorn_bwd` names them; an unneeded one has size 0."""

    def grad_sim(images: slice, classes: slice, sim: Tensor) -> Tensor:
        K, M = sim.shape[2:]
        flat = sim.reshape(-1, K, M)
        a, b = _weights(
            indices[images, classes], M, part(patch_mask, images), part(token_mask, classes), flat
        )
        grad, phi, psi, steps = (x[images, classes].flatten(0, 1) for x in (grad_score, f, g, n_iter))
        out = sinkhorn_bwd(grad, flat, a, b, phi, psi, steps, eps, value, mode, similarity=True)
        return out.view_as(sim)

    return similarity_bwd(
        grad_sim, patches, tokens, indices, patch_mask, token_mask, need_patches, need_tokens
    )


def relevance(sim: Tensor, token_mask: Tensor | None, reduce: str, dim: int) -> Tensor:
    """Reduce similarities over tokens: "max" | "mean" | "softmax" (see SOFTMAX_TEMPERATURE).

    `token_mask` broadcasts against `sim`. A class without tokens has r = 0 for "mean" and "softmax" and the
    most negative finite number for "max", so that its patches still come before masked ones.
    """
    if reduce == "mean":
        # Masked similarities are 0 already.
        return sim.mean(dim) if token_mask is None else sim.sum(dim) / token_mask.sum(dim).clamp(min=1)
    if reduce == "softmax":
        return (_softmax(sim, token_mask, dim) * sim).sum(dim)
    return (sim if token_mask is None else sim.masked_fill(~token_mask, torch.finfo(sim.dtype).min)).amax(dim)


def _softmax(sim: Tensor, token_mask: Tensor | None, dim: int) -> Tensor:
    scaled = sim / SOFTMAX_TEMPERATURE
    if token_mask is not None:
        scaled = scaled.masked_fill(~token_mask, torch.finfo(sim.dtype).min)
    return scaled.softmax(dim)


def _weights(
    indices: Tensor, M: int, patch_mask: Tensor | None, token_mask: Tensor | None, like: Tensor
) -> tuple[Tensor, Tensor]:
    """a [b c, K] or [1, K] and b [b c, M] or [1, M] of indices [b, c, K]: uniform over the unmasked."""
    B, C, K = indices.shape
    a, b = like.new_full((1, K), 1 / K), like.new_full((1, M), 1 / M)
    if patch_mask is not None:
        on = patch_mask[:, None].expand(-1, C, -1).gather(2, indices).view(-1, K).to(like.dtype)
        a = on / on.sum(-1, keepdim=True).clamp(min=1)
    if token_mask is not None:
        on = token_mask.expand(B, C, M).reshape(-1, M).to(like.dtype)
        b = on / on.sum(-1, keepdim=True).clamp(min=1)
    return a, b
