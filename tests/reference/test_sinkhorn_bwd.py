"""reference.sinkhorn_bwd: each mode against autograd or finite differences of what it differentiates."""

from __future__ import annotations

import math

import pytest
import torch
from tolerance import assert_grad
from torch import Tensor

from spa_fast.reference.sinkhorn import sinkhorn_bwd, sinkhorn_fwd

EPS = 0.15


def problems(P: int, K: int, M: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    cost = torch.rand(P, K, M, dtype=torch.float64)
    a, b = (torch.rand(P, n, dtype=torch.float64) + 0.2 for n in (K, M))
    return (
        cost,
        a / a.sum(1, keepdim=True),
        b / b.sum(1, keepdim=True),
        torch.randn(P, dtype=torch.float64),
    )


class Transport(torch.autograd.Function):
    """The explicit pair as autograd sees it."""

    @staticmethod
    def forward(ctx, cost, a, b, steps, tol, value, mode):  # type: ignore[no-untyped-def]
        score, f, g, n_iter, _ = sinkhorn_fwd(cost, a, b, EPS, steps, tol, value)
        ctx.save_for_backward(cost, a, b, f, g, n_iter)
        ctx.value, ctx.mode = value, mode
        return score

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        return sinkhorn_bwd(grad, *ctx.saved_tensors, EPS, ctx.value, ctx.mode), *(None,) * 6


@pytest.mark.parametrize("value", [False, True])
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_sinkhorn_bwd_unroll_gradcheck(value: bool, steps: int) -> None:
    cost, a, b, _ = problems(2, 4, 3)
    torch.autograd.gradcheck(
        lambda c: Transport.apply(c, a, b, steps, 0.0, value, "unroll"), cost.requires_grad_(), atol=1e-7
    )


@pytest.mark.parametrize("value", [False, True])
@pytest.mark.parametrize("shape", [(2, 3, 5), (2, 5, 3), (1, 1, 4), (1, 4, 1)])
def test_sinkhorn_bwd_implicit_gradcheck_at_convergence(value: bool, shape: tuple[int, int, int]) -> None:
    cost, a, b, _ = problems(*shape)
    torch.autograd.gradcheck(
        lambda c: Transport.apply(c, a, b, 20_000, 1e-14, value, "implicit"), cost.requires_grad_(), atol=1e-6
    )


def test_sinkhorn_bwd_envelope_gradcheck_of_the_converged_value() -> None:
    cost, a, b, _ = problems(2, 5, 3)
    torch.autograd.gradcheck(
        lambda c: Transport.apply(c, a, b, 20_000, 1e-14, True, "envelope"), cost.requires_grad_(), atol=1e-6
    )


@pytest.mark.parametrize("value", [False, True])
def test_sinkhorn_bwd_unroll_honours_each_problems_n_iter(value: bool) -> None:
    cost, a, b, grad = problems(5, 6, 4)
    cost = cost * torch.linspace(0.1, 4, 5, dtype=torch.float64)[:, None, None]
    _, f, g, n_iter, _ = sinkhorn_fwd(cost, a, b, EPS, 300, 1e-4, value)
    assert n_iter.unique().numel() > 2
    ours = sinkhorn_bwd(grad, cost, a, b, f, g, n_iter, EPS, value, "unroll")
    for p in range(5):
        one = slice(p, p + 1)
        c = cost[one].clone().requires_grad_()
        psi = torch.zeros(1, 4, dtype=torch.float64)
        for _ in range(int(n_iter[p])):
            phi = -torch.logsumexp(b[one].log()[:, None, :] + psi[:, None, :] - c / EPS, 2)
            psi = -torch.logsumexp(a[one].log()[:, :, None] + phi[:, :, None] - c / EPS, 1)
        ab = a[one][:, :, None] * b[one][:, None, :]
        plan = ab * (phi[:, :, None] + psi[:, None, :] - c / EPS).exp()
        score = (plan * c).sum((1, 2))
        if value:
            score = score + EPS * (plan * (plan / ab).log() - plan).sum((1, 2))
        want = torch.autograd.grad(score, c, grad[one])[0]
        assert_grad(ours[one], want, torch.float64)


def test_sinkhorn_bwd_modes_agree_where_they_must_and_differ_where_they_do() -> None:
    cost, a, b, grad = problems(3, 6, 4)
    for value in (False, True):
        _, f, g, n_iter, _ = sinkhorn_fwd(cost, a, b, EPS, 2000, 0.0, value)
        grads = {
            mode: sinkhorn_bwd(grad, cost, a, b, f, g, n_iter, EPS, value, mode)
            for mode in ("envelope", "implicit", "unroll")
        }
        assert_grad(grads["implicit"], grads["unroll"], torch.float64)
        apart = (grads["envelope"] - grads["implicit"]).norm() / grads["implicit"].norm()
        assert apart < 1e-9 if value else apart > 0.05


@pytest.mark.parametrize("mode", ["envelope", "implicit", "unroll"])
@pytest.mark.parametrize("value", [False, True])
def test_sinkhorn_bwd_masked_and_forbidden_entries_get_zero(mode: str, value: bool) -> None:
    cost, a, b, grad = problems(4, 5, 4)
    a[0, 3:], b[0, 0] = 0, 0
    cost[0, 3:], cost[0, :, 0] = math.nan, math.inf
    cost[1, 2, 1] = math.inf
    a[2] = 0
    cost[3, 1] = math.inf
    a, b = (w / w.sum(1, keepdim=True).clamp(min=1e-30) for w in (a, b))
    _, f, g, n_iter, _ = sinkhorn_fwd(cost, a, b, EPS, 60, 0.0, value)
    out = sinkhorn_bwd(grad, cost, a, b, f, g, n_iter, EPS, value, mode)
    assert out.isfinite().all()
    assert not out[0, 3:].any()
    assert not out[0, :, 0].any()
    assert out[1, 2, 1] == 0
    assert not out[2].any()
    assert not out[3, 1].any()
    sliced = (cost[:1, :3, 1:], a[:1, :3], b[:1, 1:], f[:1, :3], g[:1, 1:])
    want = sinkhorn_bwd(grad[:1], *sliced, n_iter[:1], EPS, value, mode)
    assert_grad(out[:1, :3, 1:], want, torch.float64)


@pytest.mark.parametrize("mode", ["envelope", "implicit", "unroll"])
@pytest.mark.parametrize("value", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_sinkhorn_bwd_dtypes(mode: str, value: bool, dtype: torch.dtype) -> None:
    cost, a, b, grad = problems(4, 8, 6)
    cost, a, b, grad = cost.to(dtype), a.float(), b.float(), grad.float()
    _, f, g, n_iter, _ = sinkhorn_fwd(cost, a, b, EPS, 15, 0.0, value)
    ours = sinkhorn_bwd(grad, cost, a, b, f, g, n_iter, EPS, value, mode)
    assert ours.dtype == dtype
    exact = (cost.double(), a.double(), b.double())
    _, f, g, n_iter, _ = sinkhorn_fwd(*exact, EPS, 15, 0.0, value)
    assert_grad(ours, sinkhorn_bwd(grad.double(), *exact, f, g, n_iter, EPS, value, mode), dtype)


def test_sinkhorn_bwd_implicit_near_a_permutation() -> None:
    cost = 1 - torch.eye(6, dtype=torch.float64)[None] + 0.01 * torch.rand(1, 6, 6, dtype=torch.float64)
    weights = torch.full((1, 6), 1 / 6, dtype=torch.float64)
    grad = torch.ones(1, dtype=torch.float64)
    for dtype in (torch.float32, torch.float64):
        inputs = (cost.to(dtype), weights.to(dtype), weights.to(dtype))
        _, f, g, n_iter, _ = sinkhorn_fwd(*inputs, 1e-2, 500, 0.0, False)
        out = sinkhorn_bwd(grad.to(dtype), *inputs, f, g, n_iter, 1e-2, False, "implicit")
        torch.testing.assert_close(out[0].double(), torch.eye(6, dtype=torch.float64) / 6, rtol=0, atol=1e-4)


@pytest.mark.parametrize("mode", ["envelope", "implicit", "unroll"])
@pytest.mark.parametrize("value", [False, True])
def test_sinkhorn_bwd_of_a_similarity(mode: str, value: bool) -> None:
    """d/dS of <P, S> = -d/dC of -<P, C> for a plan of mass 1; of the value, -d/dC."""
    cost, a, b, grad = problems(4, 6, 5)
    a[1, 2:], b[2, 0] = 0, 0
    a, b = (w / w.sum(1, keepdim=True) for w in (a, b))
    solved = sinkhorn_fwd(1 - cost, a, b, EPS, 40, 1e-9, value, True)[1:4]
    ours = sinkhorn_bwd(grad, 1 - cost, a, b, *solved, EPS, value, mode, True)
    want = sinkhorn_bwd(grad, cost, a, b, *solved, EPS, value, mode)
    assert_grad(ours, -want if value else want, torch.float64)


@pytest.mark.parametrize("value", [False, True])
def test_sinkhorn_bwd_of_a_similarity_gradcheck(value: bool) -> None:
    sim, a, b, grad = problems(2, 4, 3)

    def score(s: Tensor) -> Tensor:
        return (sinkhorn_fwd(s, a, b, EPS, 5, 0.0, value, True)[0] * grad).sum()

    solved = sinkhorn_fwd(sim, a, b, EPS, 5, 0.0, value, True)[1:4]
    ours = sinkhorn_bwd(grad, sim, a, b, *solved, EPS, value, "unroll", True)
    for _ in range(3):
        direction = torch.randn_like(sim)
        ahead, behind = (score(sim + step * direction) for step in (1e-6, -1e-6))
        assert float((ours * direction).sum()) == pytest.approx(float(ahead - behind) / 2e-6, rel=1e-6)
