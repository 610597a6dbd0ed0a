"""Which implementations of the operators this machine can run: the only code that asks."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from spa_fast import _native

BACKENDS = ("auto", "triton", "native", "reference")

# Longest side of a problem that the compiled solvers take.
MAX_SIDE = 256


def available() -> dict[str, str | None]:
    """Backend to None where it is usable on this machine, else the reason why it is not."""
    return {"triton": _triton_reason(), "native": _native_reason(), "reference": None}


def resolve(backend: str, cost: Tensor) -> str:
    """The backend that solves cost [..., K, M].

    "auto" takes the first of the row that fits, "reference" where none does:

        device | dtype            | sides                        | backend
        cuda   | fp16, bf16, fp32 | <= 256                       | triton
        cpu    | fp16, bf16, fp32 | <= 256                       | native
        any    | any float        | any                          | reference

    A named backend is taken or refused, never replaced. While torch.compile traces, the name comes back as it
    is: the operator resolves it when it runs.

    Raises:
        RuntimeError: the named backend cannot run this; says why.
        ValueError: an unknown name.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(map(repr, BACKENDS))}, got {backend!r}")
    if backend == "reference" or torch.compiler.is_compiling():
        return backend
    if backend == "auto":
        backend = {"cuda": "triton", "cpu": "native"}.get(cost.device.type, "reference")
        return backend if backend != "reference" and _obstacle(backend, cost) is None else "reference"
    reason = _obstacle(backend, cost)
    if reason is not None:
        raise RuntimeError(f"backend {backend!r} is not usable: {reason}")
    return backend


def _obstacle(backend: str, cost: Tensor) -> str | None:
    device = cost.device.type
    reason = _triton_reason() if backend == "triton" else _native_reason()
    if reason is not None:
        return reason
    if backend == "native" and device != "cpu":
        return f"it takes CPU tensors, got {device}"
    if backend == "triton" and device != "cuda" and not (device == "cpu" and _interpreted()):
        return f"it takes CUDA tensors (CPU tensors under Triton's interpreter only), got {device}"
    if cost.dtype == torch.float64:
        return "it takes fp16, bf16 and fp32, got torch.float64"
    K, M = cost.shape[-2:]
    if K > MAX_SIDE or M > MAX_SIDE:
        return f"it takes K, M <= {MAX_SIDE}, got {K} x {M}"
    return None


@cache
def _native_reason() -> str | None:
    return None if _native.extension() is not None else str(_native.native_info()["reason"])


@cache
def _triton_reason() -> str | None:
    if find_spec("triton") is None:
        return "triton is not installed"
    if not _interpreted() and not torch.cuda.is_available():
        return "no CUDA device"
    return None


@cache
def _interpreted() -> bool:
    """Whether Triton runs kernels in its interpreter, as it decided when they were defined."""
    if find_spec("triton") is None:
        return False
    import triton

    return bool(triton.knobs.runtime.interpret)
