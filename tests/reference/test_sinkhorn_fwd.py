"""reference.sinkhorn_fwd: closed forms, properties, masks, hostile costs."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tolerance import assert_plan, assert_potentials, assert_score, plan_rtol
from torch import Tensor

from spa_fast.reference.sinkhorn import sinkhorn_fwd, sinkhorn_plan


def problems(P: int, K: int, M: int, seed: int = 0, uniform: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    cost = 2 * torch.rand(P, K, M, generator=generator, dtype=torch.float64)
    if uniform:
        weights = (torch.ones(1, K, dtype=torch.float64), torch.ones(1, M, dtype=torch.float64))
    else:
        weights = tuple(torch.rand(P, n, generator=generator, dtype=torch.float64) + 0.1 for n in (K, M))
    a, b = (w / w.sum(1, keepdim=True) for w in weights)
    return cost, a, b


def plain_loop(cost: Tensor, a: Tensor, b: Tensor, eps: float, steps: int) -> tuple[Tensor, Tensor]:
    g = torch.zeros(cost.shape[0], cost.shape[2], dtype=cost.dtype)
    for _ in range(steps):
        f = -eps * torch.logsumexp(b.log()[:, None, :] + (g[:, None, :] - cost) / eps, 2)
        g = -eps * torch.logsumexp(a.log()[:, :, None] + (f[:, :, None] - cost) / eps, 1)
    return f, g


sizes = st.integers(1, 9)


@given(K=sizes, M=sizes, steps=st.integers(1, 12), eps=st.floats(0.02, 10), seed=st.integers(0, 99))
def test_sinkhorn_fwd_is_the_plain_iteration(K: int, M: int, steps: int, eps: float, seed: int) -> None:
    cost, a, b = problems(3, K, M, seed)
    for value in (False, True):
        score, f, g, n_iter, error = sinkhorn_fwd(cost, a, b, eps, steps, 0.0, value)
        f_ref, g_ref = plain_loop(cost, a, b, eps, steps)
        torch.testing.assert_close(f, f_ref, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(g, g_ref, rtol=1e-10, atol=1e-12)
        ab = a[:, :, None] * b[:, None, :]
        plan = ab * ((f_ref[:, :, None] + g_ref[:, None, :] - cost) / eps).exp()
        expected = (plan * cost).sum((1, 2))
        if value:
            expected = expected + eps * (plan * (plan / ab).log() - plan + ab).nan_to_num().sum((1, 2))
        torch.testing.assert_close(score, expected, rtol=1e-10, atol=1e-11)
        torch.testing.assert_close(error, (plan.sum(2) - a).abs().sum(1), rtol=1e-8, atol=1e-13)
        assert (n_iter == steps).all()


def test_sinkhorn_fwd_marginals() -> None:
    cost, a, b = problems(4, 7, 5)
    _, f, g, n_iter, error = sinkhorn_fwd(cost, a, b, 0.1, 10_000, 1e-11, False)
    plan = sinkhorn_plan(cost, a, b, f, g, 0.1)
    torch.testing.assert_close(plan.sum(2), a, rtol=0, atol=1e-11)
    torch.testing.assert_close(plan.sum(1), b, rtol=1e-12, atol=0)
    assert (error <= 1e-11).all()
    assert (n_iter < 10_000).all()


def test_sinkhorn_fwd_each_problem_stops_by_itself() -> None:
    cost, a, b = problems(6, 8, 6)
    cost *= torch.linspace(0.1, 3, 6, dtype=torch.float64)[:, None, None]
    together = sinkhorn_fwd(cost, a, b, 0.1, 500, 1e-6, False)
    assert together[3].unique().numel() > 2
    for p in range(6):
        alone = sinkhorn_fwd(cost[p : p + 1], a[p : p + 1], b[p : p + 1], 0.1, 500, 1e-6, False)
        for x, y in zip(together, alone, strict=True):
            assert torch.equal(x[p : p + 1], y)
        previous = sinkhorn_fwd(
            cost[p : p + 1], a[p : p + 1], b[p : p + 1], 0.1, int(alone[3]) - 1, 0.0, False
        )
        assert alone[4] <= 1e-6 < previous[4]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("eps", [1e-2, 0.1, 1.0, 100.0])
@pytest.mark.parametrize("value", [False, True])
def test_sinkhorn_fwd_dtypes(dtype: torch.dtype, eps: float, value: bool) -> None:
    cost, a, b = problems(4, 9, 6)
    cost = cost.to(dtype)
    score, f, g, _, error = sinkhorn_fwd(cost, a.float(), b.float(), eps, 30, 0.0, value)
    assert {x.dtype for x in (score, f, g, error)} == {torch.float32}
    want = sinkhorn_fwd(cost.double(), a.float().double(), b.float().double(), eps, 30, 0.0, value)
    assert_score(score, want[0], torch.float32)
    assert_potentials(f, want[1], torch.float32, scale=2.0)
    assert_potentials(g, want[2], torch.float32, scale=2.0)
    plans = (
        sinkhorn_plan(cost, a.float(), b.float(), f, g, eps),
        sinkhorn_plan(cost.double(), a.float().double(), b.float().double(), want[1], want[2], eps),
    )
    assert_plan(*plans, rtol=plan_rtol(dtype, cost, eps))


def test_sinkhorn_fwd_1x1_and_one_row_or_column() -> None:
    for K, M in ((1, 1), (1, 6), (6, 1)):
        cost, a, b = problems(3, K, M)
        score, f, g, n_iter, error = sinkhorn_fwd(cost, a, b, 0.1, 100, 1e-9, False)
        plan = a[:, :, None] * b[:, None, :]
        torch.testing.assert_close(score, (plan * cost).sum((1, 2)))
        torch.testing.assert_close(sinkhorn_plan(cost, a, b, f, g, 0.1), plan)
        assert (n_iter == 1).all()
        assert (error <= 1e-9).all()


def test_sinkhorn_fwd_permutation_at_small_eps() -> None:
    order = torch.randperm(6)
    cost = 1 - torch.eye(6, dtype=torch.float64)[order][None]
    weights = torch.full((1, 6), 1 / 6, dtype=torch.float64)
    score, f, g, _, _ = sinkhorn_fwd(cost, weights, weights, 1e-2, 1000, 1e-12, False)
    torch.testing.assert_close(sinkhorn_plan(cost, weights, weights, f, g, 1e-2)[0], (1 - cost[0]) / 6)
    assert score.abs() < 1e-12


def test_sinkhorn_fwd_separable_cost_and_large_eps_give_the_product() -> None:
    _, a, b = problems(3, 5, 4)
    u, v = torch.randn(3, 5, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)
    cost = u[:, :, None] + v[:, None, :]
    score, f, g, n_iter, _ = sinkhorn_fwd(cost, a, b, 0.05, 50, 1e-10, False)
    torch.testing.assert_close(
        sinkhorn_plan(cost, a, b, f, g, 0.05), a[:, :, None] * b[:, None, :], rtol=1e-9, atol=0
    )
    torch.testing.assert_close(score, (a * u).sum(1) + (b * v).sum(1))
    assert (n_iter == 1).all()
    cost, a, b = problems(3, 5, 4)
    score = sinkhorn_fwd(cost, a, b, 1e5, 10, 0.0, False)[0]
    torch.testing.assert_close(score, (a[:, :, None] * b[:, None, :] * cost).sum((1, 2)), rtol=1e-5, atol=0)


def test_sinkhorn_fwd_2x2_closed_form() -> None:
    # P = [[t, 1/2 - t], [1/2 - t, t]] with (t / (1/2 - t))^2 = exp((C12 + C21 - C11 - C22) / eps).
    cost, eps = torch.tensor([[[0.1, 0.9], [0.7, 0.3]]], dtype=torch.float64), 0.2
    half = torch.full((1, 2), 0.5, dtype=torch.float64)
    ratio = math.exp((0.9 + 0.7 - 0.1 - 0.3) / (2 * eps))
    t = 0.5 * ratio / (1 + ratio)
    score, f, g, _, _ = sinkhorn_fwd(cost, half, half, eps, 1000, 1e-13, False)
    expected = torch.tensor([[[t, 0.5 - t], [0.5 - t, t]]], dtype=torch.float64)
    torch.testing.assert_close(sinkhorn_plan(cost, half, half, f, g, eps), expected)
    torch.testing.assert_close(score, (expected * cost).sum((1, 2)))


@given(seed=st.integers(0, 99), shift=st.floats(-5, 5), scale=st.floats(0.1, 10))
def test_sinkhorn_fwd_shift_scale_permutation(seed: int, shift: float, scale: float) -> None:
    cost, a, b = problems(2, 6, 5, seed)
    for value in (False, True):
        base = sinkhorn_fwd(cost, a, b, 0.3, 9, 0.0, value)[0]
        shifted = sinkhorn_fwd(cost + shift, a, b, 0.3, 9, 0.0, value)[0]
        torch.testing.assert_close(shifted, base + shift, rtol=1e-9, atol=1e-10)
        scaled = sinkhorn_fwd(cost * scale, a, b, 0.3 * scale, 9, 0.0, value)[0]
        torch.testing.assert_close(scaled, base * scale, rtol=1e-9, atol=1e-11)
        rows, cols = torch.randperm(6), torch.randperm(5)
        moved = sinkhorn_fwd(cost[:, rows][:, :, cols], a[:, rows], b[:, cols], 0.3, 9, 0.0, value)
        torch.testing.assert_close(moved[0], base, rtol=1e-10, atol=1e-12)


def test_sinkhorn_fwd_transposed_problem_has_the_same_value() -> None:
    cost, a, b = problems(3, 6, 4)
    value = sinkhorn_fwd(cost, a, b, 0.2, 5000, 1e-12, True)[0]
    other = sinkhorn_fwd(cost.transpose(1, 2).contiguous(), b, a, 0.2, 5000, 1e-12, True)[0]
    torch.testing.assert_close(value, other, rtol=1e-9, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("tol", [0.0, 1e-3])
@given(K=st.integers(1, 20), M=st.integers(1, 20), seed=st.integers(0, 99))
def test_sinkhorn_fwd_masked_suffix_is_a_slice_bitwise(
    dtype: torch.dtype, tol: float, K: int, M: int, seed: int
) -> None:
    cost, _, _ = problems(3, 23, 21, seed)
    cost = cost.to(dtype)
    a, b = torch.zeros(1, 23, dtype=dtype), torch.zeros(1, 21, dtype=dtype)
    a[:, :K], b[:, :M] = 1 / K, 1 / M
    cost[:, K:], cost[:, :, M:] = math.nan, math.inf
    for value in (False, True):
        masked = sinkhorn_fwd(cost, a, b, 0.1, 15, tol, value)
        sliced = sinkhorn_fwd(
            cost[:, :K, :M].contiguous(), a[:, :K].contiguous(), b[:, :M].contiguous(), 0.1, 15, tol, value
        )
        assert torch.equal(masked[0], sliced[0])
        assert torch.equal(masked[1][:, :K], sliced[1])
        assert torch.equal(masked[2][:, :M], sliced[2])
        assert torch.equal(masked[3], sliced[3])
        assert torch.equal(masked[4], sliced[4])
        assert not masked[1][:, K:].any()
        assert not masked[2][:, M:].any()


def test_sinkhorn_fwd_zero_problem() -> None:
    cost, a, b = problems(3, 4, 5)
    cost[1] = math.nan
    a[1] = 0
    b[2] = 0
    score, f, g, n_iter, error = sinkhorn_fwd(cost, a, b, 0.1, 20, 1e-3, True)
    for p in (1, 2):
        assert score[p] == 0
        assert n_iter[p] == 0
        assert error[p] == 0
        assert not f[p].any()
        assert not g[p].any()
    assert n_iter[0] > 0


def test_sinkhorn_fwd_forbidden_pairs() -> None:
    cost, a, b = problems(2, 5, 4, uniform=True)
    cost[0, 0, 1:] = math.inf
    large = cost.clone()
    large[0, 0, 1:] = 1e4
    for value in (False, True):
        ours, other = (sinkhorn_fwd(c, a, b, 0.1, 3000, 1e-9, value) for c in (cost, large))
        torch.testing.assert_close(ours[0], other[0], rtol=1e-6, atol=0)
    cost[0, 0] = math.inf
    cost[0, :, 2] = math.inf
    score, f, g, _, error = sinkhorn_fwd(cost, a, b, 0.1, 50, 1e-6, False)
    assert f[0, 0] == 0
    assert g[0, 2] == 0
    assert error[0] >= 0.2
    assert score.isfinite().all()
    assert not sinkhorn_plan(cost, a, b, f, g, 0.1)[0, 0].any()


@pytest.mark.parametrize("bad", [math.nan, -math.inf])
def test_sinkhorn_fwd_nan_stays_in_its_problem(bad: float) -> None:
    cost, a, b = problems(3, 4, 5)
    clean = sinkhorn_fwd(cost, a, b, 0.1, 20, 1e-3, False)
    cost[1, 2, 3] = bad
    dirty = sinkhorn_fwd(cost, a, b, 0.1, 20, 1e-3, False)
    for index, (x, y) in enumerate(zip(clean, dirty, strict=True)):
        assert torch.equal(x[::2], y[::2])
        if index != 3:
            assert y[1].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("eps", [1e-4, 1e-3, 1e-2, 1.0, 100.0])
@pytest.mark.parametrize("top", [2.0, 1e4])
def test_sinkhorn_fwd_extremes_are_finite(dtype: torch.dtype, eps: float, top: float) -> None:
    cost, a, b = problems(4, 8, 6)
    cost = (cost / 2 * top).to(dtype)
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    for value in (False, True):
        out = sinkhorn_fwd(cost, a.to(acc), b.to(acc), eps, 200, 1e-3, value)
        assert all(x.isfinite().all() for x in out)
        want = sinkhorn_fwd(cost.double(), a.to(acc).double(), b.to(acc).double(), eps, 500, 1e-6, value)
        done = (out[4] <= 1e-3) & (want[4] <= 1e-6)
        torch.testing.assert_close(out[0][done].double(), want[0][done], rtol=2e-3, atol=2e-3 * top)


def test_sinkhorn_fwd_empty_batch() -> None:
    out = sinkhorn_fwd(torch.zeros(0, 3, 2), torch.ones(1, 3) / 3, torch.ones(1, 2) / 2, 0.1, 5, 0.0, True)
    assert [tuple(x.shape) for x in out] == [(0,), (0, 3), (0, 2), (0,), (0,)]


@given(seed=st.integers(0, 99), eps=st.floats(0.05, 10), value=st.booleans())
def test_sinkhorn_fwd_similarity_is_the_cost_one_minus_s(seed: int, eps: float, value: bool) -> None:
    cost, a, b = problems(3, 6, 5, seed)
    a[1, 2:] = 0
    cost[2, 1], cost[2, 0, 3] = math.inf, math.inf
    ours = sinkhorn_fwd(1 - cost, a, b, eps, 15, 1e-6, value, True)
    score, *want = sinkhorn_fwd(cost, a, b, eps, 15, 1e-6, value)
    plans = [sinkhorn_plan(x, a, b, *ours[1:3], eps, flag) for x, flag in ((1 - cost, True), (cost, False))]
    torch.testing.assert_close(*plans, rtol=1e-9, atol=1e-15)
    torch.testing.assert_close(ours[0], score if value else plans[1].sum((1, 2)) - score)
    for x, y in zip(ours[1:], want, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("size", [1e-7, 1e-20])
def test_sinkhorn_fwd_similarity_keeps_what_one_minus_s_loses(size: float) -> None:
    S, a, b = problems(4, 6, 5)
    S = (size * S).float()
    got = sinkhorn_fwd(S, a.float(), b.float(), 0.1, 20, 0.0, False, True)[0]
    want = (a[:, :, None] * b[:, None, :] * S.double()).sum((1, 2))
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=0)
    assert not sinkhorn_fwd(0 * S, a.float(), b.float(), 0.1, 20, 1e-3, False, True)[0].any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("top", [1e-4, 1e-2, 1.0])
@pytest.mark.parametrize("eps", [1.0, 100.0, 1e4])
def test_sinkhorn_fwd_value_at_large_eps(dtype: torch.dtype, top: float, eps: float) -> None:
    """What potentials of size C hold of eps log sums, to the rounding of C."""
    cost, a, b = problems(4, 9, 6)
    cost, a, b = (top * cost).to(dtype), a.float(), b.float()
    got = sinkhorn_fwd(cost, a, b, eps, 30, 0.0, True)
    want = sinkhorn_fwd(cost.double(), a.double(), b.double(), eps, 30, 0.0, True)
    torch.testing.assert_close(got[0].double(), want[0], rtol=1e-6, atol=0)
    for x, y in zip(got[1:3], want[1:3], strict=True):
        torch.testing.assert_close(x.double(), y, rtol=1e-6, atol=1e-6 * top)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("eps", [1e-10, 1e-30])
def test_sinkhorn_fwd_costs_that_eps_cannot_resolve_are_never_converged(
    dtype: torch.dtype, eps: float
) -> None:
    """C / eps of which rounding leaves more than 1 gives equal potentials in turn: no sign of being right."""
    inputs = (x.to(dtype) for x in problems(4, 4, 5))
    error = sinkhorn_fwd(*inputs, eps, 20, 1e-3, False)[4]
    assert (error > 0.1).all()
