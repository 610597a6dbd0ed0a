"""spa_fast.sinkhorn: weights, aliases, outputs, errors."""

from __future__ import annotations

import inspect
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from spa_fast import SinkhornOutput, sinkhorn
from spa_fast.transport import align_similarity


@given(
    batch=st.lists(st.integers(0, 3), max_size=3),
    K=st.integers(1, 9),
    M=st.integers(1, 9),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
    value=st.booleans(),
)
def test_sinkhorn_shapes_and_dtypes(
    batch: list[int], K: int, M: int, dtype: torch.dtype, value: bool
) -> None:
    cost = torch.rand(*batch, K, M).to(dtype).requires_grad_()
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    score = "value" if value else "transport"
    out = sinkhorn(cost, score=score, return_plan=True)
    assert isinstance(out, SinkhornOutput)
    assert out.score.shape == out.n_iter.shape == out.marginal_error.shape == out.converged.shape == (*batch,)
    assert out.plan.shape == cost.shape
    assert out.f.shape == (*batch, K)
    assert out.g.shape == (*batch, M)
    assert {x.dtype for x in (out.score, out.plan, out.f, out.g, out.marginal_error)} == {acc}
    assert out.n_iter.dtype == torch.int32
    assert out.converged.dtype == torch.bool
    assert torch.equal(sinkhorn(cost, score=score), out.score)
    torch.testing.assert_close(
        out.plan.sum(-2), torch.full((*batch, M), 1 / M, dtype=acc), rtol=1e-5, atol=1e-6
    )
    out.score.sum().backward()
    assert cost.grad.shape == cost.shape
    assert cost.grad.dtype == dtype


def test_sinkhorn_scores_are_the_documented_ones() -> None:
    cost = torch.rand(3, 6, 4, dtype=torch.float64)
    out = sinkhorn(cost, eps=0.2, max_iter=4000, tol=1e-12, return_plan=True)
    ab = 1 / 24
    torch.testing.assert_close(out.score, (out.plan * cost).sum((-2, -1)))
    potentials = out.f[:, :, None] + out.g[:, None, :]
    torch.testing.assert_close(out.plan, ab * ((potentials - cost) / 0.2).exp())
    value = sinkhorn(cost, eps=0.2, max_iter=4000, tol=1e-12, score="value")
    kl = (out.plan * (out.plan / ab).log() - out.plan + ab).sum((-2, -1))
    torch.testing.assert_close(value, out.score + 0.2 * kl)


def test_sinkhorn_weights_are_normalised_shared_broadcast_and_constant() -> None:
    cost = torch.rand(2, 3, 5, 4)
    a = torch.tensor([1.0, 2.0, 0.0, 1.0, 4.0])
    out = sinkhorn(cost, a, return_plan=True, tol=1e-6, max_iter=1000)
    torch.testing.assert_close(out.plan.sum(-1), (a / 8).expand(2, 3, 5), rtol=1e-4, atol=1e-6)
    for same in (a * 1e30, a.half(), a.double(), a.expand(2, 3, 5), a.view(1, 1, 5).expand(2, 1, 5)):
        torch.testing.assert_close(sinkhorn(cost, same, tol=1e-6, max_iter=1000), out.score)
    each = torch.rand(2, 1, 4) + 0.1
    plan = sinkhorn(cost, b=each, return_plan=True).plan
    torch.testing.assert_close(plan.sum(-2), (each / each.sum(-1, keepdim=True)).expand(2, 3, 4))
    assert sinkhorn(cost, torch.zeros(5)).eq(0).all()
    with pytest.raises(ValueError, match=r"a: expected a constant.*detach"):
        sinkhorn(cost, a.clone().requires_grad_())


def test_sinkhorn_aliases() -> None:
    cost = torch.rand(3, 5, 4)
    want = sinkhorn(cost, eps=0.25, max_iter=7, tol=1e-5)
    for eps in ({"reg": 0.25}, {"epsilon": 0.25}, {"blur": 0.5}):
        for steps in ("numItermax", "iters", "max_iterations"):
            for tol in ("stopThr", "thresh"):
                assert torch.equal(sinkhorn(cost, **eps, **{steps: 7, tol: 1e-5}), want)
    with pytest.raises(TypeError, match=r"reg.*eps.*'eps'"):
        sinkhorn(cost, eps=0.1, reg=0.1)
    with pytest.raises(TypeError, match=r"iters.*max_iter.*'numItermax'"):
        sinkhorn(cost, numItermax=3, iters=4)
    with pytest.raises(TypeError, match="max_iters: unexpected argument; did you mean 'max_iter'"):
        sinkhorn(cost, max_iters=4)
    assert list(inspect.signature(sinkhorn).parameters)[:5] == ["cost", "a", "b", "eps", "max_iter"]


def test_sinkhorn_tol_zero_runs_all_iterations_and_flags() -> None:
    cost = torch.rand(4, 6, 5)
    out = sinkhorn(cost, tol=0, max_iter=37, return_plan=True)
    assert (out.n_iter == 37).all()
    assert torch.equal(out.converged, out.marginal_error <= 1e-3)
    hard = sinkhorn(100 * cost, eps=1e-2, max_iter=2, return_plan=True)
    assert not hard.converged.any()
    assert hard.score.isfinite().all()


@pytest.mark.parametrize(
    ("error", "match", "kwargs"),
    [
        (ValueError, "eps: expected .* > 0.*got 0", {"eps": 0}),
        (ValueError, "eps.*-1", {"eps": -1.0}),
        (ValueError, "eps.*nan", {"eps": math.nan}),
        (ValueError, "eps.*inf", {"eps": math.inf}),
        (TypeError, "eps.*str", {"eps": "0.1"}),
        (ValueError, "max_iter: expected >= 1, got 0", {"max_iter": 0}),
        (TypeError, "max_iter.*float", {"max_iter": 1.5}),
        (ValueError, "tol.*-1", {"tol": -1.0}),
        (ValueError, "tol.*nan", {"tol": math.nan}),
        (ValueError, "score.*'values'.*did you mean 'value'", {"score": "values"}),
        (ValueError, "grad: expected one of 'envelope', 'implicit', 'unroll'", {"grad": "auto"}),
        (ValueError, r"a: .*\[2, 5\].*\[4\]", {"a": torch.ones(4)}),
        (ValueError, r"b: .*\[2, 4\].*\[3, 4\]", {"b": torch.ones(3, 4)}),
        (
            ValueError,
            r"b: expected finite weights >= 0, got -1.0 at \[2\]",
            {"b": torch.tensor([1, 1, -1.0, 1])},
        ),
        (ValueError, "a: .*nan", {"a": torch.full((5,), math.nan)}),
        (ValueError, "a: .*inf", {"a": torch.full((5,), math.inf)}),
        (TypeError, "a: .*int64", {"a": torch.ones(5, dtype=torch.int64)}),
        (TypeError, "a: .*list", {"a": [1.0] * 5}),
        (ValueError, "a: expected the device", {"a": torch.ones(5, device="meta")}),
    ],
)
def test_sinkhorn_refuses(error: type[Exception], match: str, kwargs: dict[str, object]) -> None:
    with pytest.raises(error, match=match):
        sinkhorn(torch.rand(2, 5, 4), **kwargs)


@pytest.mark.parametrize(
    "dtype", [torch.int64, torch.complex64, torch.bool, torch.float8_e4m3fn, torch.uint8]
)
def test_sinkhorn_refuses_dtypes(dtype: torch.dtype) -> None:
    with pytest.raises(TypeError, match=f"cost: expected fp16, bf16, fp32 or fp64, got {dtype}"):
        sinkhorn(torch.zeros(2, 3, 4).to(dtype))


@pytest.mark.parametrize("shape", [(), (3,), (2, 0, 4), (2, 4, 0)])
def test_align_similarity_refuses_shapes(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"sim: expected \[..., K, M\] with K, M >= 1"):
        align_similarity(torch.zeros(shape))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_sinkhorn_refuses_what_is_no_dense_tensor_with_values() -> None:
    cost = torch.rand(5, 4)
    for bad, match in (
        (cost.to_sparse(), "expected a dense tensor, got torch.sparse_coo"),
        (cost.to_sparse_csr(), "expected a dense tensor, got torch.sparse_csr"),
        (torch.nested.nested_tensor([cost, cost]), "expected a dense tensor, got a nested tensor"),
        ([[0.1]], "expected a tensor, got list"),
    ):
        with pytest.raises(TypeError, match=f"cost: {match}"):
            sinkhorn(bad)
        with pytest.raises(TypeError, match=f"sim: {match}"):
            align_similarity(bad)
    with pytest.raises(ValueError, match="cost: expected a device that holds values, got meta"):
        sinkhorn(cost.to("meta"))


@pytest.mark.parametrize("shape", [(), (3,), (2, 0, 4), (2, 4, 0)])
def test_sinkhorn_refuses_shapes(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"cost: expected \[..., K, M\]"):
        sinkhorn(torch.zeros(shape))
