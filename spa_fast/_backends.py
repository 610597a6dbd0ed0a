"""Which implementations of the operators this machine can run: the only code that asks."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from spa_fast import _native

BACKENDS = ("auto", "triton", "native", "reference")

# Longest side of a problem that the compiled solvers take.
MAX_SIDE = 256
# Most patches of an image that the compiled selections take.
MAX_PATCHES = 1024
# Largest D + rank that the CUDA sampler takes.
MAX_CUDA_WIDTH = 4096


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
    K, M = cost.shape[-2:]
    return _resolve(backend, cost, {"K": (K, MAX_SIDE), "M": (M, MAX_SIDE)})


def resolve_patches(backend: str, features: Sequence[Tensor], k: int | None = None) -> str:
    """The backend that keeps some of N patches by classes of M tokens; rules and errors of `resolve`.

        device | dtype            | sides                         | backend
        cuda   | fp16, bf16, fp32 | N <= 1024, M <= 256, k <= 256 | triton
        cpu    | fp16, bf16, fp32 | N <= 1024, M <= 256, k <= 256 | native
        any    | any float        | any                           | reference

    Args:
        features: patches [B, N, D] and tokens [C, M, D], and so on where two spaces take part.
        k: how many patches are then aligned by transport; None: none are, and any number can be kept.
    """
    N, M = features[0].shape[1], max(tokens.shape[1] for tokens in features[1::2])
    widest = next((x for x in features if x.dtype == torch.float64), features[0])
    return _resolve(backend, widest, {"N": (N, MAX_PATCHES), "M": (M, MAX_SIDE), "k": (k or 0, MAX_SIDE)})


def _resolve(backend: str, x: Tensor, sides: dict[str, tuple[int, int]]) -> str:
    """`sides`: name to size and the longest that compiled code takes."""
    if backend not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(map(repr, BACKENDS))}, got {backend!r}")
    if backend == "reference" or torch.compiler.is_compiling():
        return backend
    if backend == "auto":
        backend = {"cuda": "triton", "cpu": "native"}.get(x.device.type, "reference")
        return backend if backend != "reference" and _obstacle(backend, x, sides) is None else "reference"
    reason = _obstacle(backend, x, sides)
    if reason is not None:
        raise RuntimeError(f"backend {backend!r} is not usable: {reason}")
    return backend


def resolve_sampler(backend: str, mean: Tensor, factor: Tensor) -> str:
    """The backend that draws from Gaussians of this mean and factor: "native" or "reference".

    "auto" takes native on a CPU, and on CUDA where that was compiled, for fp16, bf16 and fp32; else
    reference. A named backend is taken or refused with RuntimeError, never replaced.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(map(repr, BACKENDS))}, got {backend!r}")
    if backend == "reference":
        return backend
    reason = "it draws nothing" if backend == "triton" else _sampler_obstacle(mean, factor)
    if backend == "auto":
        return "native" if reason is None else "reference"
    if reason is not None:
        raise RuntimeError(f"backend {backend!r} is not usable: {reason}")
    return backend


def _sampler_obstacle(mean: Tensor, factor: Tensor) -> str | None:
    reason = _native_reason()
    if reason is not None:
        return reason
    if mean.device.type not in ("cpu", "cuda"):
        return f"it takes CPU and CUDA tensors, got {mean.device.type}"
    if mean.device.type == "cuda" and (reason := _native.native_info().get("cuda_reason")):
        return f"it takes CPU tensors: {reason}"
    if torch.float64 in (mean.dtype, factor.dtype):
        return "it takes fp16, bf16 and fp32, got torch.float64"
    width = sum(factor.shape[2:], mean.shape[1])
    if mean.device.type == "cuda" and width > MAX_CUDA_WIDTH:
        return f"it takes D + rank <= {MAX_CUDA_WIDTH} on CUDA, got {width}"
    return None


def _obstacle(backend: str, x: Tensor, sides: dict[str, tuple[int, int]]) -> str | None:
    device = x.device.type
    reason = _triton_reason() if backend == "triton" else _native_reason()
    if reason is not None:
        return reason
    if backend == "native" and device != "cpu":
        return f"it takes CPU tensors, got {device}"
    if backend == "triton" and device != "cuda" and not (device == "cpu" and _interpreted()):
        return f"it takes CUDA tensors (CPU tensors under Triton's interpreter only), got {device}"
    if x.dtype == torch.float64:
        return "it takes fp16, bf16 and fp32, got torch.float64"
    for name, (size, longest) in sides.items():
        if size > longest:
            return f"it takes {name} <= {longest}, got {size}"
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
