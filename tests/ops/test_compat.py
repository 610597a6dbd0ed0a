"""spa_fast.compat against the installed peers; PLOT and SuperGlue, no packages, against their formulas."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch
from torch import Tensor

from spa_fast import sinkhorn
from spa_fast.compat import SamplesLoss, log_optimal_transport, ot_sinkhorn, ot_sinkhorn2, plot_sinkhorn


def weights(*shape: int) -> Tensor:
    w = torch.rand(*shape, dtype=torch.float64) + 0.2
    return w / w.sum(-1, keepdim=True)


def directional(fn, x: Tensor, direction: Tensor, step: float = 1e-5) -> float:
    """Central difference of fn along a direction."""
    with torch.no_grad():
        return float((fn(x + step * direction) - fn(x - step * direction)) / (2 * step))


@pytest.mark.parametrize("method", ["sinkhorn", "sinkhorn_log", "sinkhorn_stabilized"])
@pytest.mark.parametrize("mass", [1.0, 3.0])
def test_ot_sinkhorn_is_pots(method: str, mass: float) -> None:
    ot = pytest.importorskip("ot", reason="POT is not installed")
    M, a, b = torch.rand(7, 5, dtype=torch.float64), mass * weights(7), mass * weights(5)
    options = {"reg": 0.1, "method": method, "numItermax": 5000, "stopThr": 1e-12}
    want, pot = ot.sinkhorn(a, b, M, log=True, **options)
    plan, log = ot_sinkhorn(a, b, M, log=True, **options)
    torch.testing.assert_close(plan, want, rtol=1e-8, atol=1e-12)
    torch.testing.assert_close(ot_sinkhorn(a, b, M, warn=False, **options), plan)
    torch.testing.assert_close(ot_sinkhorn2(a, b, M, **options), ot.sinkhorn2(a, b, M, **options))
    assert log["converged"]
    assert log["err"] <= 1e-12
    rebuilt = (log["log_u"][:, None] + log["log_v"][None, :] - M / 0.1).exp()
    torch.testing.assert_close(rebuilt, want, rtol=1e-8, atol=1e-12)
    if method == "sinkhorn_log":
        shift = pot["log_u"][0] - log["log_u"][0]
        torch.testing.assert_close(log["log_u"] + shift, pot["log_u"], rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(log["log_v"] - shift, pot["log_v"], rtol=1e-8, atol=1e-8)


def test_ot_sinkhorn_batches_and_uniform_weights() -> None:
    ot = pytest.importorskip("ot", reason="POT is not installed")
    M = torch.rand(4, 6, 5)
    res = ot.solve_batch(M.double(), reg=0.1, max_iter=2000, tol=1e-12)
    torch.testing.assert_close(
        ot_sinkhorn([], [], M, 0.1, stopThr=1e-6), res.plan.float(), rtol=1e-4, atol=1e-6
    )
    score = ot_sinkhorn2(None, None, M, 0.1, stopThr=1e-6)
    torch.testing.assert_close(score, res.value_linear.float(), rtol=1e-5, atol=1e-6)
    entropic = score.double() - 0.1 * ot.batch.entropy_batch(res.plan)
    torch.testing.assert_close(entropic, res.value, rtol=1e-5, atol=1e-6)
    kl = ot.solve_batch(M.double(), reg=0.1, max_iter=2000, tol=1e-12, reg_type="kl").value
    torch.testing.assert_close(
        sinkhorn(M.double(), score="value", max_iter=2000, tol=1e-12), kl, rtol=1e-9, atol=1e-9
    )
    each = weights(4, 6).float()
    plan = ot_sinkhorn(2 * each, None, M, 0.1, stopThr=1e-6)
    torch.testing.assert_close(plan.sum(-1), 2 * each, rtol=1e-4, atol=1e-5)
    lists = ot_sinkhorn([0.5, 0.25, 0.25], [0.5, 0.5], M[0, :3, :2], 0.1)
    torch.testing.assert_close(lists.sum(0), torch.tensor([0.5, 0.5]))
    with pytest.raises(ValueError, match="method: expected one of 'sinkhorn'"):
        ot_sinkhorn(None, None, M, 0.1, "greenkhorn")


@pytest.mark.parametrize("mass", [1.0, 2.0])
def test_ot_sinkhorn2_gradient_is_that_of_pots_value_by_finite_differences(mass: float) -> None:
    ot = pytest.importorskip("ot", reason="POT is not installed")
    M, a, b = torch.rand(6, 4, dtype=torch.float64), mass * weights(6), mass * weights(4)
    options = {"reg": 0.15, "numItermax": 20_000, "stopThr": 1e-14, "method": "sinkhorn_log"}
    leaf = M.clone().requires_grad_()
    ot_sinkhorn2(a, b, leaf, **options).backward()
    for seed in range(3):
        direction = torch.randn(6, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        want = directional(lambda m: ot.sinkhorn2(a, b, m, warn=False, **options), M, direction)
        assert float((leaf.grad * direction).sum()) == pytest.approx(want, rel=1e-5, abs=1e-8)


@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("debias", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
def test_samples_loss_is_geomlosss(p: int, debias: bool, weighted: bool) -> None:
    geomloss = pytest.importorskip("geomloss", reason="geomloss is not installed")
    x, y = torch.rand(3, 8, 2, dtype=torch.float64), torch.rand(3, 6, 2, dtype=torch.float64) + 0.3
    args = (2 * weights(3, 8), x, 2 * weights(3, 6), y) if weighted else (x, y)
    shape = {"loss": "sinkhorn", "p": p, "blur": 0.4 if p == 2 else 0.2, "debias": debias}
    peer = geomloss.SamplesLoss(**shape, scaling=0.998, backend="tensorized")
    ours = SamplesLoss(**shape, scaling=0.998, backend="tensorized", max_iter=20_000, tol=1e-13)
    # GeomLoss raises distances below 1e-4 to that: the diagonals of the two debiasing problems.
    rtol = 1e-3 if p == 1 and debias else 1e-6
    torch.testing.assert_close(ours(*args), peer(*args), rtol=rtol, atol=1e-8)
    single = [t[0] for t in args]
    torch.testing.assert_close(ours(*single), peer(*single), rtol=rtol, atol=1e-8)
    leaf, direction = x.clone().requires_grad_(), torch.randn_like(x)

    def of(loss, points: Tensor) -> Tensor:
        return loss(*(points if t is x else t for t in args)).sum()

    of(ours, leaf).backward()
    got = float((leaf.grad * direction).sum())
    assert got == pytest.approx(directional(lambda points: of(ours, points), x, direction), rel=1e-6)
    # The peer's number of steps depends on x: its differences are good to three digits.
    assert got == pytest.approx(directional(lambda points: of(peer, points), x, direction), rel=1e-3)


def test_samples_loss_of_unit_vectors_is_transport_of_one_minus_cosine() -> None:
    x, y = (torch.nn.functional.normalize(torch.randn(2, n, 16), dim=-1) for n in (9, 5))
    options = {"p": 2, "blur": 0.1**0.5, "debias": False, "tol": 1e-4}
    value = SamplesLoss("sinkhorn", **options)(x, y)
    want = sinkhorn(1 - x @ y.mT, eps=0.1, score="value", tol=1e-4, max_iter=1000)
    torch.testing.assert_close(value, want, rtol=1e-5, atol=1e-6)
    far = SamplesLoss("sinkhorn", **options)(x + 1000, y + 1000)
    torch.testing.assert_close(far, want, rtol=1e-3, atol=1e-3)
    assert SamplesLoss(blur=0.5)(x, x).abs().max() < 1e-6
    own = SamplesLoss(**options, cost=lambda s, t: 1 - s @ t.mT)
    torch.testing.assert_close(own(x, y), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("error", "match", "options"),
    [
        (ValueError, "loss: expected one of 'sinkhorn', got 'energy'", {"loss": "energy"}),
        (ValueError, "p: expected 1 or 2, got 3", {"p": 3}),
        (ValueError, "reach", {"reach": 1.0}),
        (ValueError, "blur: .*got 0", {"blur": 0}),
        (ValueError, "blur: .*got -1", {"blur": -1}),
        (TypeError, "blur: expected a number, got str", {"blur": "x"}),
        (TypeError, "blur: expected a number, got Tensor", {"blur": torch.tensor(0.1)}),
        (ValueError, "p: expected 1 or 2, got True", {"p": True}),
        (ValueError, "p: expected 1 or 2, got x", {"p": "x"}),
        (TypeError, "max_iter: expected an integer, got str", {"max_iter": "x"}),
    ],
)
def test_samples_loss_refuses(error: type[Exception], match: str, options: dict[str, object]) -> None:
    with pytest.raises(error, match=match):
        SamplesLoss(**options)
    for args, what in (((torch.rand(3, 2),) * 3, "arguments"), ((torch.rand(3, 2), torch.rand(4, 3)), "y:")):
        with pytest.raises((TypeError, ValueError), match=what):
            SamplesLoss()(*args)


def test_samples_loss_refuses_empty_clouds() -> None:
    some = torch.rand(3, 2)
    for args, match in (((some[:0], some), r"x: .*\[0, 2\]"), ((some, some[:0]), r"y: .*\[0, 2\]")):
        with pytest.raises(ValueError, match=match):
            SamplesLoss()(*args)
    assert SamplesLoss()(torch.rand(0, 3, 2), torch.rand(0, 4, 2)).shape == (0,)


@pytest.mark.parametrize("bad", [torch.ones(3), torch.ones(3, 0, 4), torch.ones(3, 4, 0)])
def test_plot_sinkhorn_refuses(bad: Tensor) -> None:
    with pytest.raises(ValueError, match=r"sim: expected \[..., K, M\] with K, M >= 1"):
        plot_sinkhorn(bad)
    with pytest.raises(TypeError, match="thresh: expected a number, got str"):
        plot_sinkhorn(torch.ones(3, 4), thresh="x")


def plots_loop(sim: Tensor, eps: float, max_iter: int, thresh: float) -> tuple[Tensor, int]:
    """PLOT's plan and its number of iterations."""
    _, K, M = sim.shape
    kernel = ((sim - 1) / eps).exp()
    u, v = torch.full((K, 1), 1 / K, dtype=sim.dtype), torch.full((M, 1), 1 / M, dtype=sim.dtype)
    r, c = torch.ones_like(u), torch.ones_like(v)
    changes = [math.inf]
    while len(changes) <= max_iter and changes[-1] >= thresh:
        previous, r = r, u / (kernel @ c)
        c = v / (kernel.mT @ r)
        changes.append(float((r - previous).abs().mean()))
    return r * kernel * c.mT, len(changes) - 1


def cosines(P: int, K: int, M: int, D: int = 64) -> Tensor:
    return torch.einsum(
        "pkd,pmd->pkm",
        *(torch.nn.functional.normalize(torch.randn(P, n, D), dim=-1) for n in (K, M)),
    )


@pytest.mark.parametrize("eps", [0.1, 0.5])
def test_plot_sinkhorn_is_plots_formula(eps: float) -> None:
    sim = cosines(5, 16, 4)
    for steps in (1, 3, 100):
        plan, _ = plots_loop(sim.double(), eps, steps, 0.0)
        want = (plan * sim).sum((1, 2))
        leaf = sim.clone().requires_grad_()
        out = plot_sinkhorn(leaf, eps, steps, 0.0, return_plan=True)
        torch.testing.assert_close(out.score.double(), want, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(out.plan.double(), plan, rtol=1e-4, atol=1e-8)
        out.score.sum().backward()
        torch.testing.assert_close(leaf.grad, out.plan)
    # With each one's own stop the scores agree within what the stop leaves open.
    plan, steps = plots_loop(sim.double(), eps, 100, 1e-2)
    ours = plot_sinkhorn(sim, eps, return_plan=True)
    assert ours.converged.all()
    assert (ours.n_iter <= steps).all()
    torch.testing.assert_close(ours.score.double(), (plan * sim).sum((1, 2)), rtol=0, atol=1e-2)


def test_plot_sinkhorn_where_plots_formula_underflows() -> None:
    sim = 2 * torch.rand(3, 6, 4) - 1
    assert plots_loop(sim, 1e-3, 100, 1e-2)[0].isnan().any()
    out = plot_sinkhorn(sim, 1e-3, return_plan=True)
    assert out.score.isfinite().all()
    assert out.plan.isfinite().all()


def superglues_formula(scores: Tensor, alpha: Tensor, iters: int) -> Tensor:
    P, K, M = scores.shape
    S = torch.nn.functional.pad(scores, (0, 1, 0, 1))
    edge = torch.zeros(K + 1, M + 1, dtype=torch.bool)
    edge[K], edge[:, M] = True, True
    S = torch.where(edge, alpha, S)
    log_a = torch.tensor([1.0] * K + [M], dtype=S.dtype).log() - math.log(K + M)
    log_b = torch.tensor([1.0] * M + [K], dtype=S.dtype).log() - math.log(K + M)
    u, v = S.new_zeros(P, K + 1), S.new_zeros(P, M + 1)
    for _ in range(iters):
        u = log_a - torch.logsumexp(S + v[:, None, :], 2)
        v = log_b - torch.logsumexp(S + u[:, :, None], 1)
    return S + u[:, :, None] + v[:, None, :] + math.log(K + M)


@pytest.mark.parametrize("iters", [1, 3, 50])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_log_optimal_transport_is_superglues_formula(iters: int, dtype: torch.dtype) -> None:
    scores = 3 * torch.randn(3, 7, 5)
    grads = []
    weight = torch.randn(3, 8, 6, dtype=torch.float64)
    for fn, kind in ((superglues_formula, torch.float64), (log_optimal_transport, dtype)):
        leaf = scores.to(kind).requires_grad_()
        alpha = torch.tensor(0.7, dtype=kind, requires_grad=True)
        Z = fn(leaf, alpha, iters)
        assert Z.dtype == kind
        (Z * weight.to(kind)).sum().backward()
        grads.append([Z.double(), leaf.grad.double(), alpha.grad.double()])
    tight = {"rtol": 1e-9, "atol": 1e-9} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(*grads, **tight)
    if iters == 50:
        plan = grads[1][0].exp()
        torch.testing.assert_close(
            plan.sum(1), torch.tensor([[1.0] * 5 + [7]] * 3, dtype=torch.float64), rtol=1e-4, atol=1e-4
        )


def test_log_optimal_transport_gradcheck_and_refusals() -> None:
    scores = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    alpha = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(lambda s, t: log_optimal_transport(s, t, 4), (scores, alpha), atol=1e-7)
    torch.autograd.gradgradcheck(lambda s, t: log_optimal_transport(s, t, 4), (scores, alpha), atol=1e-7)
    assert log_optimal_transport(scores[:0], alpha, 4).shape == (0, 4, 5)
    large = log_optimal_transport(1e4 * scores.detach().float(), 0.0, 20)
    assert large.isfinite().all()
    assert log_optimal_transport(scores.detach().half(), 0.5, 3).dtype == torch.float32
    with pytest.raises(ValueError, match=r"scores: expected \[P, K, M\]"):
        log_optimal_transport(scores[0], alpha, 4)
    with pytest.raises(ValueError, match="alpha: expected a scalar"):
        log_optimal_transport(scores, torch.zeros(2), 4)
    for bad in ("0.1", None, True):
        with pytest.raises(TypeError, match="alpha: expected a scalar, got"):
            log_optimal_transport(scores, bad, 4)
    with pytest.raises(ValueError, match="iters: expected >= 1, got 0"):
        log_optimal_transport(scores, alpha, 0)
    with pytest.raises(TypeError, match="iters: expected an integer, got str"):
        log_optimal_transport(scores, alpha, "4")


def test_ott_agrees_on_plan_value_and_gradient() -> None:
    pytest.importorskip("ott", reason="OTT-JAX is not installed (extra: bench)")
    import jax
    from ott.geometry.geometry import Geometry
    from ott.solvers.linear import solve

    cost, a, b = torch.rand(6, 4), weights(6).float(), weights(4).float()

    def value(C):
        out = solve(Geometry(cost_matrix=C, epsilon=0.1), a.numpy(), b.numpy(), threshold=1e-6)
        return out.reg_ot_cost, out.matrix

    (ott_value, plan), grad = jax.value_and_grad(value, has_aux=True)(cost.numpy())
    leaf = cost.clone().requires_grad_()
    out = sinkhorn(leaf, a, b, score="value", max_iter=5000, tol=1e-6, return_plan=True)
    out.score.backward()
    torch.testing.assert_close(out.plan, torch.tensor(plan.tolist()), rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(leaf.grad, torch.tensor(grad.tolist()), rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(out.score, torch.tensor(float(ott_value)), rtol=1e-4, atol=1e-4)


def test_samples_loss_says_when_it_has_not_converged() -> None:
    x, y = torch.randn(3, 10, 4), torch.randn(3, 12, 4)
    with pytest.warns(UserWarning, match="SamplesLoss: not converged after 5 iterations"):
        SamplesLoss(blur=0.05, debias=False, max_iter=5)(x, y)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        SamplesLoss(blur=1.0, debias=False)(x, y)


CLOUDS = {
    "cube": lambda n, D: torch.rand(3, n, D, dtype=torch.float64),
    "normal": lambda n, D: torch.randn(3, n, D, dtype=torch.float64),
    "clusters": lambda n, D: (
        torch.randn(3, 4, D, dtype=torch.float64)[:, torch.arange(n) % 4]
        + 0.1 * torch.randn(3, n, D, dtype=torch.float64)
    ),
}


@pytest.mark.parametrize("kind", CLOUDS)
@pytest.mark.parametrize("D", [2, 8, 64])
@pytest.mark.parametrize("p", [1, 2])
def test_samples_loss_of_geomlosss_defaults_converges(kind: str, D: int, p: int) -> None:
    geomloss = pytest.importorskip("geomloss", reason="geomloss is not installed")
    x, y = CLOUDS[kind](30, D), CLOUDS[kind](20, D) + 0.2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # In fp32, as users have it.
        ours = SamplesLoss(p=p, debias=False)(x.float(), y.float()).double()
        SamplesLoss(p=p)(x.float(), y.float())
    peer = {
        s: geomloss.SamplesLoss(p=p, debias=False, scaling=s, backend="tensorized")(x, y) for s in (0.5, 0.99)
    }
    exact = SamplesLoss(p=p, debias=False, tol=1e-4, max_iter=200_000)(x.float(), y.float()).double()
    torch.testing.assert_close(ours, exact, rtol=5e-3, atol=1e-4)
    torch.testing.assert_close(peer[0.99], exact, rtol=2e-2, atol=1e-4)
    # Nearer than the peer is by default.
    assert ((ours - exact).abs() <= (peer[0.5] - exact).abs() + 1e-4).all()


def test_samples_loss_weights_and_gradient_from_a_warm_start() -> None:
    x, y = torch.rand(2, 9, 3, dtype=torch.float64), torch.rand(2, 7, 3, dtype=torch.float64)
    a, b = 2 * weights(2, 9), 2 * weights(2, 7)
    b[:, 3] = 0
    loss = SamplesLoss(debias=False, tol=1e-10, max_iter=100_000)
    leaf = x.clone().requires_grad_()
    value = loss(a, leaf, b, y)
    cost = torch.cdist(x, y).square() / 2
    want = sinkhorn(cost, a, b, eps=0.05**2, max_iter=300_000, tol=1e-10, score="value")
    torch.testing.assert_close(value, 2 * want - 0.05**2 * 2 * math.log(2), rtol=1e-7, atol=1e-9)
    value.sum().backward()
    direction = torch.randn_like(x)
    got = float((leaf.grad * direction).sum())
    assert got == pytest.approx(directional(lambda t: loss(a, t, b, y).sum(), x, direction), rel=1e-4)


@pytest.mark.parametrize("batch", [(), (3,)])
def test_pots_fronts_take_and_return_numpy(batch: tuple[int, ...]) -> None:
    ot = pytest.importorskip("ot", reason="POT is not installed")
    M = np.random.default_rng(0).random((*batch, 6, 4))
    M.flags.writeable = False
    a, b = weights(6).numpy(), weights(4).numpy()
    options = {"reg": 0.1, "numItermax": 5000, "stopThr": 1e-12}
    plan, log = ot_sinkhorn(a, b, M, log=True, **options)
    score, log2 = ot_sinkhorn2(a, b, M, log=True, **options)
    assert all(isinstance(x, (np.ndarray, np.generic)) for x in (plan, score, *log.values(), *log2.values()))
    assert plan.dtype == score.dtype == np.float64
    assert plan.shape == M.shape
    assert score.shape == batch
    np.testing.assert_array_equal(ot_sinkhorn2(a, b, M, **options), score)
    np.testing.assert_array_equal(log["log_u"], log2["log_u"])
    for index in np.ndindex(*batch):
        np.testing.assert_allclose(plan[index], ot.sinkhorn(a, b, M[index], **options), rtol=1e-8, atol=1e-12)
        np.testing.assert_allclose(score[index], ot.sinkhorn2(a, b, M[index], **options), rtol=1e-8)
    assert isinstance(ot_sinkhorn(a, b, torch.from_numpy(M.copy()), 0.1), Tensor)
    assert ot_sinkhorn([], [], M.tolist(), 0.1).shape == M.shape


@pytest.mark.parametrize(
    ("error", "match", "change"),
    [
        (TypeError, "M: expected a tensor, an array or numbers, got str", {"M": "cost"}),
        (TypeError, "M: expected a tensor, an array or numbers, got list", {"M": [[1.0], [1.0, 2.0]]}),
        (TypeError, "M: expected fp16.*complex128", {"M": np.ones((2, 2), dtype=complex)}),
        (TypeError, "M: expected fp16.*int64", {"M": np.ones((2, 2), dtype=int)}),
        (TypeError, "a: expected real weights", {"a": np.ones(2, dtype=complex)}),
        (TypeError, "b: expected a tensor, an array or numbers, got object", {"b": object()}),
        (ValueError, r"a: expected weights .*\[3\]", {"a": np.ones(3)}),
        (ValueError, "warmstart: expected None .*, got tuple", {"warmstart": (np.zeros(2), np.zeros(2))}),
        (TypeError, "reg: expected a number, got str", {"reg": "x"}),
        (ValueError, "reg: .*got 0", {"reg": 0}),
        (TypeError, "numItermax: expected an integer, got float", {"numItermax": 1.5}),
        (ValueError, "stopThr: .*got -1", {"stopThr": -1}),
    ],
)
@pytest.mark.parametrize("front", [ot_sinkhorn, ot_sinkhorn2])
def test_pots_fronts_refuse(
    front: object, error: type[Exception], match: str, change: dict[str, object]
) -> None:
    with pytest.raises(error, match=match):
        front(**({"a": None, "b": None, "M": np.ones((2, 2)), "reg": 0.1} | change))
