"""The tolerance table of every comparison with the fp64 oracle, by input dtype. Tighten only.

The oracle is run on inputs already rounded to the input dtype; fp16, bf16 and fp32 accumulate in fp32.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Tolerance:
    potential: float
    plan: float
    score: float
    grad_l2: float
    grad_max: float


TABLE = {
    torch.float64: Tolerance(1e-10, 1e-9, 1e-11, 1e-9, 1e-8),
    torch.float32: Tolerance(1e-5, 2e-5, 1e-5, 2e-5, 1e-4),
    torch.float16: Tolerance(1e-3, 2e-5, 1e-3, 2e-3, 1e-2),
    torch.bfloat16: Tolerance(1.6e-2, 2e-5, 8e-3, 1e-2, 4e-2),
}


def plan_rtol(dtype: torch.dtype, cost: Tensor, eps: float) -> float:
    """exp amplifies the rounding of C / eps: 8 units in the last place of its largest value."""
    if dtype == torch.float64:
        return TABLE[dtype].plan
    return max(TABLE[dtype].plan, 8 * 2.0**-24 * float(cost[cost.isfinite()].abs().max()) / eps)


def assert_score(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    rtol = TABLE[dtype].score
    torch.testing.assert_close(actual.double().cpu(), expected.double().cpu(), rtol=rtol, atol=rtol)


def assert_potentials(actual: Tensor, expected: Tensor, dtype: torch.dtype, scale: float = 1.0) -> None:
    """Modulo one constant a problem; `scale` is the largest cost."""
    tol = TABLE[dtype].potential
    actual, expected = (
        x.double().cpu() - x.double().cpu().mean(-1, keepdim=True) for x in (actual, expected)
    )
    torch.testing.assert_close(
        actual, expected, rtol=tol, atol=tol * scale if dtype != torch.float64 else 1e-12
    )


def assert_plan(actual: Tensor, expected: Tensor, rtol: float) -> None:
    """Entries below 1e-12 of the largest are compared absolutely."""
    expected = expected.double().cpu()
    atol = 1e-12 * float(expected.abs().max()) if expected.numel() else 0.0
    torch.testing.assert_close(actual.double().cpu(), expected, rtol=rtol, atol=atol)


def assert_grad(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """Relative L2 error, and largest error over the root mean square."""
    assert actual.shape == expected.shape
    error, expected = actual.double().cpu() - expected.double().cpu(), expected.double().cpu()
    if not expected.numel():
        return
    assert error.isfinite().all()
    assert error.norm() <= TABLE[dtype].grad_l2 * expected.norm(), error.norm() / expected.norm()
    rms = expected.square().mean().sqrt()
    assert error.abs().max() <= TABLE[dtype].grad_max * rms, error.abs().max() / rms
