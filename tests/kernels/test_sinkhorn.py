"""kernels.sinkhorn_fwd against the fp64 oracle on inputs already rounded to the test dtype."""

from __future__ import annotations

import pytest
import torch
from spa_fast.kernels import BlockConfig, TileConfig, sinkhorn_fwd
from tolerance import TABLE, plan_rtol
from torch import Tensor

from spa_fast.reference import sinkhorn as reference

INF, NAN = float("inf"), float("nan")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def problems(
    device: str, P: int, K: int, M: int, dtype: torch.dtype = torch.float32, scale: float = 2.0
) -> list:
    """Costs in [0, scale] and random weights per problem."""
    rng = torch.Generator().manual_seed(P * 1009 + K * 31 + M)
    cost = torch.rand(P, K, M, generator=rng) * scale
    a, b = torch.rand(P, K, generator=rng) + 0.1, torch.rand(P, M, generator=rng) + 0.1
    a, b = a / a.sum(1, keepdim=True), b / b.sum(1, keepdim=True)
    return [cost.to(dtype).to(device), a.to(device), b.to(device)]


def oracle(cost: Tensor, a: Tensor, b: Tensor, *rest: float) -> tuple[Tensor, ...]:
    return reference.sinkhorn_fwd(cost.double().cpu(), a.double().cpu(), b.double().cpu(), *rest)


def check(
    cost: Tensor,
    a: Tensor,
    b: Tensor,
    eps: float,
    max_iter: int,
    tol: float,
    value: bool,
    config: BlockConfig | None = None,
) -> tuple:
    """All five outputs; arithmetic is fp32 for every input dtype, so is the tolerance."""
    got = sinkhorn_fwd(cost, a, b, eps, max_iter, tol, value, config=config)
    want = oracle(cost, a, b, eps, max_iter, tol, value)
    table, plan = TABLE[torch.float32], plan_rtol(torch.float32, cost, eps)
    # Where the plan is known less well than the table's 2e-5, so is its score.
    s_tol = table.score if plan == table.plan else plan
    p_tol = table.potential * float(cost[cost.isfinite()].abs().max())
    (score, f, g, n_iter, error), names = (t.cpu() for t in got), ("score", "f", "g", "n_iter", "error")
    # Modulo the additive constant: weights whose sums are 1 to rounding move it by eps every iteration.
    rows, cols = a.cpu() > 0, b.cpu() > 0
    off = ((f - want[1]) * rows).sum(1, keepdim=True) / rows.sum(1, keepdim=True).clamp(min=1)
    near_f, near_g = f - off.nan_to_num() * rows, g + off.nan_to_num() * cols
    assert [t.dtype for t in got] == [torch.float32] * 3 + [torch.int32, torch.float32]
    torch.testing.assert_close(n_iter, want[3], rtol=0, atol=0, msg=names[3])
    for x, y, name, r, t in (
        (score, want[0], names[0], s_tol, s_tol),
        (near_f, want[1], names[1], table.potential, p_tol),
        (near_g, want[2], names[2], table.potential, p_tol),
        (error, want[4], names[4], plan, plan),
    ):
        torch.testing.assert_close(
            x.double(), y, rtol=r, atol=t, equal_nan=True, msg=lambda m, name=name: f"{name}: {m}"
        )
    return score, f, g, n_iter, error


@pytest.mark.parametrize("value", [False, True], ids=["transport", "value"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("K", [1, 7, 63])
@pytest.mark.parametrize("M", [1, 5, 16])
def test_sinkhorn_fwd_matches_the_oracle(
    device: str, K: int, M: int, dtype: torch.dtype, value: bool
) -> None:
    check(*problems(device, 3, K, M, dtype), 0.1, 8, 1e-3, value)


@pytest.mark.parametrize("value", [False, True], ids=["transport", "value"])
@pytest.mark.parametrize("eps", [1e-4, 1e-3, 1e-2, 1.0, 10.0, 1e2])
def test_sinkhorn_fwd_over_eps(device: str, eps: float, value: bool) -> None:
    n_iter = check(*problems(device, 5, 7, 5), eps, 6, 0.0, value)[3]
    assert (n_iter == 6).all()


def test_sinkhorn_fwd_196_patches(device: str) -> None:
    check(*problems(device, 2, 196, 20, torch.float16), 0.05, 5, 1e-3, False)


def test_sinkhorn_fwd_both_branches_meet_at_their_threshold(device: str) -> None:
    cost, a, b = problems(device, 4, 7, 5)
    cost[:, 0, 0], cost[:, 0, 1:] = 8.0, cost[:, 0, 1:].clamp(min=0.0)
    cost[:, 0, 1] = 0.0
    below = check(cost, a, b, 0.1 * (1 + 1e-5), 20, 0.0, False)
    above = check(cost, a, b, 0.1 * (1 - 1e-5), 20, 0.0, False)
    torch.testing.assert_close(below[0], above[0], rtol=1e-4, atol=0)


def test_sinkhorn_fwd_one_by_one(device: str) -> None:
    cost = torch.tensor([0.25, 3.0], device=device).reshape(2, 1, 1)
    one = torch.ones(1, 1, device=device)
    score, f, g, n_iter, error = sinkhorn_fwd(cost, one, one, 0.1, 5, 1e-3, True)
    torch.testing.assert_close(score, cost.flatten())
    torch.testing.assert_close((f + g).flatten(), cost.flatten())
    assert n_iter.tolist() == [1, 1]
    assert error.tolist() == [0.0, 0.0]


def test_sinkhorn_fwd_single_row_takes_the_column_weights(device: str) -> None:
    cost, a, b = problems(device, 3, 1, 6)
    score = sinkhorn_fwd(cost, a, b, 0.1, 9, 0.0, False)[0]
    torch.testing.assert_close(score, (cost[:, 0] * b).sum(1))


def test_sinkhorn_fwd_permutation_at_small_eps(device: str) -> None:
    order = [2, 0, 3, 1]
    cost = torch.ones(1, 4, 4, device=device)
    cost[0, range(4), order] = torch.tensor([0.1, 0.2, 0.3, 0.4], device=device)
    quarter = torch.full((1, 4), 0.25, device=device)
    for eps in (5e-3, 1e-3):
        score, *_, error = sinkhorn_fwd(cost, quarter, quarter, eps, 20, 1e-6, False)
        torch.testing.assert_close(score.cpu(), torch.tensor([0.25]), rtol=1e-5, atol=0)
        assert error.item() <= 1e-6


def test_sinkhorn_fwd_separable_cost_is_done_in_one_iteration(device: str) -> None:
    _, a, b = problems(device, 3, 7, 5)
    x, y = torch.linspace(0, 1, 7, device=device), torch.linspace(0, 0.5, 5, device=device)
    cost = (x[:, None] + y).expand(3, 7, 5).contiguous()
    score, _, _, n_iter, error = sinkhorn_fwd(cost, a, b, 0.1, 50, 1e-5, False)
    torch.testing.assert_close(score, a @ x + b @ y)
    assert n_iter.tolist() == [1, 1, 1]
    assert (error < 1e-6).all()


@pytest.mark.parametrize("forbid", [False, True], ids=["kernel-space", "log-domain"])
def test_sinkhorn_fwd_each_problem_stops_by_itself(device: str, forbid: bool) -> None:
    cost, a, b = problems(device, 12, 7, 5)
    cost *= torch.linspace(0.05, 1, 12, device=device)[:, None, None]
    if forbid:
        cost[:, 0, 0] = INF
    n_iter, error = check(cost, a, b, 0.1, 40, 1e-2, False)[3:]
    assert len(n_iter.unique()) >= 4
    assert ((error <= 1e-2) | (n_iter == 40)).all()


@pytest.mark.parametrize("eps", [0.1, 1e-3])
@pytest.mark.parametrize("junk", [NAN, INF, -1e30])
def test_sinkhorn_fwd_zero_weights_take_no_part(device: str, eps: float, junk: float) -> None:
    cost, a, b = problems(device, 4, 5, 3)
    short = sinkhorn_fwd(cost, a, b, eps, 10, 1e-3, True)
    wide = torch.full((4, 7, 5), junk, device=device)
    wide[:, :5, :3] = cost
    zero = torch.zeros(4, 2, device=device)
    score, f, g, n_iter, error = sinkhorn_fwd(
        wide, torch.cat([a, zero], 1), torch.cat([b, zero], 1), eps, 10, 1e-3, True
    )
    assert not f[:, 5:].any()
    assert not g[:, 3:].any()
    rtol = max(1e-5, 8 * 2**-24 * 2 / eps)
    for x, y in zip((score, f[:, :5], g[:, :3], n_iter, error), short, strict=True):
        torch.testing.assert_close(x, y, rtol=rtol, atol=rtol)


@pytest.mark.parametrize("value", [False, True], ids=["transport", "value"])
def test_sinkhorn_fwd_forbidden_pairs(device: str, value: bool) -> None:
    cost, a, b = problems(device, 4, 7, 5)
    cost[0, 2, 1:4] = INF
    cost[1, 3, :] = INF
    cost[2, :, 4] = INF
    cost[3] = INF
    _, f, g, n_iter, error = check(cost, a, b, 0.1, 30, 1e-3, value)
    assert f[1, 3] == 0
    assert g[2, 4] == 0
    assert not f[3].any()
    assert not g[3].any()
    assert (error[1:] > 1e-3).all()
    assert (n_iter[1:] == 30).all()


def test_sinkhorn_fwd_infeasible_is_flagged_and_stays_finite(device: str) -> None:
    """All rows but the last may only go to column 0, which cannot take them: potentials drift for ever."""
    cost, a, b = problems(device, 2, 7, 5)
    cost[:, :6, 1:] = INF
    assert (check(cost, a, b, 0.1, 30, 1e-3, False)[4] > 0.1).all()
    for t in sinkhorn_fwd(cost, a, b, 0.1, 300, 1e-3, True):
        assert t.isfinite().all()


@pytest.mark.parametrize("value", [False, True], ids=["transport", "value"])
def test_sinkhorn_fwd_problem_without_mass_is_zero(device: str, value: bool) -> None:
    cost, a, b = problems(device, 4, 7, 5)
    a[0], b[1] = 0, 0
    a[2], b[2] = 0, 0
    outputs = check(cost, a, b, 0.1, 5, 1e-3, value)
    assert not any(t[:3].any() for t in outputs)


@pytest.mark.parametrize("bad", [NAN, -INF])
def test_sinkhorn_fwd_nan_stays_in_its_problem(device: str, bad: float) -> None:
    cost, a, b = problems(device, 4, 7, 5)
    a[1, 6] = 0
    clean = sinkhorn_fwd(cost, a, b, 0.1, 10, 1e-3, False)
    cost[1, 2, 3] = bad
    score, f, g, n_iter, error = sinkhorn_fwd(cost, a, b, 0.1, 10, 1e-3, False)
    assert score[1].isnan()
    assert f[1, :6].isnan().all()
    assert f[1, 6] == 0
    assert g[1].isnan().all()
    assert error[1].isnan()
    assert n_iter[1] == 0
    for x, y in zip((score, f, g, n_iter, error), clean, strict=True):
        assert torch.equal(x[[0, 2, 3]], y[[0, 2, 3]])


@pytest.mark.parametrize("value", [False, True], ids=["transport", "value"])
@pytest.mark.parametrize("eps", [1e-4, 0.1, 1e2])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sinkhorn_fwd_large_costs_stay_finite(
    device: str, dtype: torch.dtype, eps: float, value: bool
) -> None:
    for t in sinkhorn_fwd(*problems(device, 3, 7, 5, dtype, scale=1e4), eps, 6, 1e-3, value):
        assert t.isfinite().all()


def test_sinkhorn_fwd_batch_of_one_equals_batch_of_n(device: str) -> None:
    """Bitwise, with easy, wide-range, forbidden, empty and NaN problems side by side in one program."""
    cost, a, b = problems(device, 9, 7, 5)
    cost[1::3] *= 40
    cost[2, 1, 1], cost[4, 0, 0], a[5] = INF, NAN, 0
    together = sinkhorn_fwd(cost, a, b, 0.1, 12, 1e-3, False)
    for p in range(9):
        alone = sinkhorn_fwd(cost[p : p + 1].clone(), a[p : p + 1], b[p : p + 1], 0.1, 12, 1e-3, False)
        for x, y in zip(together, alone, strict=True):
            torch.testing.assert_close(x[p : p + 1], y, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("value", [False, True], ids=["transport", "value"])
def test_sinkhorn_fwd_shared_weights_equal_expanded_ones(device: str, value: bool) -> None:
    cost, a, b = problems(device, 6, 7, 5)
    shared = sinkhorn_fwd(cost, a[:1], b[:1], 0.1, 10, 1e-3, value)
    expanded = sinkhorn_fwd(
        cost, a[:1].expand(6, 7).contiguous(), b[:1].expand(6, 5).contiguous(), 0.1, 10, 1e-3, value
    )
    assert all(torch.equal(x, y) for x, y in zip(shared, expanded, strict=True))


def test_sinkhorn_fwd_no_problems(device: str) -> None:
    cost, a, b = problems(device, 1, 7, 5)
    shapes = [tuple(t.shape) for t in sinkhorn_fwd(cost[:0], a, b[:0], 0.1, 10, 1e-3, False)]
    assert shapes == [(0,), (0, 7), (0, 5), (0,), (0,)]


@pytest.mark.parametrize("config", [TileConfig(1, 32, 1, 1), TileConfig(1, 1, 4, 8), TileConfig(2, 8, 8, 1)])
def test_sinkhorn_fwd_config_changes_only_rounding(device: str, config: TileConfig) -> None:
    inputs = problems(device, 5, 7, 5)
    for x, y in zip(
        sinkhorn_fwd(*inputs, 0.1, 10, 1e-3, False, config=config),
        sinkhorn_fwd(*inputs, 0.1, 10, 1e-3, False),
        strict=True,
    ):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("config", [None, BlockConfig(1, 16)], ids=["registers", "blocks"])
@pytest.mark.parametrize("value", [False, True], ids=["transport", "value"])
@pytest.mark.parametrize("eps", [0.1, 1e-3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_sinkhorn_fwd_all_pairs_of_similarities(
    device: str, dtype: torch.dtype, eps: float, value: bool, config: BlockConfig | None
) -> None:
    """[B, K, C, M] of S = 1 - C, of which one pair is forbidden and one row takes no part."""
    B, K, C, M = 2, 7, 5, 3
    stored = (2 * torch.rand(B, K, C, M) - 1).to(dtype)
    stored[0, 2, 1, 1] = -INF
    stored[1, 6] = NAN
    a, b = torch.rand(B * C, K) + 0.1, torch.rand(B * C, M) + 0.1
    a[C:, 6] = 0
    a, b = a / a.sum(1, keepdim=True), b / b.sum(1, keepdim=True)
    got = sinkhorn_fwd(*(x.to(device) for x in (stored, a, b)), eps, 6, 0.0, value, True, config)
    cost = 1 - stored.double().transpose(1, 2).reshape(B * C, K, M)
    want = reference.sinkhorn_fwd(cost, a.double(), b.double(), eps, 6, 0.0, value)
    score = want[0]
    if not value:
        plan = reference.sinkhorn_plan(cost, a.double(), b.double(), want[1], want[2], eps)
        score = torch.where(plan > 0, plan * (1 - cost), 0.0).sum((1, 2))
    rtol = plan_rtol(torch.float32, cost, eps)
    for x, y, r in zip(got, (score, *want[1:]), (rtol, 1e-5, 1e-5, 0, rtol), strict=True):
        torch.testing.assert_close(x.cpu().double(), y.double(), rtol=r, atol=2 * r)


def test_sinkhorn_fwd_tiny_similarities_do_not_cancel(device: str) -> None:
    """1 - S would round S of 1e-9 away; the score is known to fp32 all the same."""
    S = 1e-9 * torch.randn(4, 7, 5)
    a, b = torch.full((1, 7), 1 / 7), torch.full((1, 5), 1 / 5)
    score = sinkhorn_fwd(*(x.to(device) for x in (S, a, b)), 0.1, 5, 0.0, False, True)[0].cpu().double()
    want = S.double().mean((1, 2))
    torch.testing.assert_close(score, want, rtol=0, atol=1e-6 * 1e-9)


@pytest.mark.parametrize("forbid", [False, True], ids=["kernel-space", "log-domain"])
@pytest.mark.parametrize("config", [None, BlockConfig(1, 16)], ids=["registers", "blocks"])
@pytest.mark.parametrize("scale", [2.0, 1e-2, 1e-5])
@pytest.mark.parametrize("eps", [1.0, 1e2])
def test_sinkhorn_fwd_value_of_costs_small_beside_eps(
    device: str, eps: float, scale: float, config: BlockConfig | None, forbid: bool
) -> None:
    cost, a, b = problems(device, 4, 7, 5, scale=scale)
    if forbid:
        cost[:, 0, 0] = INF
    score = sinkhorn_fwd(cost, a, b, eps, 8, 0.0, True, config=config)[0]
    want = oracle(cost, a, b, eps, 8, 0.0, True)[0]
    torch.testing.assert_close(score.cpu().double(), want, rtol=TABLE[torch.float32].score, atol=0)


# What passes over the cost in blocks obeys the same contract; small blocks stand for large problems.
BLOCKS = BlockConfig(1, 16)


@pytest.mark.parametrize("value", [False, True], ids=["transport", "value"])
@pytest.mark.parametrize(("dtype", "eps"), [(torch.float32, 0.1), (torch.float16, 1e-3)], ids=str)
def test_sinkhorn_fwd_in_blocks_matches_the_oracle(
    device: str, dtype: torch.dtype, eps: float, value: bool
) -> None:
    check(*problems(device, 2, 7, 5, dtype), eps, 6, 1e-3, value, BLOCKS)


@pytest.mark.parametrize("value", [False, True], ids=["transport", "value"])
def test_sinkhorn_fwd_in_blocks_forbidden_empty_and_bad(device: str, value: bool) -> None:
    cost, a, b = problems(device, 6, 7, 5)
    cost[0, 2, 1:4], cost[1, 3, :], cost[2, :, 4] = INF, INF, INF
    a[3], b[4, 2:] = 0, 0
    cost[4, :, 2:], cost[5, 1, 1] = NAN, -INF
    check(*(x[:4].contiguous() for x in (cost, a, b)), 0.1, 12, 1e-3, value, BLOCKS)
    run = (0.1, 5, 1e-3, value, False, BLOCKS)
    whole = [x[4] for x in sinkhorn_fwd(cost, a, b, *run)]
    short = sinkhorn_fwd(cost[4:5, :, :2].contiguous(), a[4:5], b[4:5, :2].contiguous(), *run)
    for x, y in zip(whole, short, strict=True):
        assert torch.equal(x[: y[0].numel()] if x.dim() else x, y[0])
    assert not whole[2][2:].any()
    out = sinkhorn_fwd(cost[4:], a[4:], b[4:], *run)
    assert all(x[1].isnan().all() for x in (out[0], out[1], out[2], out[4]))
    assert out[3][1] == 0


def test_sinkhorn_fwd_past_the_registers_takes_blocks(device: str) -> None:
    """256 x 33 pads to 16384 entries; one iteration, the interpreter being slow."""
    check(*problems(device, 1, 256, 33), 0.1, 2, 0.0, False)


def test_sinkhorn_fwd_large_costs_stay_finite_in_blocks(device: str) -> None:
    for t in sinkhorn_fwd(*problems(device, 2, 7, 5, scale=1e4), 1e-4, 6, 1e-3, True, False, BLOCKS):
        assert t.isfinite().all()


@pytest.mark.gpu
@pytest.mark.parametrize(("K", "M"), [(256, 256), (197, 63), (64, 256)])
def test_sinkhorn_fwd_in_blocks_on_a_device(K: int, M: int) -> None:
    check(*problems("cuda", 5, K, M, torch.float16), 0.05, 40, 1e-3, False)
