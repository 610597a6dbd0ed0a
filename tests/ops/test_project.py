"""spa_fast.project against fp64: values, gradients, independence of the batch, errors."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from spa_fast._native import extension, native_info
from spa_fast.project import project

needs_native = pytest.mark.skipif(extension() is None, reason=str(native_info().get("reason")))


def gradients(x: Tensor, weight: Tensor, bias: Tensor, upstream: Tensor, backend: str) -> list[Tensor]:
    leaves = [part.detach().clone().requires_grad_() for part in (x, weight, bias)]
    out = project(*leaves, backend=backend)
    return [out.detach(), *torch.autograd.grad(out, leaves, upstream.to(out.dtype))]


@pytest.mark.parametrize("backend", ["reference", "native", "auto"])
@pytest.mark.parametrize("shape", [(512,), (3, 512), (5, 7, 64), (2, 700, 33), (0, 4), (1, 2300, 48)])
def test_matches_fp64(backend: str, shape: tuple[int, ...]) -> None:
    width, out = shape[-1], 40
    x, weight, bias = torch.randn(shape), torch.randn(out, width) / width**0.5, torch.randn(out)
    upstream = torch.randn(*shape[:-1], out)
    got = gradients(x, weight, bias, upstream, backend)
    want = gradients(x.double(), weight.double(), bias.double(), upstream, "reference")
    for mine, right in zip(got, want, strict=True):
        assert mine.dtype == torch.float32
        assert (mine - right).norm() <= 1e-6 * right.norm()


@pytest.mark.parametrize("backend", ["reference", "native"])
def test_gradcheck(backend: str) -> None:
    args = [torch.randn(size, dtype=torch.float64, requires_grad=True) for size in ((2, 3, 4), (5, 4), (5,))]
    assert torch.autograd.gradcheck(lambda *given: project(*given, backend=backend), args)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_are_torchs(dtype: torch.dtype) -> None:
    x, weight = torch.randn(3, 8, dtype=dtype), torch.randn(4, 8, dtype=dtype)
    assert torch.equal(project(x, weight), F.linear(x, weight))


def test_autocast_is_torchs() -> None:
    x, weight = torch.randn(3, 8), torch.randn(4, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert project(x, weight).dtype == torch.bfloat16


@needs_native
def test_a_row_depends_on_no_other() -> None:
    x, weight, bias = torch.randn(300, 96), torch.randn(70, 96), torch.randn(70)
    whole = project(x, weight, bias)
    for rows in (slice(0, 1), slice(3, 130), slice(299, 300)):
        assert torch.equal(project(x[rows], weight, bias), whole[rows])
    strided = torch.randn(96, 300).T
    assert torch.equal(project(strided, weight, bias), project(strided.contiguous(), weight, bias))


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"weight": torch.ones(3, 5)}, ValueError, r"weight: expected \[E, D\] = \[\*, 4\], got \[3, 5\]"),
        ({"bias": torch.ones(4)}, ValueError, r"bias: expected \[E\] = \[3\], got \[4\]"),
        ({"x": torch.tensor(1.0)}, ValueError, "weight: expected"),
        ({"x": torch.ones(2, 4, dtype=torch.int64)}, TypeError, "x: expected fp16, bf16, fp32 or fp64"),
        ({"weight": torch.ones(3, 4, dtype=torch.float64)}, TypeError, "weight: expected the dtype of x"),
        ({"x": torch.ones(2, 4, device="meta")}, ValueError, "x: expected a device that holds values"),
        ({"backend": "cuda"}, ValueError, "backend: expected one of"),
    ],
)
def test_bad_input_is_named(change: dict[str, object], error: type[Exception], words: str) -> None:
    given: dict[str, object] = {"x": torch.ones(2, 4), "weight": torch.ones(3, 4), "bias": torch.ones(3)}
    with pytest.raises(error, match=words):
        project(**(given | change))  # type: ignore[arg-type]
