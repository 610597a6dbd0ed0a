"""spa_fast::_selected_sim, plain PyTorch on every device: schema, implementation, fake, autograd."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from spa_fast._checks import accumulate_dtype
from spa_fast.reference import similarity as reference


@torch.library.custom_op("spa_fast::_selected_sim", mutates_args=())
def selected_sim(
    patches: Tensor, tokens: Tensor, indices: Tensor, patch_mask: Tensor | None, token_mask: Tensor | None
) -> Tensor:
    with torch.autocast(patches.device.type, enabled=False):
        return reference.selected_sim_fwd(patches, tokens, indices, patch_mask, token_mask)


@selected_sim.register_fake
def _(patches: Tensor, tokens: Tensor, indices: Tensor, *masks: Tensor | None) -> Tensor:
    return patches.new_empty(*indices.shape, tokens.shape[1], dtype=accumulate_dtype(patches))


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
def _(grad_sim: Tensor, patches: Tensor, tokens: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return empty_grads(patches, tokens, *rest[-2:])


def empty_grads(
    patches: Tensor, tokens: Tensor, need_patches: bool, need_tokens: bool
) -> tuple[Tensor, Tensor]:
    """Fake gradients; an unneeded one has size 0."""
    return (
        patches.new_empty(patches.shape if need_patches else (0,)),
        tokens.new_empty(tokens.shape if need_tokens else (0,)),
    )


def needed(grads: tuple[Tensor, Tensor], need: tuple[bool, bool]) -> tuple[Tensor | None, ...]:
    return tuple(grad if on else None for grad, on in zip(grads, need, strict=True))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad_sim: Tensor) -> tuple[Tensor | None, ...]:
    need = ctx.needs_input_grad[:2]
    grads = selected_sim_bwd(grad_sim.contiguous(), *ctx.saved_tensors, *need)
    return *needed(grads, need), None, None, None


selected_sim.register_autograd(_backward, setup_context=_save)
