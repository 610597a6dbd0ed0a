"""spa_fast::_unit: schema, implementation, fake, autograd."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


@torch.library.custom_op("spa_fast::_unit", mutates_args=())
def unit(x: Tensor) -> tuple[Tensor, Tensor]:
    """x / |x| over the last dimension and 1 / |x| [..., 1]; both 0 where |x| is 0 or subnormal."""
    x = x.contiguous()
    if x.device.type == "cpu" and x.dtype == torch.float32:
        inverse = torch.linalg.vector_norm(x, dim=-1, keepdim=True).reciprocal_()
        far = ~((inverse > 1e-15) & (inverse < 1e15)).squeeze(-1)
        # Asking is free on a CPU, and the fp64 norm of all rows would copy x.
        if bool(far.any()):
            inverse[far] = _inverse_norm(x[far])
    else:
        inverse = _inverse_norm(x)
    return x * inverse, inverse


def _inverse_norm(x: Tensor) -> Tensor:
    # Squares of 1e-30 or 1e30 fit fp64 only.
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float64)
    inverse: Tensor = norm.reciprocal().masked_fill_(norm < torch.finfo(x.dtype).tiny, 0.0).to(x.dtype)
    return inverse


@unit.register_fake
def _(x: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x, memory_format=torch.contiguous_format), x.new_empty(*x.shape[:-1], 1)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*output)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor | None, grad_inverse: Tensor | None) -> Tensor | None:
    """(grad - y (y . grad)) / |x|; made of differentiable operations, as there is a second derivative."""
    y, inverse = ctx.saved_tensors
    out = None
    if grad is not None:
        out = torch.addcmul(grad, y, (grad * y).sum(-1, keepdim=True), value=-1).mul_(inverse)
    if grad_inverse is not None:
        radial = -(grad_inverse * inverse) * (inverse * y)
        out = radial if out is None else out + radial
    return out


unit.register_autograd(_backward, setup_context=_save)
