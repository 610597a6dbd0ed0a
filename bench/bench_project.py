"""One linear map over the patches of a batch, beside PyTorch's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import DEVICE
from measure import time_row
from torch import Tensor

from spa_fast._backends import available
from spa_fast.project import project

B, N, D = 64, 196, 512
SHAPE = f"B={B} N={N} D={D}"
CONTENDERS = {
    "torch": F.linear,
    "native": lambda x, weight, bias: project(x, weight, bias, backend="native"),
}


@pytest.mark.parametrize("direction", ["forward", "forward + backward"])
@pytest.mark.parametrize("who", CONTENDERS)
def bench_project(benchmark: Any, one_thread: None, not_measured: Any, who: str, direction: str) -> None:
    benchmark.group = f"project {direction}"
    reason = available()["native"] if who == "native" else None
    if DEVICE == "cuda":
        reason = "on CUDA it is PyTorch's own"
    if reason is not None:
        not_measured(f"{benchmark.group}, {SHAPE}", who, reason)
    generator = torch.Generator().manual_seed(0)
    x, upstream = (torch.randn(B, N, D, generator=generator) for _ in range(2))
    weight, bias = torch.randn(D, D, generator=generator) / D**0.5, torch.randn(D, generator=generator)

    def values(
        linear: Any, x: Tensor = x, weight: Tensor = weight, bias: Tensor = bias
    ) -> tuple[Tensor, ...]:
        if direction == "forward":
            with torch.no_grad():
                return (linear(x, weight, bias),)
        # As training does: patches are frozen.
        leaves = [part.requires_grad_() for part in (weight, bias)]
        return torch.autograd.grad(linear(x, *leaves), leaves, upstream.to(x.dtype))

    want = values(F.linear, x.double(), weight.double(), bias.double())

    def check(*got: Tensor) -> None:
        for mine, right in zip(got, want, strict=True):
            assert (mine - right).norm() <= 1e-5 * right.norm()

    time_row(benchmark, lambda: values(CONTENDERS[who], x, weight, bias), check, backend=who, shape=SHAPE)
