"""spa_fast::_topk_patches and spa_fast::_selected_sim: schema, implementation, fake, autograd."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from spa_fast.reference import patches as reference


def _acc(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


@torch.library.custom_op("spa_fast::_topk_patches", mutates_args=())
def topk_patches(
    patches: Tensor,
    tokens: Tensor,
    patch_mask: Tensor | None,
    token_mask: Tensor | None,
    k: int,
    reduce: str,
    class_conditional: bool,
) -> tuple[Tensor, Tensor]:
    # Autocast would run the GEMM in half precision.
    with torch.autocast(patches.device.type, enabled=False):
        return reference.topk_patches_fwd(
            patches, tokens, patch_mask, token_mask, k, reduce, class_conditional
        )


@topk_patches.register_fake
def _(
    patches: Tensor,
    tokens: Tensor,
    patch_mask: Tensor | None,
    token_mask: Tensor | None,
    k: int,
    reduce: str,
    class_conditional: bool,
) -> tuple[Tensor, Tensor]:
    B, (C, M, _) = patches.shape[0], tokens.shape
    indices = patches.new_empty(B, C, k, dtype=torch.int64)
    return patches.new_empty(B, C, k, M, dtype=_acc(patches)), indices


@torch.library.custom_op("spa_fast::_selected_sim", mutates_args=())
def selected_sim(
    patches: Tensor, tokens: Tensor, indices: Tensor, patch_mask: Tensor | None, token_mask: Tensor | None
) -> Tensor:
    with torch.autocast(patches.device.type, enabled=False):
        return reference.selected_sim_fwd(patches, tokens, indices, patch_mask, token_mask)


@selected_sim.register_fake
def _(
    patches: Tensor, tokens: Tensor, indices: Tensor, patch_mask: Tensor | None, token_mask: Tensor | None
) -> Tensor:
    return patches.new_empty(*indices.shape, tokens.shape[1], dtype=_acc(patches))


@torch.library.custom_op("spa_fast::_selected_sim_bwd", mutates_args=())
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
    with torch.autocast(patches.device.type, enabled=False):
        return reference.selected_sim_bwd(
            grad_sim, patches, tokens, indices, patch_mask, token_mask, need_patches, need_tokens
        )


@selected_sim_bwd.register_fake
def _(
    grad_sim: Tensor,
    patches: Tensor,
    tokens: Tensor,
    indices: Tensor,
    patch_mask: Tensor | None,
    token_mask: Tensor | None,
    need_patches: bool,
    need_tokens: bool,
) -> tuple[Tensor, Tensor]:
    return (
        patches.new_empty(patches.shape if need_patches else (0,)),
        tokens.new_empty(tokens.shape if need_tokens else (0,)),
    )


def _save_selected(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _save_topk(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    patches, tokens, patch_mask, token_mask, *_ = inputs
    _sim, indices = output
    ctx.mark_non_differentiable(indices)
    ctx.save_for_backward(patches, tokens, indices, patch_mask, token_mask)


def _backward(ctx: Any, grad_sim: Tensor) -> tuple[Tensor | None, Tensor | None]:
    need = ctx.needs_input_grad[:2]
    grads = selected_sim_bwd(grad_sim.contiguous(), *ctx.saved_tensors, *need)
    return grads[0] if need[0] else None, grads[1] if need[1] else None


def _backward_selected(ctx: Any, grad_sim: Tensor) -> tuple[Tensor | None, ...]:
    return *_backward(ctx, grad_sim), None, None, None


def _backward_topk(ctx: Any, grad_sim: Tensor, _grad_indices: Any) -> tuple[Tensor | None, ...]:
    return *_backward(ctx, grad_sim), None, None, None, None, None


selected_sim.register_autograd(_backward_selected, setup_context=_save_selected)
topk_patches.register_autograd(_backward_topk, setup_context=_save_topk)
