"""The compiled implementations of `_topk_patches` and `_spa_scores`; arguments as in `reference.patches`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from spa_fast import _native
from spa_fast._ops.sinkhorn_native import DTYPES

_NONE: tuple[int, ...] = (0, 0, 0, 0, 0, 0)


def _extension() -> Any:
    return _native.extension()


def _features(patches: Tensor, tokens: Tensor, token_mask: Tensor | None) -> tuple[int, ...]:
    M, D = tokens.shape[1:]
    return patches.data_ptr(), tokens.data_ptr(), DTYPES[patches.dtype], M, D, _address(token_mask)


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def topk_patches_fwd(
    patches: Tensor,
    tokens: Tensor,
    patch_mask: Tensor | None,
    token_mask: Tensor | None,
    k: int,
    reduce: str,
    class_conditional: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    (B, N, _), C = patches.shape, tokens.shape[0]
    scores = torch.empty(B, C, k)
    indices, argmax = torch.empty(B, C, k, dtype=torch.int64), torch.empty(B, C, k, dtype=torch.int32)
    _extension().topk_patches_fwd(
        _features(patches, tokens, token_mask),
        _address(patch_mask),
        (B, N, C, k),
        reduce,
        class_conditional,
        scores.data_ptr(),
        indices.data_ptr(),
        argmax.data_ptr(),
        torch.get_num_threads(),
    )
    return scores, indices, argmax


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
    (B, N, _), (C, M, _) = patches.shape, tokens.shape
    own = _features(patches, tokens, token_mask)
    if select_patches is None or select_tokens is None:
        by, aligned = own, _NONE
    else:
        by, aligned = _features(select_patches, select_tokens, select_token_mask), own
    score, f, g = torch.empty(B, C), torch.empty(B, C, k), torch.empty(B, C, M)
    indices, n_iter = torch.empty(B, C, k, dtype=torch.int64), torch.empty(B, C, dtype=torch.int32)
    _extension().spa_scores_fwd(
        by,
        aligned,
        _address(patch_mask),
        (B, N, C, k),
        reduce,
        class_conditional,
        eps,
        max_iter,
        tol,
        value,
        score.data_ptr(),
        indices.data_ptr(),
        f.data_ptr(),
        g.data_ptr(),
        n_iter.data_ptr(),
        torch.get_num_threads(),
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
    """For `mode` "envelope", and for "implicit" where it is the same."""
    (B, N, _), C, k = patches.shape, tokens.shape[0], indices.shape[2]
    grad_patches = patches.new_empty(patches.shape if need_patches else (0,))
    # Summed over chunks of images, in fp32 whatever the tokens are.
    grad_tokens = torch.empty(tokens.shape if need_tokens else (0,))
    _extension().spa_scores_bwd(
        grad_score.data_ptr(),
        _features(patches, tokens, token_mask),
        _address(patch_mask),
        (B, N, C, k),
        indices.data_ptr(),
        eps,
        value,
        f.data_ptr(),
        g.data_ptr(),
        grad_patches.data_ptr() if need_patches else 0,
        grad_tokens.data_ptr() if need_tokens else 0,
        torch.get_num_threads(),
    )
    return grad_patches, grad_tokens.to(tokens.dtype)
