"""align_similarity scores <P, S> itself: tiny similarities, plans of less than mass 1, empty classes."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from spa_fast import SinkhornAlign, _backends
from spa_fast.transport import GRADS, align_similarity


def on(backend: str, S: Tensor, *weights: Tensor | None, **options: object) -> tuple[object, Tensor]:
    """Outputs, and the gradient of a weighted sum of the scores."""
    leaf = S.detach().requires_grad_()
    out = align_similarity(leaf, *weights, return_plan=True, backend=backend, **options)
    upstream = torch.linspace(-1, 2, out.score.numel(), device=S.device, dtype=out.score.dtype)
    (grad,) = torch.autograd.grad(out.score, leaf, upstream.view_as(out.score))
    return out, grad


@pytest.mark.parametrize("size", [1e-3, 1e-7, 1e-12, 1e-30])
@pytest.mark.parametrize("eps", [0.01, 0.1, 10.0])
def test_align_similarity_tiny_similarities(backend_device: tuple[str, str], size: float, eps: float) -> None:
    backend, device = backend_device
    S = (size * (1 + torch.rand(5, 6, 4))).to(device)
    S[2] *= torch.linspace(-1, 1, 4, device=device)
    out, grad = on(backend, S, eps=eps)
    want, want_grad = on("reference", S.double().cpu(), eps=eps)
    largest = S.abs().amax((1, 2)).double().cpu()
    assert ((out.score.double().cpu() - want.score).abs() <= 2e-6 * largest).all()
    torch.testing.assert_close(grad.double().cpu(), want_grad, rtol=2e-5, atol=0)


@pytest.mark.parametrize("grad", GRADS)
@pytest.mark.parametrize("score", ["transport", "value"])
def test_align_similarity_is_the_oracle_of_one_minus_s(
    backend_device: tuple[str, str], grad: str, score: str
) -> None:
    backend, device = backend_device
    S = 2 * torch.rand(4, 7, 5) - 1
    a, b = torch.rand(4, 7) + 0.1, torch.rand(4, 5) + 0.1
    a[1, 2:], b[2, 3] = 0, 0
    options = {"grad": grad, "score": score, "max_iter": 12, "tol": 0.0}
    out, got = on(backend, S.to(device), a.to(device), b.to(device), **options)
    want, want_grad = on("reference", S.double(), a.double(), b.double(), **options)
    for name in ("score", "plan", "f", "g", "marginal_error"):
        x, y = getattr(out, name).double().cpu(), getattr(want, name)
        torch.testing.assert_close(x, y, rtol=2e-5, atol=2e-6)
    torch.testing.assert_close(got.double().cpu(), want_grad, rtol=1e-4, atol=1e-6)
    if grad == "envelope":
        plan = want.plan * torch.linspace(-1, 2, 4, dtype=torch.float64)[:, None, None]
        torch.testing.assert_close(want_grad, -plan if score == "value" else plan)


@pytest.mark.parametrize("shape", ["[B, C, K, M]", "[B, K, C, M]"])
def test_align_similarity_of_forbidden_tokens(backend_device: tuple[str, str], shape: str) -> None:
    """A token that no patch may go to takes no mass; the score is the sum over the plan there is."""
    backend, device = backend_device
    S = 2 * torch.rand(2, 3, 6, 4) - 1
    S[0, 1, :, 2] = -math.inf
    S[1, 2, 4] = -math.inf
    S[1, 0, 2, 1] = -math.inf
    wide = S.transpose(1, 2).contiguous().transpose(1, 2) if shape == "[B, K, C, M]" else S
    for score in ("transport", "value"):
        out, grad = on(backend, wide.to(device), tol=0.0, max_iter=30, score=score)
        want, want_grad = on("reference", S.double(), tol=0.0, max_iter=30, score=score)
        torch.testing.assert_close(out.score.double().cpu(), want.score, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(grad.double().cpu(), want_grad, rtol=1e-4, atol=1e-6)
        if score == "transport":
            plan = out.plan.double().cpu()
            held = torch.where(plan == 0, 0.0, plan * S).sum((-2, -1))
            torch.testing.assert_close(out.score.double().cpu(), held, rtol=1e-5, atol=1e-6)
            assert plan[0, 1].sum() == pytest.approx(0.75, abs=1e-5)
    assert out.f[1, 2, 4] == 0
    assert out.g[0, 1, 2] == 0


def test_align_similarity_of_nothing_is_exactly_zero(backend_device: tuple[str, str]) -> None:
    backend, device = backend_device
    for eps in (1e-3, 0.1, 100.0):
        S = torch.zeros(2, 6, 4, device=device)
        out, grad = on(backend, S, eps=eps)
        assert not out.score.any()
        assert not out.score.signbit().any()
        torch.testing.assert_close(grad.cpu()[1], torch.full((6, 4), 2 / 24))
        for weights in ((torch.zeros(6, device=device), None), (None, torch.zeros(4, device=device))):
            out, grad = on(backend, torch.rand(2, 6, 4, device=device), *weights, eps=eps)
            assert not out.score.any()
            assert not out.f.any()
            assert not out.g.any()
            assert not grad.any()


def test_align_class_of_zero_tokens_scores_exactly_zero(backend_device: tuple[str, str]) -> None:
    backend, device = backend_device
    patches, tokens = torch.randn(3, 6, 8, device=device), torch.randn(4, 5, 8, device=device)
    tokens[1] = 0
    patches[2] = 0
    tokens.requires_grad_()
    scores = SinkhornAlign(backend=backend)(patches, tokens)
    assert not scores[:, 1].any()
    assert not scores[2].any()
    assert scores[:2, [0, 2, 3]].all()
    scores.sum().backward()
    assert tokens.grad.isfinite().all()
    lengths = SinkhornAlign(backend=backend)(patches, tokens[0], cu_tokens=[0, 3, 3, 5])
    assert not lengths[:, 1].any()


def test_align_similarity_bitwise_alone_and_sliced(backend_device: tuple[str, str]) -> None:
    backend, device = backend_device
    if device == "cuda" and backend == "reference":
        pytest.skip("the contract holds for the CPU and for triton")
    wide = 2 * torch.rand(3, 12, 5, 9, device=device) - 1
    a, b = torch.ones(12, device=device), torch.ones(9, device=device)
    a[7:], b[4:] = 0, 0
    run = {"tol": 1e-3, "backend": backend}
    every = align_similarity(wide.transpose(1, 2), a, b, **run)
    for i, c in ((0, 0), (2, 3)):
        alone = align_similarity(wide[i, :, c].contiguous(), a, b, **run)
        assert torch.equal(every[i, c], alone)
        if device == "cpu":
            sliced = align_similarity(wide[i, :7, c, :4].contiguous(), **run)
            assert torch.equal(every[i, c], sliced)


def test_align_similarity_reads_all_pairs_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """No backend is handed a transposed copy or 1 - S."""
    if _backends.available()["native"] is not None:
        pytest.skip(str(_backends.available()["native"]))
    from spa_fast._ops import sinkhorn_native

    seen = []
    inner = sinkhorn_native._native.extension().sinkhorn_fwd

    class Spy:
        def sinkhorn_fwd(self, cost: int, *args: object, **kwargs: object) -> None:
            seen.append(cost)
            inner(cost, *args, **kwargs)

    monkeypatch.setattr(sinkhorn_native._native, "extension", Spy)
    wide = torch.rand(3, 12, 5, 9)
    align_similarity(wide.transpose(1, 2))
    assert seen == [wide.data_ptr()]
