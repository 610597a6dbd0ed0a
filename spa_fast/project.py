"""Features through one linear map."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from spa_fast import _backends
from spa_fast import _checks as checks
from spa_fast._ops.similarity import similarity


def project(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, backend: str = "auto") -> Tensor:
    """x @ weight.T + bias, as `torch.nn.functional.linear`.

    Args:
        x, weight, bias: [..., D], [E, D] and [E] of one dtype and device.
        backend: "auto" and "native" take the compiled product for fp32 on a CPU, in which a row's result and
            gradient depend on nothing beside it, bit for bit; everything else is PyTorch's.

    Returns:
        [..., E].

    Raises:
        TypeError: an argument is no dense float tensor, or they differ in dtype.
        ValueError: shapes do not fit, devices differ, or an unknown backend.
    """
    checks.check_choice("backend", backend, _backends.BACKENDS)
    checks.check_input("x", x)
    D = x.shape[-1] if x.dim() else 0
    for name, part, expected, sizes in (("weight", weight, "[E, D]", (None, D)), ("bias", bias, "[E]", None)):
        if part is None:
            continue
        checks.check_float(name, part)
        checks.check_shape(name, part, expected, sizes or weight.shape[:1])
        checks.check_like(name, part, "x", x)
    compiled = backend in ("auto", "native") and x.device.type == "cpu" and x.dtype == torch.float32
    if not compiled or torch.is_autocast_enabled("cpu"):
        return F.linear(x, weight, bias)
    out: Tensor = similarity(x.reshape(1, -1, D), weight[None])
    if bias is not None:
        # A second tensor of this size would cost a third of the product.
        out += bias
    return out.view(*x.shape[:-1], len(weight))
