"""spa_fast._C.similarity, called through raw pointers, and spa_fast::_similarity."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from spa_fast._native import extension, native_info

_C = extension()
if _C is None:
    pytest.skip(native_info()["reason"], allow_module_level=True)

DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
OPS = torch.ops.spa_fast


def native(x: Tensor, y: Tensor, *, normalize: bool = False, threads: int = 1, isa: str = "auto") -> Tensor:
    """[P, R, Q] of x [P, R, D] and y [P, Q, D], whatever their strides."""
    (P, R, D), Q = x.shape, y.shape[1]
    out = torch.full((P, R, Q), math.nan)
    _C.similarity(
        *(x.data_ptr(), x.stride(), y.data_ptr(), y.stride(), DTYPES[x.dtype]),
        *(P, R, Q, D, normalize, out.data_ptr(), threads, isa),
    )
    return out


def usable(isa: str) -> bool:
    try:
        native(torch.ones(1, 1, 1), torch.ones(1, 1, 1), isa=isa)
    except ValueError:
        return False
    return True


ISAS = [isa for isa in native_info()["simd_compiled"] if usable(isa)]


def close(got: Tensor, x: Tensor, y: Tensor) -> None:
    """Within what recursive summation may lose at worst, and a quarter of it where there are many terms."""
    x, y = x.double(), y.double()
    D = x.shape[-1]
    bound = x.abs() @ y.abs().mT * (max(D / 4, min(D, 8)) * 2.0**-24)
    assert ((got - x @ y.mT).abs() <= bound).all()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("D", [0, 1, 7, 63, 64, 197, 513, 2500])
def test_similarity_matches_fp64(isa: str, dtype: torch.dtype, D: int) -> None:
    for P, R, Q in [(1, 1, 1), (1, 5, 97), (3, 49, 17), (1, 130, 33), (2, 3, 300)]:
        x, y = torch.randn(P, R, D).to(dtype), torch.randn(P, Q, D).to(dtype)
        got = native(x, y, isa=isa)
        close(got, x, y)
        columns = native(x.mT.contiguous().mT, y.mT.contiguous().mT, isa=isa)
        assert torch.equal(columns, got)
        assert torch.equal(native(x.mT.contiguous().mT, y, isa=isa), got)
        assert torch.equal(native(x, y, threads=3, isa=isa), got)
        shared = native(x[:1].expand(P, R, D), y, isa=isa)
        assert torch.equal(shared[0], got[0])


@pytest.mark.parametrize("isa", ISAS)
def test_similarity_as_accurate_as_torch(isa: str) -> None:
    x, y = torch.rand(1, 64, 1024), torch.rand(1, 100, 1024)
    want = x.double() @ y.double().mT
    assert (native(x, y, isa=isa) - want).norm() <= (x @ y.mT - want).norm()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("D", [7, 64, 300])
def test_similarity_of_a_pair_is_its_own(isa: str, normalize: bool, D: int) -> None:
    x, y = torch.randn(1, 200, D), torch.randn(1, 150, D)
    want = native(x, y, normalize=normalize, isa=isa)
    assert torch.equal(native(y, x, normalize=normalize, isa=isa).mT, want)
    for rows in (slice(0, 1), slice(3, 20), slice(17, 200, 7)):
        assert torch.equal(native(x[:, rows], y, normalize=normalize, isa=isa), want[:, rows])
        assert torch.equal(native(x, y[:, rows], normalize=normalize, isa=isa), want[:, :, rows])
        assert torch.equal(native(x[:, rows], y[:, :1], normalize=normalize, isa=isa), want[:, rows, :1])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_similarity_normalised(isa: str, dtype: torch.dtype) -> None:
    x, y = torch.randn(1, 70, 99).to(dtype), torch.randn(1, 30, 99).to(dtype)
    x[0, 3] = 0
    if dtype != torch.float16:
        x[0, 5] *= 1e30
        x[0, 6] *= 1e-30
        y[0, 2] *= 1e-30
        x[0, 7] = 1e-41
    u, v = x.double(), y.double()
    u[0, [3, 7] if dtype != torch.float16 else 3] = 0
    unit = torch.nn.functional.normalize
    want = unit(u, dim=-1, eps=1e-300) @ unit(v, dim=-1, eps=1e-300).mT
    got = native(x, y, normalize=True, isa=isa)
    torch.testing.assert_close(got.double(), want, rtol=0, atol=4e-7)
    assert (got[0, 3] == 0).all()
    x[0, 9, 1] = math.nan
    y[0, 4, 2] = math.inf
    spoiled = native(x, y, normalize=True, isa=isa)
    assert spoiled[0, 9].isnan().all()
    assert spoiled[0, :, 4][[i for i in range(70) if i not in (3, 7)]].isnan().all()
    spoiled[0, 9], spoiled[0, :, 4] = got[0, 9], got[0, :, 4]
    assert torch.equal(spoiled, got)


@pytest.mark.parametrize("isa", ISAS)
def test_similarity_half_formats_are_widened(isa: str) -> None:
    for dtype in (torch.float16, torch.bfloat16):
        x, y = torch.randn(2, 50, 77).to(dtype), torch.randn(2, 60, 77).to(dtype)
        assert torch.equal(native(x, y, isa=isa), native(x.float(), y.float(), isa=isa))


def test_similarity_refuses() -> None:
    x = torch.ones(1, 4, 4)
    with pytest.raises(ValueError, match="contiguous"):
        native(torch.ones(1, 8, 8)[:, ::2, ::2], x)
    with pytest.raises(ValueError, match="contiguous"):
        native(x.mT, x, normalize=True)
    with pytest.raises(ValueError, match="isa"):
        native(x, x, isa="sse")
    with pytest.raises(ValueError, match="dtype"):
        _C.similarity(0, (0, 0, 1), 0, (0, 0, 1), 3, 1, 1, 1, 1, False, 0, 1)


@pytest.mark.parametrize(
    "size", [(1, 5, 7, 9), (3, 4, 4, 6), (2, 0, 3, 5), (0, 2, 3, 5), (2, 3, 0, 4)], ids=str
)
def test_similarity_op(size: tuple[int, ...]) -> None:
    P, R, Q, D = size
    x, y = torch.randn(P, R, D, requires_grad=True), torch.randn(P, Q, D, requires_grad=True)
    torch.library.opcheck(OPS._similarity.default, (x, y))
    got = OPS._similarity(x, y)
    close(got.detach(), x.detach(), y.detach())
    grad = torch.randn(P, R, Q)
    dx, dy = torch.autograd.grad(got, (x, y), grad)
    torch.testing.assert_close(dx, grad @ y.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(dy, grad.mT @ x.detach(), rtol=1e-5, atol=1e-5)
    expanded = torch.autograd.grad(OPS._similarity(x, y).sum(), x)[0]
    torch.testing.assert_close(expanded, y.detach().sum(1, keepdim=True).expand_as(x), rtol=1e-5, atol=1e-5)
    double = [z.detach().double().requires_grad_() for z in (x, y)]
    if math.prod(size):
        torch.autograd.gradcheck(OPS._similarity, double)
        torch.autograd.gradgradcheck(OPS._similarity, double)


def test_similarity_op_under_autocast_and_compile() -> None:
    x, y = torch.randn(2, 8, 16), torch.randn(2, 4, 16)
    want = OPS._similarity(x, y)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(OPS._similarity(x, y), want)
        assert OPS._similarity(x.double(), y.double()).dtype == torch.float64
    compiled = torch.compile(lambda x, y: OPS._similarity(x, y), backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x, y), want)
