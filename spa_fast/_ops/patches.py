"""spa_fast::_topk_patches and spa_fast::_spa_scores: schema, implementation, fake, autograd.

`patches_native` and `patches_triton` hold `topk_patches_fwd`, `spa_scores_fwd` and `spa_scores_bwd` with the
arguments of `reference.patches`; they get contiguous tensors, B, C >= 1 and what `_backends` says they take.
The reference computes the backward of `_topk_patches`, and that of `_spa_scores` unless grad is "envelope".
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from spa_fast import _backends
from spa_fast._checks import accumulate_dtype
from spa_fast._ops.selected import empty_grads, needed
from spa_fast.reference import patches as reference

Scores = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def _implementation(backend: str, k: int | None, *features: Tensor | None) -> Any:
    """The module of the backend, which an op resolves by itself where torch.compile did not."""
    given = [x for x in features if x is not None]
    backend = _backends.resolve_patches(backend, given, k)
    if backend == "reference" or 0 in (given[0].shape[0], given[1].shape[0]):
        return reference
    return import_module(f"spa_fast._ops.patches_{backend}")


def _contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    return [x if x is None else x.contiguous() for x in tensors]


@torch.library.custom_op("spa_fast::_topk_patches", mutates_args=())
def topk_patches(
    patches: Tensor,
    tokens: Tensor,
    patch_mask: Tensor | None,
    token_mask: Tensor | None,
    k: int,
    reduce: str,
    class_conditional: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """scores [B, C, k], indices int64 [B, C, k], argmax int32 [B, C, k] (zeros unless reduce is "max")."""
    inputs = _contiguous(patches, tokens, patch_mask, token_mask)
    # Autocast would run the GEMM in half precision.
    with torch.autocast(patches.device.type, enabled=False):
        forward = _implementation(backend, None, patches, tokens).topk_patches_fwd
        out: tuple[Tensor, Tensor, Tensor] = forward(*inputs, k, reduce, class_conditional)
    return out


@topk_patches.register_fake
def _(
    patches: Tensor, tokens: Tensor, patch_mask: Any, token_mask: Any, k: int, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    scores = patches.new_empty(patches.shape[0], tokens.shape[0], k, dtype=accumulate_dtype(patches))
    return scores, scores.new_empty(scores.shape, dtype=torch.int64), scores.to(torch.int32)


@torch.library.custom_op("spa_fast::_topk_patches_bwd", mutates_args=())
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
    with torch.autocast(patches.device.type, enabled=False):
        return reference.topk_patches_bwd(
            grad_scores,
            patches,
            tokens,
            indices,
            argmax,
            patch_mask,
            token_mask,
            reduce,
            need_patches,
            need_tokens,
        )


@topk_patches_bwd.register_fake
def _(grad_scores: Tensor, patches: Tensor, tokens: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return empty_grads(patches, tokens, *rest[-2:])


@torch.library.custom_op("spa_fast::_spa_scores", mutates_args=())
def spa_scores(
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
    grad: str,
    backend: str,
) -> Scores:
    """score [B, C], indices int64 [B, C, k], f [B, C, k], g [B, C, M], n_iter int32 [B, C].

    `grad` is read by the backward only.
    """
    inputs = _contiguous(
        patches, tokens, select_patches, select_tokens, patch_mask, token_mask, select_token_mask
    )
    with torch.autocast(patches.device.type, enabled=False):
        forward = _implementation(backend, k, patches, tokens, select_patches, select_tokens).spa_scores_fwd
        out: Scores = forward(*inputs, k, eps, max_iter, tol, reduce, class_conditional, value)
    return out


@spa_scores.register_fake
def _(patches: Tensor, tokens: Tensor, *rest: Any) -> Scores:
    (B, _, _), (C, M, _), k = patches.shape, tokens.shape, rest[5]
    f = patches.new_empty(B, C, k, dtype=accumulate_dtype(patches))
    n_iter = f.new_empty(B, C, dtype=torch.int32)
    return f.new_empty(B, C), f.new_empty(f.shape, dtype=torch.int64), f, f.new_empty(B, C, M), n_iter


@torch.library.custom_op("spa_fast::_spa_scores_bwd", mutates_args=())
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
    grad: str,
    backend: str,
    need_patches: bool,
    need_tokens: bool,
) -> tuple[Tensor, Tensor]:
    inputs = _contiguous(patches, tokens, indices, patch_mask, token_mask, f, g, n_iter)
    envelope = grad == "envelope" or (grad == "implicit" and value)
    with torch.autocast(patches.device.type, enabled=False):
        module = _implementation(backend if envelope else "reference", f.shape[-1], patches, tokens)
        out: tuple[Tensor, Tensor] = module.spa_scores_bwd(
            grad_score, *inputs, eps, value, grad, need_patches, need_tokens
        )
    return out


@spa_scores_bwd.register_fake
def _(grad_score: Tensor, patches: Tensor, tokens: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return empty_grads(patches, tokens, *rest[-2:])


def _save_topk(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    patches, tokens, patch_mask, token_mask, _k, reduce, _class_conditional, _backend = inputs
    _scores, indices, argmax = output
    ctx.mark_non_differentiable(indices, argmax)
    ctx.save_for_backward(patches, tokens, indices, argmax, patch_mask, token_mask)
    ctx.reduce = reduce


def _backward_topk(ctx: Any, grad_scores: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    need = ctx.needs_input_grad[:2]
    grads = topk_patches_bwd(grad_scores.contiguous(), *ctx.saved_tensors, ctx.reduce, *need)
    return *needed(grads, need), *(None,) * 6


def _save_scores(ctx: Any, inputs: tuple[Any, ...], output: Scores) -> None:
    patches, tokens, _, _, patch_mask, token_mask, *_ = inputs
    eps, value, grad, backend = inputs[8], *inputs[13:]
    _score, indices, f, g, n_iter = output
    ctx.mark_non_differentiable(indices, f, g, n_iter)
    ctx.save_for_backward(patches, tokens, indices, patch_mask, token_mask, f, g, n_iter)
    ctx.options = eps, value, grad, backend


def _backward_scores(ctx: Any, grad_score: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    need = ctx.needs_input_grad[:2]
    grads = spa_scores_bwd(grad_score.contiguous(), *ctx.saved_tensors, *ctx.options, *need)
    return *needed(grads, need), *(None,) * 14


topk_patches.register_autograd(_backward_topk, setup_context=_save_topk)
spa_scores.register_autograd(_backward_scores, setup_context=_save_scores)
