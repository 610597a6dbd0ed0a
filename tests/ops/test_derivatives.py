"""Which derivatives there are: reverse mode, the second one of "unroll"; the others are refused, never 0."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from spa_fast import SinkhornAlign, sinkhorn, sinkhorn_align
from spa_fast.compat import SamplesLoss, log_optimal_transport, ot_sinkhorn2, plot_sinkhorn
from spa_fast.transport import SOLVERS, align_similarity

TOKENS, POINTS = torch.randn(3, 5, 4), torch.rand(7, 4)
FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "cost": sinkhorn,
    "sim": align_similarity,
    "patches": lambda x: sinkhorn_align(x, TOKENS),
    "tokens": lambda x: SinkhornAlign()(TOKENS, x),
    "a": lambda x: sinkhorn(torch.rand(2, 5, 4), x[0, :, 0]),
    "b": lambda x: sinkhorn_align(torch.rand(2, 6, 3), torch.rand(3, 4, 3), b=x[0, 0]),
    "x": lambda x: SamplesLoss(blur=0.5)(x[0], POINTS),
    "y": lambda x: SamplesLoss(blur=0.5)(POINTS, x[0]),
    "M": lambda x: ot_sinkhorn2(None, None, x, 0.1),
    "scores": lambda x: log_optimal_transport(x, 0.1, 3),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_forward_mode_is_refused(name: str) -> None:
    x = torch.rand(2, 5, 4)
    with pytest.raises(RuntimeError, match=f"{name}: expected a tensor without a tangent"):
        torch.func.jvp(FUNCTIONS[name], (x,), (torch.ones_like(x),))
    with (
        forward_ad.dual_level(),
        pytest.raises(RuntimeError, match=f"{name}: expected a tensor without a tangent"),
    ):
        FUNCTIONS[name](forward_ad.make_dual(x, torch.ones_like(x)))
    assert FUNCTIONS[name](x).isfinite().all()


@pytest.mark.parametrize("solver", SOLVERS)
def test_forward_mode_is_refused_by_every_solver(solver: str) -> None:
    x = torch.rand(2, 5, 4)
    with pytest.raises(RuntimeError, match="patches: expected a tensor without a tangent"):
        torch.func.jacfwd(lambda p: sinkhorn_align(p, TOKENS, solver=solver))(x)


@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.vjp, torch.func.hessian])
def test_gradients_of_torch_func_are_refused(transform: Callable[..., object]) -> None:
    def total(cost: Tensor) -> Tensor:
        return sinkhorn(cost).sum()

    x = torch.rand(2, 5, 4)
    with pytest.raises(
        RuntimeError, match=r"cost: expected a tensor (outside of|without).*torch.autograd.grad"
    ):
        transform(total, x) if transform is torch.func.vjp else transform(total)(x)
    # What is constant there may be transported.
    constant = torch.func.grad(lambda y: (y * total(torch.ones(5, 4))).sum())(x)
    torch.testing.assert_close(constant, torch.ones(2, 5, 4))


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_vmap_is_the_batch() -> None:
    cost, a = torch.rand(3, 2, 5, 4), torch.rand(3, 5) + 0.1
    got = torch.func.vmap(lambda c, w: sinkhorn(c, w, return_plan=True))(cost, a)
    want = sinkhorn(cost, a[:, None], return_plan=True)
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x, y)
    patches = torch.randn(3, 2, 6, 4)
    scores = torch.func.vmap(lambda p: plot_sinkhorn(p @ p.mT) + sinkhorn_align(p, TOKENS)[:, 0])(patches)
    assert scores.shape == (3, 2)
    torch.testing.assert_close(
        torch.func.vmap(lambda p: sinkhorn_align(p, TOKENS))(patches),
        sinkhorn_align(patches.flatten(0, 1), TOKENS).view(3, 2, 3),
    )


@pytest.mark.parametrize("score", ["transport", "value"])
@pytest.mark.parametrize("fn", [sinkhorn, align_similarity])
def test_second_derivative_of_unroll(fn: Callable[..., Tensor], score: str) -> None:
    x = torch.rand(2, 4, 3, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradgradcheck(lambda c: fn(c, grad="unroll", max_iter=4, tol=0, score=score), x)
    masked = torch.tensor([1.0, 0.0, 2.0, 1.0], dtype=torch.float64)
    torch.autograd.gradgradcheck(lambda c: fn(c, masked, grad="unroll", max_iter=3, tol=0, score=score), x)


def test_second_derivative_of_unroll_on_every_backend(backend_device: tuple[str, str]) -> None:
    backend, device = backend_device
    cost = torch.rand(3, 5, 4)
    found = []
    for name, x in ((backend, cost.to(device)), ("reference", cost.double())):
        leaf = x.detach().requires_grad_()
        (first,) = torch.autograd.grad(
            sinkhorn(leaf, grad="unroll", max_iter=6, tol=0, backend=name).sum(), leaf, create_graph=True
        )
        (second,) = torch.autograd.grad(first.square().sum(), leaf)
        found.append((first.detach().double().cpu(), second.double().cpu()))
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-5)


def test_second_derivative_of_align() -> None:
    patches, tokens = (torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    torch.autograd.gradgradcheck(
        lambda p, s: sinkhorn_align(p, s, grad="unroll", max_iter=3, tol=0), (patches, tokens)
    )


@pytest.mark.parametrize("grad", ["envelope", "implicit"])
@pytest.mark.parametrize("score", ["transport", "value"])
def test_other_second_derivatives_are_refused(backend_device: tuple[str, str], grad: str, score: str) -> None:
    backend, device = backend_device
    cost = torch.rand(3, 5, 4, device=device, requires_grad=True)
    (first,) = torch.autograd.grad(
        sinkhorn(cost, grad=grad, score=score, backend=backend).sum(), cost, create_graph=True
    )
    plain = torch.autograd.grad(sinkhorn(cost, grad=grad, score=score, backend=backend).sum(), cost)[0]
    assert torch.equal(first, plain)
    with pytest.raises(RuntimeError, match=r"no second derivative; for one, pass grad='unroll'"):
        first.square().sum().backward()
