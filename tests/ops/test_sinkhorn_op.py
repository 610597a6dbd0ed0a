"""spa_fast::_sinkhorn_fwd and its autograd on every usable backend."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from tolerance import assert_grad, assert_plan, assert_potentials, assert_score, plan_rtol
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from spa_fast import _backends, _native, sinkhorn
from spa_fast.reference.sinkhorn import sinkhorn_bwd, sinkhorn_fwd, sinkhorn_plan

OPS = torch.ops.spa_fast


def problems(P: int, K: int, M: int, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor, Tensor]:
    cost = (2 * torch.rand(P, K, M)).to(device, dtype)
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    a, b = (torch.rand(P, n, dtype=acc) + 0.1 for n in (K, M))
    return cost, (a / a.sum(1, keepdim=True)).to(device), (b / b.sum(1, keepdim=True)).to(device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1, 1), (5, 32, 16), (3, 7, 63), (2, 197, 5)])
@pytest.mark.parametrize("value", [False, True])
@pytest.mark.parametrize("eps", [0.05, 1.0])
def test_sinkhorn_op_matches_the_oracle(
    backend_device: tuple[str, str],
    dtype: torch.dtype,
    shape: tuple[int, int, int],
    value: bool,
    eps: float,
) -> None:
    backend, device = backend_device
    cost, a, b = problems(*shape, dtype, device)
    leaf = cost.clone().requires_grad_()
    out = sinkhorn(
        leaf,
        a,
        b,
        eps=eps,
        max_iter=20,
        tol=0,
        score="value" if value else "transport",
        return_plan=True,
        backend=backend,
    )
    exact = [x.double().cpu() for x in (cost, a, b)]
    score, f, g, n_iter, _ = sinkhorn_fwd(*exact, eps, 20, 0.0, value)
    assert_score(out.score, score, torch.float32)
    assert_potentials(out.f, f, torch.float32, scale=2.0)
    assert_potentials(out.g, g, torch.float32, scale=2.0)
    assert_plan(out.plan, sinkhorn_plan(*exact, f, g, eps), plan_rtol(dtype, cost, eps))
    assert out.n_iter.tolist() == n_iter.tolist()
    grad = torch.randn(shape[0])
    out.score.backward(grad.to(device))
    want = sinkhorn_bwd(grad.double(), *exact, f, g, n_iter, eps, value, "envelope")
    assert_grad(leaf.grad, want, dtype)


@pytest.mark.parametrize("grad", ["envelope", "implicit", "unroll"])
def test_sinkhorn_op_gradients_of_every_backend(backend_device: tuple[str, str], grad: str) -> None:
    backend, device = backend_device
    cost, a, b = problems(4, 9, 6, torch.float32, device)
    leaf = cost.clone().requires_grad_()
    out = sinkhorn(leaf, a, b, max_iter=12, tol=0, grad=grad, backend=backend)
    weight = torch.randn(4)
    out.backward(weight.to(device))
    exact = [x.double().cpu() for x in (cost, a, b)]
    _, f, g, n_iter, _ = sinkhorn_fwd(*exact, 0.1, 12, 0.0, False)
    want = sinkhorn_bwd(weight.double(), *exact, f, g, n_iter, 0.1, False, grad)
    assert_grad(leaf.grad, want, torch.float32)


def test_sinkhorn_op_early_stop_masks_and_bad_values(backend_device: tuple[str, str]) -> None:
    backend, device = backend_device
    cost, a, b = problems(6, 12, 7, torch.float32, device)
    cost *= torch.linspace(0.05, 2, 6, device=device)[:, None, None]
    a[1, 8:] = 0
    cost[1, 8:] = torch.nan
    cost[2, 0, 0] = torch.inf
    b[3] = 0
    cost[4, 3, 3] = torch.nan
    out = sinkhorn(cost, a, b, tol=1e-4, max_iter=300, return_plan=True, backend=backend)
    weights = [w.double().cpu() / w.double().cpu().sum(1, keepdim=True).clamp(min=1e-30) for w in (a, b)]
    score, _, _, n_iter, error = sinkhorn_fwd(cost.double().cpu(), *weights, 0.1, 300, 1e-4, False)
    assert_score(out.score.nan_to_num(), score.nan_to_num(), torch.float32)
    assert out.score[4].isnan()
    assert out.score.isfinite().sum() == 5
    assert not out.converged[4]
    fine = torch.tensor([0, 1, 2, 3, 5])
    assert (out.n_iter.cpu() - n_iter)[fine].abs().max() <= 1
    torch.testing.assert_close(out.marginal_error.double().cpu()[fine], error[fine], rtol=0.05, atol=1e-6)
    assert out.converged.cpu()[fine].all()
    assert out.score[3] == 0
    assert not out.plan[3].any()
    assert not out.plan[1, 8:].any()


@pytest.mark.parametrize("tol", [0.0, 1e-3])
def test_sinkhorn_op_one_is_n_and_mask_is_slice_bitwise(backend_device: tuple[str, str], tol: float) -> None:
    backend, device = backend_device
    if device == "cuda" and backend == "reference":
        pytest.skip("the contract holds for the CPU and for triton")
    cost, _, _ = problems(9, 20, 13, torch.float32, device)
    a, b = torch.ones(20, device=device), torch.ones(13, device=device)
    a[11:], b[6:] = 0, 0
    run = {"tol": tol, "max_iter": 25, "return_plan": True, "backend": backend}
    every = sinkhorn(cost, a, b, **run)
    one = sinkhorn(cost[4], a, b, **run)
    sliced = sinkhorn(cost[:, :11, :6], **run)
    for name in ("score", "n_iter", "marginal_error"):
        assert torch.equal(getattr(every, name)[4], getattr(one, name))
        if device == "cpu":
            assert torch.equal(getattr(every, name), getattr(sliced, name))
    assert torch.equal(every.plan[4], one.plan)


@pytest.mark.parametrize("grad", ["envelope", "implicit", "unroll"])
@pytest.mark.parametrize("shape", [(3, 5, 4), (0, 5, 4)])
def test_sinkhorn_op_opcheck(backend_device: tuple[str, str], grad: str, shape: tuple[int, int, int]) -> None:
    backend, device = backend_device
    cost, a, b = problems(*shape, torch.float32, device)
    args = (cost.requires_grad_(), a, b[:1] if shape[0] else b, 0.1, 8, 1e-3, False, grad, backend)
    torch.library.opcheck(OPS._sinkhorn_fwd.default, args)
    with torch.no_grad():
        score, f, g, n_iter, _ = OPS._sinkhorn_fwd(*args)
    cost = cost.detach()
    torch.library.opcheck(
        OPS._sinkhorn_bwd.default, (score, cost, a, args[2], f, g, n_iter, 0.1, False, grad)
    )
    torch.library.opcheck(OPS._sinkhorn_plan.default, (cost, a, args[2], f, g, 0.1))


@pytest.mark.parametrize("grad", ["implicit", "unroll"])
def test_sinkhorn_op_gradcheck_fp64(grad: str) -> None:
    cost = torch.rand(2, 4, 3, dtype=torch.float64, requires_grad=True)
    steps = {"max_iter": 5000, "tol": 1e-14} if grad == "implicit" else {"max_iter": 5, "tol": 0}
    torch.autograd.gradcheck(lambda c: sinkhorn(c, grad=grad, eps=0.2, **steps), cost, atol=1e-6)
    torch.autograd.gradcheck(
        lambda c: sinkhorn(c, score="value", grad="envelope", eps=0.2, max_iter=5000, tol=1e-14), cost
    )


def test_sinkhorn_op_compiles_whole_without_recompiling(backend_device: tuple[str, str]) -> None:
    backend, device = backend_device
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def loss(cost: Tensor) -> Tensor:
        out = sinkhorn(cost, reg=0.2, score="value", return_plan=True, backend=backend)
        return (out.score * out.converged).sum()

    compiled = torch.compile(loss, fullgraph=True, backend=counter)
    for P in (3, 4, 6, 9, 17):
        cost = torch.rand(P, 6, 5, device=device, requires_grad=True)
        torch.testing.assert_close(compiled(cost), loss(cost))
        grads = [torch.autograd.grad(fn(cost), cost)[0] for fn in (compiled, loss)]
        torch.testing.assert_close(*grads)
    assert counter.frame_count == 2  # the first size, then any


def test_sinkhorn_op_expanded_gradient_and_partial_grads(backend_device: tuple[str, str]) -> None:
    backend, device = backend_device
    cost = torch.rand(4, 5, 3, device=device, requires_grad=True)
    sinkhorn(cost, backend=backend).sum().backward()
    plan = sinkhorn(cost, backend=backend, return_plan=True).plan
    torch.testing.assert_close(cost.grad, plan)
    assert not plan.requires_grad
    scale = torch.tensor(2.0, device=device, requires_grad=True)
    (sinkhorn(cost.detach(), backend=backend) * scale).sum().backward()
    assert scale.grad is not None


def test_sinkhorn_op_layouts(backend_device: tuple[str, str]) -> None:
    backend, device = backend_device
    base = torch.rand(4, 6, 5, device=device)
    want = sinkhorn(base, backend=backend)
    padded = torch.zeros(8, 12, 7, device=device)
    padded[::2, ::2, 1:6] = base
    assert torch.equal(sinkhorn(padded[::2, ::2, 1:6], backend=backend), want)
    turned = base.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(sinkhorn(turned, backend=backend), want)
    assert torch.equal(sinkhorn(base[None, :, None], backend=backend), want[None, :, None])
    one = base[:1].clone().requires_grad_()
    wide = sinkhorn(one.expand(4, 6, 5), backend=backend)
    assert torch.equal(wide, want[:1].expand(4))
    wide.sum().backward()
    single = base[:1].clone().requires_grad_()
    sinkhorn(single, backend=backend).sum().backward()
    torch.testing.assert_close(one.grad, 4 * single.grad)


def test_sinkhorn_op_modes_of_autograd(backend_device: tuple[str, str]) -> None:
    backend, device = backend_device
    cost = torch.rand(3, 4, 5, device=device)
    want = sinkhorn(cost, backend=backend)
    with torch.no_grad():
        assert torch.equal(sinkhorn(cost, backend=backend), want)
    with torch.inference_mode():
        assert torch.equal(sinkhorn(cost.clone(), backend=backend), want)
    with torch.autocast(device, dtype=torch.bfloat16):
        out = sinkhorn(cost, backend=backend)
    assert out.dtype == torch.float32
    assert torch.equal(out, want)
    leaf = cost.clone().requires_grad_()
    (first,) = torch.autograd.grad(sinkhorn(leaf, backend=backend).sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative; for one, pass grad='unroll'"):
        first.sum().backward()


def test_backend_choice() -> None:
    cost = torch.rand(2, 3, 4)
    native = "native" if _backends.available()["native"] is None else "reference"
    assert _backends.resolve("auto", cost) == native
    assert _backends.resolve("auto", cost.double()) == "reference"
    assert _backends.resolve("auto", torch.empty(1, 257, 2)) == "reference"
    assert _backends.resolve("reference", cost) == "reference"
    assert _backends.resolve("auto", cost.to("meta")) == "reference"
    assert sinkhorn(torch.rand(1, 300, 260)).isfinite().all()
    with pytest.raises(ValueError, match=r"backend.*'cuda'"):
        sinkhorn(cost, backend="cuda")
    with pytest.raises(RuntimeError, match="'triton' is not usable"):
        sinkhorn(cost, backend="triton")
    if native == "native":
        for bad, why in ((cost.double(), "float64"), (torch.rand(1, 257, 2), "K <= 256, got 257")):
            with pytest.raises(RuntimeError, match=f"'native' is not usable: .*{why}"):
                sinkhorn(bad, backend="native")


def test_backend_absent_gives_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_native, "extension", lambda: None)
    monkeypatch.setattr(_native, "native_info", lambda: {"available": False, "reason": "no compiler"})
    _backends._native_reason.cache_clear()
    try:
        cost = torch.rand(2, 3, 4)
        assert _backends.available()["native"] == "no compiler"
        assert _backends.resolve("auto", cost) == "reference"
        with pytest.raises(RuntimeError, match="no compiler"):
            sinkhorn(cost, backend="native")
    finally:
        monkeypatch.undo()
        _backends._native_reason.cache_clear()


def test_triton_backend_on_cpu_tensors_under_its_interpreter() -> None:
    pytest.importorskip("triton")
    code = (
        "import torch; from spa_fast import sinkhorn; from spa_fast._backends import resolve\n"
        "cost = torch.rand(2, 5, 3, requires_grad=True)\n"
        "ours, want = (sinkhorn(cost, max_iter=2, tol=0, backend=b) for b in ('triton', 'reference'))\n"
        "torch.testing.assert_close(ours, want, rtol=1e-5, atol=1e-5)\n"
        "ours.sum().backward()\n"
        "assert cost.grad.isfinite().all() and resolve('auto', cost) != 'triton'\n"
    )
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
