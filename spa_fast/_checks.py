"""Every check of shape, dtype, device and range, and its message: argument, expected, got."""

from __future__ import annotations

import difflib
import math
from collections.abc import Collection, Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def accumulate_dtype(x: Tensor) -> torch.dtype:
    """fp64 for fp64, fp32 for everything narrower."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def values_checkable(x: Tensor) -> bool:
    """Whether looking at values is free: on a CPU, outside of tracing and of vmap. Elsewhere it would
    synchronise or is impossible.
    """
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    return not torch._C._functorch.is_batchedtensor(x)


def check_tensor(name: str, x: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}")
    if x.layout != torch.strided or x.is_nested:
        kind = "a nested tensor" if x.is_nested else str(x.layout)
        raise TypeError(f"{name}: expected a dense tensor, got {kind}")


def check_float(name: str, x: Tensor) -> None:
    check_tensor(name, x)
    if x.dtype not in FLOATS:
        raise TypeError(f"{name}: expected fp16, bf16, fp32 or fp64, got {x.dtype}")


def check_input(name: str, x: Tensor) -> None:
    """A float tensor with values, whose derivative is asked for in reverse if at all."""
    check_float(name, x)
    if x.is_meta:
        raise ValueError(f"{name}: expected a device that holds values, got meta")
    check_reverse(name, x)


def check_reverse(name: str, x: Tensor) -> None:
    """No derivative that an operator would lose in silence or refuse by naming torch's internals."""
    if torch.compiler.is_compiling():
        return
    if forward_ad.unpack_dual(x).tangent is not None:
        raise RuntimeError(
            f"{name}: expected a tensor without a tangent; transport has no forward-mode derivative "
            "(torch.func.jvp, jacfwd, dual tensors), use torch.autograd.grad or backward()"
        )
    if x.requires_grad and torch._C._functorch.is_gradtrackingtensor(x):
        raise RuntimeError(
            f"{name}: expected a tensor outside of torch.func.grad, vjp and jacrev, which differentiate no "
            "custom operator; use torch.autograd.grad or backward()"
        )


def check_like(name: str, x: Tensor, other_name: str, other: Tensor, *, dtype: bool = True) -> None:
    """Same device and, unless dtype=False, the same dtype; under autocast one accumulate dtype will do."""
    if x.device != other.device:
        raise ValueError(f"{name}: expected the device of {other_name}, {other.device}, got {x.device}")
    mixed = torch.is_autocast_enabled(x.device.type) and accumulate_dtype(x) == accumulate_dtype(other)
    if dtype and x.dtype != other.dtype and not mixed:
        raise TypeError(f"{name}: expected the dtype of {other_name}, {other.dtype}, got {x.dtype}")


def check_shape(name: str, x: Tensor, expected: str, sizes: Sequence[int | None]) -> None:
    """`sizes` holds the size of each dimension, None where any will do; `expected` names them.

    A size formatted outside of the error path would be burnt into a compiled graph.
    """
    fits = x.dim() == len(sizes) and all(
        want is None or have == want for have, want in zip(x.shape, sizes, strict=False)
    )
    if not fits:
        known = "" if all(want is None for want in sizes) else f" = [{', '.join(map(_size, sizes))}]"
        raise ValueError(f"{name}: expected {expected}{known}, got {list(x.shape)}")


def check_broadcast(name: str, x: Tensor, expected: str, shape: Sequence[int]) -> None:
    """x broadcasts to `shape`, its last dimension as it stands."""
    sizes = list(x.shape)
    tail = list(shape)[len(shape) - len(sizes) :]
    fits = 1 <= len(sizes) <= len(shape) and sizes[-1] == tail[-1]
    if not fits or any(have not in (1, want) for have, want in zip(sizes, tail, strict=True)):
        raise ValueError(f"{name}: expected {expected}, broadcastable to {list(shape)}, got {sizes}")


def check_mask(name: str, mask: Tensor, expected: str, sizes: Sequence[int | None], like: Tensor) -> None:
    check_tensor(name, mask)
    if mask.dtype != torch.bool:
        raise TypeError(f"{name}: expected bool (True takes part), got {mask.dtype}")
    check_shape(name, mask, expected, sizes)
    check_like(name, mask, "the features", like, dtype=False)


def check_choice(name: str, value: str, options: Collection[str]) -> None:
    if value not in options:
        near = difflib.get_close_matches(str(value), options, 1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, options))}, got {value!r}{hint}")


def check_eps(eps: float, name: str = "eps") -> None:
    _check_number(name, eps)
    if not (eps > 0 and math.isfinite(eps)):
        raise ValueError(f"{name}: expected a finite number > 0, in units of cost, got {eps}")


def check_blur(blur: float) -> None:
    _check_number("blur", blur)
    if not (blur > 0 and math.isfinite(blur)):
        raise ValueError(f"blur: expected a finite number > 0 (eps is its power), got {blur}")


def check_max_iter(max_iter: int, name: str = "max_iter") -> None:
    if isinstance(max_iter, bool) or not isinstance(max_iter, int):
        raise TypeError(f"{name}: expected an integer, got {type(max_iter).__name__}")
    if max_iter < 1:
        raise ValueError(f"{name}: expected >= 1, got {max_iter}")


def check_tol(tol: float, name: str = "tol") -> None:
    _check_number(name, tol)
    if not (tol >= 0 and math.isfinite(tol)):
        raise ValueError(
            f"{name}: expected a finite number >= 0 (0 means exactly max_iter iterations), got {tol}"
        )


def check_integer(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{name}: expected an integer, got {type(value).__name__}")


def check_k(k: int, patches: int | None = None) -> None:
    check_integer("k", k)
    if patches is not None and not 1 <= k <= patches:
        raise ValueError(f"k: expected 1 <= k <= N = {patches} patches, got {k}")
    if k < 1:
        raise ValueError(f"k: expected >= 1, got {k}")


def check_samples(n: int) -> None:
    check_integer("n", n)
    if not 0 <= n <= 1 << 32:
        raise ValueError(f"n: expected 0 to 2^32 samples per class, got {n}")


def check_class_ids(ids: Tensor) -> None:
    """int64 of any shape, as far as they can be looked at."""
    if values_checkable(ids) and ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < 1 << 32:
        raise ValueError(f"class ids: expected 0 <= id < 2^32, got {int(ids.min())} to {int(ids.max())}")


def check_weights(name: str, weights: Tensor, like_name: str, like: Tensor, shape: Sequence[int]) -> None:
    """Weights of the last dimension of `shape`: float, constant, finite, not negative."""
    check_float(name, weights)
    check_like(name, weights, like_name, like, dtype=False)
    check_broadcast(name, weights, "weights of the last dimension", shape)
    check_reverse(name, weights)
    if weights.requires_grad:
        raise ValueError(
            f"{name}: expected a constant, got a tensor that requires grad; pass {name}.detach()"
        )
    if values_checkable(weights):
        bad = ~(weights.isfinite() & (weights >= 0))
        if bool(bad.any()):
            first = bad.nonzero()[0].tolist()
            raise ValueError(
                f"{name}: expected finite weights >= 0, got {weights[tuple(first)].item()} at {first}"
            )


def check_finite(name: str, x: Tensor, rows: Sequence[str], mask: Tensor | None = None) -> None:
    """x [..., D] finite outside of masked rows; `rows` names its leading dimensions. No-op off the CPU."""
    # A finite sum has finite terms and is the fastest look at all of them; else look closer.
    if not values_checkable(x) or bool(x.sum(-1).isfinite().all()):
        return
    # The largest entry is NaN or Inf if any is, and needs no tensor of x's size.
    bad = ~torch.linalg.vector_norm(x, torch.inf, -1).isfinite()
    if mask is not None:
        bad &= mask
    if bool(bad.any()):
        first = bad.nonzero()[0].tolist()
        place = ", ".join(f"{row} {i}" for row, i in zip(rows, first, strict=True))
        raise ValueError(
            f"{name}: expected finite values, got NaN or Inf first at {place} ({int(bad.sum())} rows)"
        )


def did_you_mean(name: str, options: Collection[str]) -> str:
    near = difflib.get_close_matches(name, options, 1)
    return f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(sorted(options))}"


def _size(size: int | None) -> str:
    return "*" if size is None else str(size)


def _check_number(name: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
