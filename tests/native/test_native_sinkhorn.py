"""spa_fast._C.sinkhorn_fwd and sinkhorn_bwd, called through raw pointers, against the fp64 reference."""

import math

import pytest
import torch
from tolerance import assert_grad
from torch import Tensor

from spa_fast._native import extension, native_info
from spa_fast.reference.sinkhorn import sinkhorn_bwd, sinkhorn_fwd

_C = extension()
if _C is None:
    pytest.skip(native_info()["reason"], allow_module_level=True)

DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
COMPILED = native_info()["simd_compiled"]


def usable(isa: str) -> bool:
    try:
        native(*problems(1, 1, 1), isa=isa)
    except ValueError:
        return False
    return True


def problems(
    P: int, K: int, M: int, dtype: torch.dtype = torch.float32, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    cost = (2 * torch.rand(P, K, M, generator=generator)).to(dtype)
    a = torch.rand(P, K, generator=generator) + 0.1
    b = torch.rand(P, M, generator=generator) + 0.1
    return cost, a / a.sum(1, keepdim=True), b / b.sum(1, keepdim=True)


def native(
    cost: Tensor,
    a: Tensor,
    b: Tensor,
    *,
    eps: float = 0.1,
    max_iter: int = 50,
    tol: float = 0.0,
    value: bool = False,
    threads: int = 1,
    isa: str = "auto",
    C: int = 1,
    similarity: bool = False,
) -> tuple[Tensor, ...]:
    P, K, M = a.shape[0], a.shape[1], b.shape[1]
    P = max(P, cost.numel() // (K * M))
    score, f, g, error = (torch.full(size, math.nan) for size in ((P,), (P, K), (P, M), (P,)))
    n_iter = torch.full((P,), -1, dtype=torch.int32)
    strides = [0 if weights.shape[0] == 1 else weights.shape[1] for weights in (a, b)]
    _C.sinkhorn_fwd(
        *(cost.data_ptr(), DTYPES[cost.dtype], a.data_ptr(), strides[0], b.data_ptr(), strides[1]),
        *(P, K, M, eps, max_iter, tol, value),
        *(score.data_ptr(), f.data_ptr(), g.data_ptr(), n_iter.data_ptr(), error.data_ptr(), threads, isa),
        C=C,
        similarity=similarity,
    )
    return score, f, g, n_iter, error


def native_bwd(
    grad_score: Tensor,
    cost: Tensor,
    a: Tensor,
    b: Tensor,
    f: Tensor,
    g: Tensor,
    *,
    eps: float = 0.1,
    threads: int = 1,
    isa: str = "auto",
    C: int = 1,
    similarity: bool = False,
) -> Tensor:
    out = torch.full_like(cost, math.nan)
    strides = [0 if weights.shape[0] == 1 else weights.shape[1] for weights in (a, b)]
    _C.sinkhorn_bwd(
        *(grad_score.data_ptr(), cost.data_ptr(), DTYPES[cost.dtype]),
        *(a.data_ptr(), strides[0], b.data_ptr(), strides[1], f.data_ptr(), g.data_ptr()),
        *(f.shape[0], f.shape[1], g.shape[1], eps, out.data_ptr(), threads, isa),
        C=C,
        similarity=similarity,
    )
    return out


ISAS = [isa for isa in ("portable", "avx2", "avx512") if isa in COMPILED and usable(isa)]


def check(cost: Tensor, a: Tensor, b: Tensor, isa: str, **options) -> None:
    eps, max_iter, tol = options["eps"], options.get("max_iter", 50), options.get("tol", 0.0)
    value = options.get("value", False)
    score, f, g, n_iter, error = native(cost, a, b, isa=isa, **options)
    want = sinkhorn_fwd(cost.double(), a.double(), b.double(), eps, max_iter, tol, value)
    size = cost.float().abs().max().item()
    torch.testing.assert_close(score.double(), want[0], rtol=1e-5, atol=1e-7 * size)
    # Potentials are compared modulo the constant that may move from f to g.
    shift = (want[1] - f).mean(1, keepdim=True) if bool((a > 0).all()) else 0.0
    torch.testing.assert_close(f + shift, want[1], rtol=1e-5, atol=1e-5 * size)
    torch.testing.assert_close(g - shift, want[2], rtol=1e-5, atol=1e-5 * size)
    torch.testing.assert_close(n_iter, want[3])
    torch.testing.assert_close(error.double(), want[4], rtol=1e-4, atol=1e-6)


def same(got: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> bool:
    return all(torch.equal(x.nan_to_num(7.0), y.nan_to_num(7.0)) for x, y in zip(got, want, strict=True))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("eps", [1e-4, 1e-2, 0.03, 0.1, 1.0, 100.0])
def test_sinkhorn_fwd_matches_reference(isa: str, dtype: torch.dtype, eps: float) -> None:
    for K, M, tol, value in [
        (1, 1, 0.0, False),
        (32, 16, 0.0, True),
        (32, 16, 1e-3, False),
        (7, 63, 1e-3, True),
    ]:
        check(*problems(21, K, M, dtype), isa, eps=eps, tol=tol, value=value)


@pytest.mark.parametrize("isa", ISAS)
def test_sinkhorn_fwd_shared_weights_and_zeros(isa: str) -> None:
    cost, a, b = problems(18, 9, 5)
    check(cost, a[:1].contiguous(), b[:1].contiguous(), isa, eps=0.1)
    a[:, 6:] = 0
    a[3] = 0
    a = a / a.sum(1, keepdim=True).clamp_min(1e-30)
    cost[:, 7] = math.nan
    cost[5, 0, 0] = math.nan
    cost[6, 0, 0] = math.inf
    got = native(cost, a, b, isa=isa)
    want = sinkhorn_fwd(cost.double(), a.double(), b.double(), 0.1, 50, 0.0, False)
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x.double(), y.double(), rtol=1e-5, atol=2e-5, equal_nan=True)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sinkhorn_fwd_batch_of_one_equals_batch(isa: str, dtype: torch.dtype) -> None:
    cost, a, b = problems(35, 12, 7, dtype)
    options = {"eps": 0.025, "tol": 1e-3, "isa": isa}  # both branches occur
    batch = native(cost, a, b, **options)
    assert same(native(cost, a, b, threads=3, **options), batch)
    for p in range(35):
        one = slice(p, p + 1)
        alone = native(cost[one].contiguous(), a[one].contiguous(), b[one].contiguous(), **options)
        assert same(alone, tuple(x[one] for x in batch))


@pytest.mark.parametrize("isa", ISAS)
def test_sinkhorn_fwd_near_underflow(isa: str) -> None:
    """Costs built so that kernel space may run out of range: right anyway."""
    cost, a, b = problems(64, 16, 16)
    cost = torch.where(cost > 1.0, 2.0, 0.0) * torch.linspace(0.1, 1.0, 64)[:, None, None]
    a[:, 0] = 1e-12
    b[:, 3] = 1e-20
    check(cost, a / a.sum(1, keepdim=True), b / b.sum(1, keepdim=True), isa, eps=0.025, max_iter=200)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("eps", [1e-6, 1e-4, 1.0, 1e6])
def test_sinkhorn_fwd_large_costs_stay_finite(isa: str, eps: float) -> None:
    cost, a, b = problems(20, 8, 6)
    for x in native(cost * 5e3, a, b, eps=eps, isa=isa):
        assert x.isfinite().all()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("eps", [0.03, 0.1, 1.0, 100.0])
def test_sinkhorn_bwd_matches_reference(isa: str, dtype: torch.dtype, eps: float) -> None:
    for K, M in [(1, 1), (32, 16), (16, 5), (7, 63), (196, 20)]:
        cost, a, b = problems(21, K, M, dtype)
        if K > 3 and M > 3:
            a[:, 2], b[:, 1] = 0, 0
            a, b = a / a.sum(1, keepdim=True), b / b.sum(1, keepdim=True)
        exact = [x.double() for x in (cost, a, b)]
        _, f, g, n_iter, _ = sinkhorn_fwd(*exact, eps, 30, 0.0, False)
        upstream = torch.randn(21)
        want = sinkhorn_bwd(upstream.double(), *exact, f, g, n_iter, eps, False, "envelope")
        _, f, g, _, _ = native(cost, a, b, eps=eps, max_iter=30, isa=isa)
        wide = native_bwd(upstream, cost.float(), a, b, f, g, eps=eps, isa=isa)
        assert_grad(wide, want, torch.float32)
        got = native_bwd(upstream, cost, a, b, f, g, eps=eps, isa=isa)
        assert torch.equal(got, wide.to(dtype))
        weightless = (a == 0)[:, :, None] | (b == 0)[:, None, :]
        assert not got[weightless].any()
        shared = native_bwd(upstream, cost, a[:1], b[:1], f, g, eps=eps, isa=isa)
        assert torch.equal(shared[0], got[0])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("eps", [1e-4, 1e-3])
def test_sinkhorn_bwd_small_eps(isa: str, eps: float) -> None:
    """At these potentials, rounded to fp32, entries are right to the rounding of C / eps."""
    cost, a, b = problems(40, 12, 9)
    _, f, g, n_iter, _ = native(cost, a, b, eps=eps, max_iter=200, isa=isa)
    exact = [x.double() for x in (cost, a, b, f, g)]
    want = sinkhorn_bwd(torch.ones(40).double(), *exact, n_iter, eps, False, "envelope")
    got = native_bwd(torch.ones(40), cost, a, b, f, g, eps=eps, isa=isa).double()
    torch.testing.assert_close(got, want, rtol=8 * 2.0**-24 * 2 / eps, atol=1e-30)


@pytest.mark.parametrize("isa", ISAS)
def test_sinkhorn_bwd_forbidden_invalid_and_empty(isa: str) -> None:
    cost, a, b = problems(8, 6, 5)
    cost[1, 2, 3] = math.inf
    cost[2, 1] = math.inf
    cost[3, 0, 0] = math.nan
    b[3, 4] = 0
    a[4] = 0
    b[5, 2], cost[5, :, 2] = 0, math.nan
    _, f, g, _, _ = native(cost, a, b, isa=isa)
    got = native_bwd(torch.ones(8), cost, a, b, f, g, isa=isa)
    assert got[1, 2, 3] == 0
    assert got[1].count_nonzero() == 29
    assert not got[2, 1].any()
    assert got[3, :, :4].isnan().all()
    assert not got[3, :, 4].any()
    assert not got[4].any()
    assert not got[5, :, 2].any()
    assert got[[0, 1, 2, 5, 6, 7]].isfinite().all()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("M", [5, 16, 23])
@pytest.mark.parametrize("similarity", [False, True])
def test_sinkhorn_beside_changes_no_bit(isa: str, dtype: torch.dtype, M: int, similarity: bool) -> None:
    """[B, K, C, M] against [B * C, K, M]; and one problem against all."""
    B, C, K, options = 3, 9, 12, {"isa": isa, "eps": 0.05, "similarity": similarity}
    cost, a, b = problems(B * C, K, M, dtype)
    wide = cost.view(B, C, K, M).transpose(1, 2).contiguous()
    upstream = torch.randn(B * C)
    solved = native(cost, a, b, tol=1e-3, **options)
    assert same(native(wide, a, b, C=C, tol=1e-3, threads=2, **options), solved)
    want = native_bwd(upstream, cost, a, b, *solved[1:3], **options)
    got = native_bwd(upstream, wide, a, b, *solved[1:3], C=C, threads=2, **options)
    assert torch.equal(got.transpose(1, 2).reshape(B * C, K, M), want)
    for p in (0, 13, 26):
        one = slice(p, p + 1)
        alone = [x[one].contiguous() for x in (upstream, cost, a, b, *solved[1:3])]
        assert torch.equal(native_bwd(*alone, **options), want[one])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("eps", [1e-3, 0.05, 0.5, 100.0])
@pytest.mark.parametrize("value", [False, True])
@pytest.mark.parametrize("size", [1.0, 1e-6])
def test_sinkhorn_of_a_similarity(isa: str, dtype: torch.dtype, eps: float, value: bool, size: float) -> None:
    cost, a, b = problems(21, 12, 7)
    sim = (size * (cost - 0.9)).to(dtype)
    sim[3, 2, 1], sim[4, 5], sim[5, :, 2], sim[6, 0, 0] = -math.inf, -math.inf, -math.inf, math.nan
    a[7], a[8, 3:], b[9, :2] = 0, 0, 0
    options = {"eps": eps, "max_iter": 30, "tol": 0.0}
    score, f, g, n_iter, error = native(sim, a, b, value=value, similarity=True, isa=isa, **options)
    exact = sim.double(), a.double(), b.double(), eps, 30, 0.0, value, True
    want = sinkhorn_fwd(*exact)
    scale = 1.0 if value else float(sim[sim.isfinite()].abs().max())
    torch.testing.assert_close(score.double(), want[0], rtol=1e-5, atol=2e-6 * scale, equal_nan=True)
    for x, y in ((f, want[1]), (g, want[2]), (error, want[4])):
        torch.testing.assert_close(x.double(), y, rtol=1e-4, atol=1e-5, equal_nan=True)
    assert torch.equal(n_iter, want[3])
    upstream = torch.randn(21)
    got = native_bwd(upstream, sim, a, b, f, g, eps=eps, similarity=True, isa=isa)
    grads = sinkhorn_bwd(upstream.double(), *exact[:3], *want[1:4], eps, False, "envelope", True)
    whole = torch.tensor([p for p in range(21) if p != 6])
    rounding = 32 * 2.0**-24 / eps + 2 * torch.finfo(dtype).eps
    torch.testing.assert_close(got[whole].double(), grads[whole], rtol=rounding, atol=1e-6)


def test_sinkhorn_bwd_instruction_sets_agree() -> None:
    cost, a, b = problems(50, 32, 16)
    _, f, g, _, _ = native(cost, a, b)
    first, *others = (native_bwd(torch.ones(50), cost, a, b, f, g, isa=isa) for isa in ISAS)
    for other in others:
        torch.testing.assert_close(other, first, rtol=5e-6, atol=1e-12)


def test_sinkhorn_fwd_refuses() -> None:
    with pytest.raises(ValueError, match="isa"):
        native(*problems(1, 2, 2), isa="sse9")
    with pytest.raises(ValueError, match="256"):
        native(*problems(1, 257, 2))
    with pytest.raises(ValueError, match="eps"):
        native(*problems(1, 2, 2), eps=math.nan)
    with pytest.raises(ValueError, match="C must divide"):
        native(*problems(3, 2, 2), C=2)
    cost, a, b = problems(1, 2, 2)
    with pytest.raises(ValueError, match="eps"):
        native_bwd(a[:, 0], cost, a, b, a, b, eps=0.0)
    with pytest.raises(ValueError, match="isa"):
        native_bwd(a[:, 0], cost, a, b, a, b, isa="sse9")


def test_build_info() -> None:
    info = native_info()
    assert info["available"]
    assert info["reason"] is None
    assert info["simd"] == ISAS[-1]
    assert {"version", "compiler", "build_type", "openmp", "cuda_archs"} <= info.keys()
