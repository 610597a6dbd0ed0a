"""spa_fast::_similarity: schema, implementation, fake, autograd."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from spa_fast import _native


@torch.library.custom_op("spa_fast::_similarity", mutates_args=())
def similarity(x: Tensor, y: Tensor) -> Tensor:
    """Inner products [P, R, Q] of rows of x [P, R, D] and y [P, Q, D], both fp32 or both fp64.

    On a CPU with the compiled extension, an fp32 entry depends on its two rows and nothing else, bit for bit.
    """
    extension: Any = _native.extension()
    if extension is None or x.device.type != "cpu" or x.dtype != torch.float32:
        with torch.autocast(x.device.type, enabled=False):
            return x @ y.transpose(1, 2)
    (P, R, D), Q = x.shape, y.shape[1]
    if 0 in (P, R, Q, D):
        return x.new_zeros(P, R, Q)
    x, y = _packable(x), _packable(y)
    out = x.new_empty(P, R, Q)
    extension.similarity(
        x.data_ptr(),
        x.stride(),
        y.data_ptr(),
        y.stride(),
        0,
        P,
        R,
        Q,
        D,
        False,
        out.data_ptr(),
        torch.get_num_threads(),
    )
    return out


def _packable(x: Tensor) -> Tensor:
    """x with contiguous rows or columns."""
    return x if 1 in x.stride()[1:] else x.contiguous()


@similarity.register_fake
def _(x: Tensor, y: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], x.shape[1], y.shape[1])


def _save(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
    x, y = ctx.saved_tensors
    need_x, need_y = ctx.needs_input_grad
    return (
        similarity(grad, y.transpose(1, 2)) if need_x else None,
        similarity(grad.transpose(1, 2), x.transpose(1, 2)) if need_y else None,
    )


similarity.register_autograd(_backward, setup_context=_save)
