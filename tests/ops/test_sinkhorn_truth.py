"""What transport must be, on every usable backend: limits, closed forms, hard costs, gradients, layouts."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tolerance import plan_rtol
from torch import Tensor
from torch.nn.functional import normalize

from spa_fast import SinkhornAlign, sinkhorn
from spa_fast.reference.sinkhorn import sinkhorn_fwd

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def dtypes_of(backend: str) -> list[torch.dtype]:
    return DTYPES if backend == "reference" else DTYPES[:3]


def hard_costs() -> dict[str, Tensor]:
    """[P, K, M] cosine costs that take many iterations, or cannot be done in the iterations given."""
    patches, centres = normalize(torch.randn(12, 24, 32), dim=-1), normalize(torch.randn(12, 3, 32), dim=-1)
    # Tokens in tight clusters of sizes unlike the patches': mass has to cross between the clusters.
    owner = torch.tensor([0] * 8 + [1, 1, 1, 2])
    tokens = normalize(centres[:, owner] + 0.03 * torch.randn(12, 12, 32), dim=-1)
    near = normalize(centres[:, torch.tensor([0] * 2 + [1] * 2 + [2] * 20)] + 0.1 * patches, dim=-1)
    steps = (torch.arange(24)[:, None] / 24 - torch.arange(12) / 12).abs()
    return {
        "clustered": 1 - near @ tokens.mT,
        "blocks": torch.where(torch.rand(12, 24, 12) > 0.5, 2.0, 0.0),
        "staircase": (steps + 1e-3 * torch.rand(12, 24, 12)).expand(12, 24, 12).contiguous(),
        "far row": torch.cat([2 - 0.01 * torch.rand(12, 1, 12), 0.01 * torch.rand(12, 23, 12)], 1),
    }


@pytest.mark.parametrize("kind", ["clustered", "blocks", "staircase", "far row"])
@pytest.mark.parametrize("eps", [1e-3, 0.01, 0.05, 0.1])
def test_sinkhorn_hard_costs_are_right_or_flagged(
    backend_device: tuple[str, str], kind: str, eps: float
) -> None:
    backend, device = backend_device
    cost, tol = hard_costs()[kind], 1e-3
    out = sinkhorn(
        cost.to(device), eps=eps, max_iter=100, tol=tol, score="value", return_plan=True, backend=backend
    )
    plan, error = out.plan.double().cpu(), out.marginal_error.double().cpu()
    # The flag says what the plan is: recomputed from it, in fp64.
    torch.testing.assert_close((plan.sum(2) - 1 / 24).abs().sum(1), error, rtol=0.02, atol=1e-5 + 1e-6 / eps)
    torch.testing.assert_close(plan.sum(1), torch.full((12, 12), 1 / 12).double(), rtol=1e-3, atol=1e-6)
    assert torch.equal(out.converged, out.marginal_error <= tol)
    a, b = torch.full((1, 24), 1 / 24).double(), torch.full((1, 12), 1 / 12).double()
    exact = sinkhorn_fwd(cost.double(), a, b, eps, 2000, tol / 100, True)
    good = out.converged.cpu() & (exact[4] <= tol / 10)
    # Mass tol in the wrong row is worth at most tol times the range of the potentials.
    reach = exact[1].amax(1) - exact[1].amin(1)
    assert ((out.score.double().cpu() - exact[0]).abs() <= tol * reach + 1e-5)[good].all()


def test_sinkhorn_hard_costs_are_solved_and_are_flagged(backend_device: tuple[str, str]) -> None:
    backend, device = backend_device
    shares = {}
    for kind, cost in hard_costs().items():
        for eps in (1e-3, 0.1):
            out = sinkhorn(cost.to(device), eps=eps, max_iter=100, return_plan=True, backend=backend)
            shares[kind, eps] = float(out.converged.float().mean())
    assert min(shares[kind, 0.1] for kind in ("staircase", "far row")) == 1
    assert min(shares.values()) < 1


@pytest.mark.parametrize("score", ["transport", "value"])
@pytest.mark.parametrize("eps", [1e-4, 1e-3, 1e-2, 0.1, 1.0, 10.0, 100.0])
def test_sinkhorn_eps_sweep_is_finite_with_gradients(
    backend_device: tuple[str, str], eps: float, score: str
) -> None:
    backend, device = backend_device
    for dtype in dtypes_of(backend):
        for grad in ("envelope", "implicit", "unroll"):
            leaf = (2 * torch.rand(3, 9, 6)).to(device, dtype).requires_grad_()
            out = sinkhorn(
                leaf, eps=eps, max_iter=30, score=score, grad=grad, return_plan=True, backend=backend
            )
            out.score.sum().backward()
            tensors = (out.score, out.plan, out.f, out.g, out.marginal_error, leaf.grad)
            assert all(x.isfinite().all() for x in tensors), (dtype, grad)


def test_sinkhorn_small_eps_is_exact_transport(backend_device: tuple[str, str]) -> None:
    ot = pytest.importorskip("ot", reason="POT is not installed")
    backend, device = backend_device
    cost, a, b = torch.rand(3, 7, 5), torch.rand(3, 7) + 0.1, torch.rand(3, 5) + 0.1
    a, b = (w.double() / w.double().sum(1, keepdim=True) for w in (a, b))
    emd = torch.stack([ot.emd2(a[p], b[p], cost[p].double()) for p in range(3)])
    for eps, gap in ((1e-2, 2e-2), (1e-3, 2e-3)):
        out = sinkhorn(
            cost.to(device),
            a.to(device),
            b.to(device),
            eps=eps,
            max_iter=20_000,
            tol=1e-4,
            return_plan=True,
            backend=backend,
        )
        assert out.converged.all()
        torch.testing.assert_close(out.score.double().cpu(), emd, rtol=0, atol=gap)


def test_sinkhorn_large_eps_is_the_mean(backend_device: tuple[str, str]) -> None:
    backend, device = backend_device
    cost = torch.rand(3, 7, 5, device=device)
    for score in ("transport", "value"):
        got = sinkhorn(cost, eps=100, score=score, backend=backend)
        torch.testing.assert_close(got, cost.mean((1, 2)), rtol=0, atol=1e-3)
    got = sinkhorn(cost, eps=1e4, backend=backend)
    torch.testing.assert_close(got, cost.mean((1, 2)), rtol=1e-4, atol=1e-5)
    a, b = torch.rand(7, device=device), torch.rand(5, device=device)
    got = sinkhorn(cost, a, b, eps=1e4, backend=backend)
    torch.testing.assert_close(got, cost.mT @ (a / a.sum()) @ (b / b.sum()), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("K", "M"), [(1, 1), (1, 9), (9, 1), (1, 256), (256, 1)])
def test_sinkhorn_one_row_or_column_is_the_weighted_mean(
    backend_device: tuple[str, str], K: int, M: int
) -> None:
    backend, device = backend_device
    for dtype in dtypes_of(backend):
        cost = (2 * torch.rand(5, K, M)).to(device, dtype)
        a, b = torch.rand(5, K) + 0.1, torch.rand(5, M) + 0.1
        a, b = ((w / w.sum(1, keepdim=True)).to(device) for w in (a, b))
        acc = torch.float64 if dtype == torch.float64 else torch.float32
        plan = a[:, :, None] * b[:, None, :]
        for eps in (1e-3, 0.1, 10.0):
            leaf = cost.clone().requires_grad_()
            out = sinkhorn(leaf, a, b, eps=eps, tol=1e-4, return_plan=True, backend=backend)
            assert (out.n_iter == 1).all()
            near = {"rtol": plan_rtol(dtype, cost.float(), eps), "atol": 1e-7}
            torch.testing.assert_close(out.plan.float(), plan, **near)
            torch.testing.assert_close(
                out.score.float(), (plan * cost.float()).sum((1, 2)), rtol=1e-4, atol=1e-6
            )
            out.score.sum().backward()
            near["rtol"] += 0.0 if dtype == acc else torch.finfo(dtype).eps
            torch.testing.assert_close(leaf.grad.float(), plan, **near)


@pytest.mark.parametrize("tol", [0.0, 1e-3])
def test_sinkhorn_permutation_equivariance(backend_device: tuple[str, str], tol: float) -> None:
    backend, device = backend_device
    cost = torch.rand(6, 13, 9, device=device)
    a, b = torch.rand(6, 13, device=device) + 0.1, torch.rand(6, 9, device=device) + 0.1
    problems, rows, cols = (torch.randperm(n, device=device) for n in (6, 13, 9))
    options = {"eps": 0.05, "max_iter": 40, "tol": tol, "return_plan": True, "backend": backend}
    leaf, moved_leaf = (x.clone().requires_grad_() for x in (cost, cost[problems][:, rows][:, :, cols]))
    base = sinkhorn(leaf, a, b, **options)
    moved = sinkhorn(moved_leaf, a[problems][:, rows], b[problems][:, cols], **options)
    near = {"rtol": 1e-4, "atol": 1e-6}
    torch.testing.assert_close(moved.score, base.score[problems], **near)
    torch.testing.assert_close(moved.plan, base.plan[problems][:, rows][:, :, cols], **near)
    torch.testing.assert_close(moved.f, base.f[problems][:, rows], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(moved.g, base.g[problems][:, cols], rtol=1e-4, atol=1e-5)
    assert torch.equal(moved.n_iter, base.n_iter[problems])
    for out in (base, moved):
        out.score.sum().backward()
    torch.testing.assert_close(moved_leaf.grad, leaf.grad[problems][:, rows][:, :, cols], **near)


@pytest.mark.parametrize("score", ["transport", "value"])
@pytest.mark.parametrize("grad", ["envelope", "implicit", "unroll"])
def test_sinkhorn_gradient_of_each_pair_by_finite_differences(
    backend_device: tuple[str, str], score: str, grad: str
) -> None:
    backend, device = backend_device
    cost, a, b = torch.rand(3, 8, 5), torch.rand(3, 8) + 0.2, torch.rand(3, 5) + 0.2
    short = {"eps": 0.1, "max_iter": 3, "tol": 0.0}
    long = {"eps": 0.1, "max_iter": 4000, "tol": 1e-6}
    options = short if grad == "unroll" else long
    leaf = cost.to(device, copy=True).requires_grad_()
    out = sinkhorn(leaf, a.to(device), b.to(device), score=score, grad=grad, backend=backend, **options)
    out.sum().backward()
    exact = {"backend": "reference", **(short if grad == "unroll" else long | {"tol": 1e-13})}
    exact_args = a.double(), b.double()
    held = sinkhorn(cost.double(), *exact_args, return_plan=True, **exact).plan

    @torch.no_grad()
    def objective(C: Tensor) -> Tensor:
        if (score, grad) == ("transport", "envelope"):
            return (held * C).sum()
        return sinkhorn(C, *exact_args, score=score, **exact).sum()

    for _ in range(3):
        direction = torch.randn(3, 8, 5, dtype=torch.float64)
        ahead, behind = (objective(cost.double() + s * 1e-5 * direction) for s in (1, -1))
        got = float((leaf.grad.double().cpu() * direction).sum())
        assert got == pytest.approx(float(ahead - behind) / 2e-5, rel=1e-3, abs=2e-5)


def test_sinkhorn_gradients_are_not_the_same_thing(backend_device: tuple[str, str]) -> None:
    backend, device = backend_device
    cost = torch.rand(4, 8, 5, device=device)
    grads = {}
    for grad in ("envelope", "implicit", "unroll"):
        leaf = cost.clone().requires_grad_()
        sinkhorn(leaf, max_iter=3, tol=0, grad=grad, backend=backend).sum().backward()
        grads[grad] = leaf.grad
    for one, other in (("envelope", "implicit"), ("implicit", "unroll"), ("envelope", "unroll")):
        assert (grads[one] - grads[other]).norm() > 1e-3 * grads[one].norm()


def layout(x: Tensor, kind: str) -> Tensor:
    """The values of x [..., K, M] in memory of another kind."""
    if kind == "transposed":
        return x.mT.contiguous().mT
    if kind == "strided":
        wide = x.new_full((*x.shape[:-2], 2 * x.shape[-2], 3 * x.shape[-1]), math.nan)
        wide[..., ::2, ::3] = x
        return wide[..., ::2, ::3]
    if kind == "offset":
        buffer = x.new_full((x.numel() + 3,), math.nan)
        buffer[3:] = x.flatten()
        return buffer[3:].view(x.shape)
    if kind == "batch last":
        return x.movedim(0, -1).contiguous().movedim(-1, 0)
    if kind == "negated lazily":
        return torch._neg_view(-x)
    if kind == "imaginary":
        return torch.complex(torch.zeros_like(x), -x).conj().imag
    return x


LAYOUTS = ["transposed", "strided", "offset", "batch last", "negated lazily", "imaginary"]


@pytest.mark.parametrize("kind", LAYOUTS)
def test_sinkhorn_layouts_of_cost_and_weights(backend_device: tuple[str, str], kind: str) -> None:
    backend, device = backend_device
    cost = torch.rand(4, 9, 6, device=device)
    a, b = torch.rand(4, 9, device=device) + 0.1, torch.rand(4, 6, device=device) + 0.1
    want = sinkhorn(cost, a, b, return_plan=True, backend=backend)
    plain, leaf = cost.clone().requires_grad_(), layout(cost, kind).detach().requires_grad_()
    sinkhorn(plain, a, b, backend=backend).sum().backward()
    got = sinkhorn(leaf, a, b, return_plan=True, backend=backend)
    weighted = sinkhorn(cost, layout(a, kind), layout(b, kind), return_plan=True, backend=backend)
    for x, y, z in zip(got, weighted, want, strict=True):
        assert torch.equal(x, z)
        # torch normalises weights in another order of summation.
        torch.testing.assert_close(y, z, rtol=1e-5, atol=1e-6)
    (got.score * layout(torch.ones(4, 1, 1, device=device), kind).flatten()).sum().backward()
    torch.testing.assert_close(leaf.grad, plain.grad)


@given(kind=st.sampled_from(LAYOUTS), dtype=st.sampled_from(DTYPES), seed=st.integers(0, 9))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=24)
def test_align_layouts_of_patches_and_tokens(kind: str, dtype: torch.dtype, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    patches, tokens = (torch.randn(n, 5, 8, generator=generator).to(dtype) for n in (3, 4))
    if kind == "imaginary" and dtype in (torch.bfloat16, torch.float16):
        kind = "negated lazily"
    want = [x.clone().requires_grad_() for x in (patches, tokens)]
    got = [layout(x, kind).detach().requires_grad_() for x in (patches, tokens)]
    scores = [SinkhornAlign(tol=0, max_iter=20)(*pair) for pair in (got, want)]
    torch.testing.assert_close(*scores, rtol=1e-5, atol=1e-6)
    for score in scores:
        score.sum().backward()
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x.grad, y.grad, rtol=1e-2 if dtype == torch.bfloat16 else 2e-3, atol=1e-3)


def test_align_names_the_first_bad_image_and_class() -> None:
    patches, tokens = torch.randn(3, 6, 8), torch.randn(3, 4, 5, 8)
    tokens[1, 2, 3, 4], tokens[2, 0, 0, 0] = math.nan, math.inf
    with pytest.raises(ValueError, match=r"tokens: .*first at image 1, class 2, token 3 \(2 rows\)"):
        SinkhornAlign()(patches, tokens)
    ragged = torch.randn(9, 8)
    ragged[6] = math.nan
    with pytest.raises(ValueError, match=r"tokens: .*first at class 2, token 1"):
        SinkhornAlign()(patches, ragged, cu_tokens=[0, 2, 5, 9])
    with pytest.raises(ValueError, match=r"tokens: .*first at image 1, token 3"):
        SinkhornAlign.paired()(patches, tokens[:, 2])
    mask = torch.ones(3, 4, 5, dtype=torch.bool)
    mask[1, 2, 3] = mask[2, 0, 0] = False
    assert SinkhornAlign()(patches, tokens, token_mask=mask).isfinite().all()


def test_align_refuses_weight_on_what_is_masked_entirely() -> None:
    patches, tokens = torch.randn(3, 6, 8), torch.randn(4, 5, 8)
    mask = torch.tensor([[True], [False], [True], [False]]).expand(4, 5)
    with pytest.raises(ValueError, match=r"b: expected no weight where all is masked.*class at \[1\]"):
        SinkhornAlign()(patches, tokens, b=torch.ones(4, 5), token_mask=mask)
    for masks in ({"token_mask": mask}, {}):
        scores = SinkhornAlign()(patches, tokens, b=mask.float(), **masks)
        assert not scores[:, [1, 3]].any()
        assert scores[:, [0, 2]].all()
