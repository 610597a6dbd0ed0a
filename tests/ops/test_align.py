"""SinkhornAlign, sinkhorn_align and PatchAligner."""

from __future__ import annotations

import copy
import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.functional import normalize

from spa_fast import PatchAligner, SinkhornAlign, sinkhorn, sinkhorn_align, spa_scores, transport

OPS = torch.ops.spa_fast
SPARSE = torch.eye(6).to_sparse()


def features(B: int = 3, C: int = 4, K: int = 6, M: int = 5, D: int = 8) -> tuple[Tensor, Tensor]:
    return torch.randn(B, K, D), torch.randn(C, M, D)


def cosines(patches: Tensor, tokens: Tensor) -> Tensor:
    return torch.einsum("bkd,cmd->bckm", normalize(patches, dim=-1), normalize(tokens, dim=-1))


def test_align_is_transport_of_one_minus_cosine() -> None:
    patches, tokens = features()
    sim = cosines(patches, tokens)
    out = SinkhornAlign(eps=0.1, return_plan=True)(patches, tokens)
    torch.testing.assert_close(out.score, (out.plan * sim).sum((-2, -1)), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(out.score, 1 - sinkhorn(1 - sim), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        SinkhornAlign(score="value")(patches, tokens), sinkhorn(1 - sim, score="value")
    )
    raw = SinkhornAlign(normalize=False, tol=0, max_iter=20)(patches / 8, tokens)
    want = 1 - sinkhorn(1 - torch.einsum("bkd,cmd->bckm", patches / 8, tokens), tol=0, max_iter=20)
    torch.testing.assert_close(raw, want, rtol=1e-5, atol=1e-5)


def test_align_forms_agree() -> None:
    patches, tokens = features()
    want = SinkhornAlign()(patches, tokens)
    assert want.shape == (3, 4)
    own = tokens[None].expand(3, 4, 5, 8)
    torch.testing.assert_close(SinkhornAlign()(patches, own), want)
    for c in range(4):
        paired = SinkhornAlign.paired()(patches, tokens[c : c + 1].expand(3, 5, 8))
        torch.testing.assert_close(paired, want[:, c])
    assert SinkhornAlign(pairwise=False)(patches, own[:, 0]).shape == (3,)
    assert torch.equal(sinkhorn_align(patches, tokens, reg=0.1, iters=100), want)


@given(lengths=st.lists(st.integers(0, 5), min_size=1, max_size=5), seed=st.integers(0, 9))
def test_align_ragged_tokens(lengths: list[int], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    patches = torch.randn(2, 4, 6, generator=generator)
    tokens = torch.randn(sum(lengths), 6, generator=generator).requires_grad_()
    weights = torch.rand(sum(lengths), generator=generator) + 0.1
    offsets = [sum(lengths[:c]) for c in range(len(lengths) + 1)]
    align = SinkhornAlign(tol=1e-6)
    for b in (None, weights):
        scores = align(patches, tokens, b=b, cu_tokens=torch.tensor(offsets))
        assert torch.equal(scores, align(patches, tokens, b=b, cu_tokens=offsets))
        scores.sum().backward()
        for c, (start, end) in enumerate(pairwise(offsets)):
            if start == end:
                assert not scores[:, c].any()
                continue
            alone = align(patches, tokens[None, start:end], b=None if b is None else b[start:end])
            torch.testing.assert_close(scores[:, c], alone[:, 0], rtol=1e-5, atol=1e-6)
    assert tokens.grad.isfinite().all()


def test_align_masks_equal_slices_and_hide_garbage() -> None:
    patches, tokens = features()
    patch_mask, token_mask = torch.ones(3, 6, dtype=torch.bool), torch.ones(4, 5, dtype=torch.bool)
    patch_mask[0, 4:], token_mask[1, 3:] = False, False
    patches[0, 4:], tokens[1, 3:] = math.nan, math.inf
    patches.requires_grad_()
    tokens.requires_grad_()
    scores = SinkhornAlign()(patches, tokens, patch_mask=patch_mask, token_mask=token_mask)
    torch.testing.assert_close(
        scores[0, 1], SinkhornAlign()(patches[:1, :4], tokens[1:2, :3]).squeeze(), rtol=1e-6, atol=1e-6
    )
    scores.sum().backward()
    for x, mask in ((patches, patch_mask), (tokens, token_mask)):
        assert x.grad.isfinite().all()
        assert not x.grad[~mask].any()
        assert x.grad[mask].any()


@pytest.mark.parametrize("solver", transport.SOLVERS)
@pytest.mark.parametrize("grad", transport.GRADS)
def test_align_fully_masked_image_and_class_score_zero(solver: str, grad: str) -> None:
    patches, tokens = (x.requires_grad_() for x in features())
    patch_mask, token_mask = torch.ones(3, 6, dtype=torch.bool), torch.ones(4, 5, dtype=torch.bool)
    patch_mask[1], token_mask[2] = False, False
    align = SinkhornAlign(solver=solver, grad=grad)
    scores = align(patches, tokens, patch_mask=patch_mask, token_mask=token_mask)
    assert not scores[1].any()
    assert not scores[:, 2].any()
    assert scores[0, 0] != 0
    scores.sum().backward()
    for x, empty in ((patches, 1), (tokens, 2)):
        assert x.grad.isfinite().all()
        assert not x.grad[empty].any()
    with pytest.raises(ValueError, match=r"b: .*fully masked class at \[2\]"):
        align(patches, tokens, b=torch.ones(4, 5), token_mask=token_mask)
    with pytest.raises(ValueError, match=r"a: .*fully masked image at \[1, 0\]"):
        align(patches, tokens, a=torch.ones(3, 6), patch_mask=patch_mask)


def test_align_weights() -> None:
    patches, tokens = features()
    a, b = torch.rand(3, 6) + 0.1, torch.rand(4, 5) + 0.1
    out = SinkhornAlign(return_plan=True, tol=1e-6, max_iter=1000)(patches, tokens, a, b)
    rows, cols = (w / w.sum(-1, keepdim=True) for w in (a, b))
    torch.testing.assert_close(out.plan.sum(-1), rows[:, None].expand(3, 4, 6), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(out.plan.sum(-2), cols[None].expand(3, 4, 5), rtol=1e-5, atol=1e-6)
    full = SinkhornAlign(tol=1e-6, max_iter=1000)(
        patches, tokens, a[:, None].expand(3, 4, 6), b[None].expand(3, 4, 5)
    )
    torch.testing.assert_close(full, out.score)
    paired = SinkhornAlign.paired(tol=1e-6, max_iter=1000)(patches, tokens[:3], a, b[:3])
    torch.testing.assert_close(paired, out.score.diagonal())


def test_align_solvers() -> None:
    patches, tokens = features()
    sim = cosines(patches, tokens)
    got = {s: SinkhornAlign(solver=s, return_plan=True)(patches, tokens) for s in transport.SOLVERS}
    torch.testing.assert_close(got["uniform"].score, sim.mean((-2, -1)))
    torch.testing.assert_close(got["max_mean"].score, sim.amax(-1).mean(-1))
    plan = ((sim / 0.1).softmax(-1) / 6 + (sim / 0.1).softmax(-2) / 5) / 2
    torch.testing.assert_close(got["double_softmax"].score, (plan * sim).sum((-2, -1)))
    for out in got.values():
        torch.testing.assert_close(out.plan.sum((-2, -1)), torch.ones(3, 4))
        torch.testing.assert_close((out.plan * sim).sum((-2, -1)), out.score, rtol=1e-5, atol=1e-6)
    assert (got["max_mean"].score >= got["sinkhorn"].score).all()
    with pytest.raises(ValueError, match="score: 'value' is defined for solver 'sinkhorn'"):
        SinkhornAlign(solver="uniform", score="value")


@pytest.mark.parametrize("solver", ["uniform", "double_softmax", "max_mean"])
def test_align_solver_gradients(solver: str) -> None:
    sim = torch.rand(2, 4, 3, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(
        lambda s: transport.align_similarity(
            s, torch.rand(4).double().fill_(2), solver=solver, grad="implicit"
        ),
        sim,
    )
    out = transport.align_similarity(sim, solver=solver, return_plan=True)
    (grad,) = torch.autograd.grad(out.score.sum(), sim)
    torch.testing.assert_close(grad, out.plan)


@pytest.mark.parametrize("grad", ["implicit", "unroll"])
def test_align_gradcheck(grad: str) -> None:
    patches, tokens = (x.double().requires_grad_() for x in features(2, 2, 3, 2, 4))
    align = SinkhornAlign(
        0.3, 3000 if grad == "implicit" else 4, 1e-14 if grad == "implicit" else 0, grad=grad
    )
    torch.autograd.gradcheck(align, (patches, tokens), atol=1e-6)


def test_align_zero_vectors_and_extreme_norms() -> None:
    patches, tokens = features()
    patches[0, 0], tokens[1, 2] = 0, 0
    patches.requires_grad_()
    tokens.requires_grad_()
    out = SinkhornAlign(solver="uniform")(patches, tokens)
    torch.testing.assert_close(out, cosines(patches, tokens).mean((-2, -1)))
    SinkhornAlign()(patches, tokens).sum().backward()
    assert not patches.grad[0, 0].any()
    assert not tokens.grad[1, 2].any()
    for x in (patches, tokens):
        assert x.grad.isfinite().all()
    with torch.no_grad():
        want = SinkhornAlign()(patches, tokens)
        for scale in (1e-30, 1e30):
            torch.testing.assert_close(SinkhornAlign()(patches * scale, tokens / scale), want)


@pytest.mark.parametrize("size", [(0, 4), (3, 0), (0, 0)])
@pytest.mark.parametrize("solver", transport.SOLVERS)
@pytest.mark.parametrize("return_plan", [False, True])
def test_align_empty(size: tuple[int, int], solver: str, return_plan: bool) -> None:
    patches, tokens = (x.requires_grad_() for x in features(*size))
    out = SinkhornAlign(solver=solver, return_plan=return_plan)(patches, tokens)
    score = out.score if return_plan else out
    assert score.shape == size
    score.sum().backward()
    assert patches.grad.shape == patches.shape
    assert tokens.grad.shape == tokens.shape


def test_align_nonfinite_policies() -> None:
    patches, tokens = features()
    clean = SinkhornAlign()(patches, tokens)
    patches[2, 1, 3], tokens[1, 4, 0] = math.inf, math.nan
    with pytest.raises(ValueError, match=r"patches: .*first at image 2, patch 1"):
        SinkhornAlign()(patches, tokens)
    with pytest.raises(ValueError, match=r"tokens: .*first at class 1, token 4"):
        SinkhornAlign()(patches[:2], tokens)
    scores = SinkhornAlign(nonfinite="propagate")(patches, tokens)
    assert scores[2].isnan().all()
    assert scores[:, 1].isnan().all()
    assert torch.equal(scores[:2, [0, 2, 3]], clean[:2, [0, 2, 3]])
    patches.requires_grad_()
    scores = SinkhornAlign(nonfinite="zero")(patches, tokens)
    zeroed = patches.detach().clone()
    zeroed[2, 1] = 0
    torch.testing.assert_close(scores[:, 0], SinkhornAlign()(zeroed, tokens[:1])[:, 0])
    scores.sum().backward()
    assert patches.grad.isfinite().all()
    assert not patches.grad[2, 1].any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_align_dtypes_and_autocast(dtype: torch.dtype) -> None:
    patches, tokens = (x.to(dtype).requires_grad_() for x in features())
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    scores = SinkhornAlign()(patches, tokens)
    assert scores.dtype == acc
    torch.testing.assert_close(scores, SinkhornAlign()(patches.to(acc), tokens.to(acc)))
    scores.sum().backward()
    assert patches.grad.dtype == dtype
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(SinkhornAlign()(patches, tokens), scores)


@pytest.mark.parametrize("solver", transport.SOLVERS)
def test_align_compiles_whole_without_recompiling(solver: str) -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    align = SinkhornAlign(solver=solver)
    compiled = torch.compile(align, fullgraph=True, backend=counter)
    for B, C in ((3, 4), (5, 6), (7, 4), (9, 11)):
        patches, tokens = (x.requires_grad_() for x in features(B, C))
        mask = torch.rand(C, 5) > 0.2
        ours, want = compiled(patches, tokens, token_mask=mask), align(patches, tokens, token_mask=mask)
        torch.testing.assert_close(ours, want)
        grads = [torch.autograd.grad(y.sum(), (patches, tokens)) for y in (ours, want)]
        torch.testing.assert_close(*grads)
    assert counter.frame_count == 2  # the first sizes, then any


def test_align_ragged_compiles_whole() -> None:
    torch._dynamo.reset()
    patches, tokens = torch.randn(2, 4, 6), torch.randn(7, 6)
    compiled = torch.compile(SinkhornAlign(), fullgraph=True, backend="aot_eager")
    scores = compiled(patches, tokens, cu_tokens=(0, 3, 3, 7))
    torch.testing.assert_close(scores, SinkhornAlign()(patches, tokens, cu_tokens=(0, 3, 3, 7)))


def test_align_chunks_without_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    patches, tokens = features(7, 4)
    a, b = torch.rand(7, 6) + 0.1, torch.rand(7, 4, 5) + 0.1
    own = torch.randn(7, 4, 5, 8)
    whole = [SinkhornAlign()(patches, t, a, b) for t in (tokens, own)]
    paired = SinkhornAlign.paired()(patches, own[:, 0], a, b[:, 0])
    monkeypatch.setattr(transport, "_CHUNK", 300)
    for t, want in zip((tokens, own), whole, strict=True):
        torch.testing.assert_close(SinkhornAlign()(patches, t, a, b), want)
    torch.testing.assert_close(SinkhornAlign.paired()(patches, own[:, 0], a, b[:, 0]), paired)


@pytest.mark.parametrize("form", ["tokens", "own", "paired"])
def test_align_chunks_with_gradient(monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    patches, tokens = (x.requires_grad_() for x in features(7, 4))
    if form != "tokens":
        tokens = torch.randn(7, 4, 5, 8, requires_grad=True)
    align = SinkhornAlign(pairwise=form != "paired")
    args = patches, tokens[:, 0] if form == "paired" else tokens, torch.rand(7, 6) + 0.1
    upstream = torch.randn(7) if form == "paired" else torch.randn(7, 4)
    whole = align(*args)
    want = torch.autograd.grad(whole, (patches, tokens), upstream)
    monkeypatch.setattr(transport, "_CHUNK", 300 if form != "paired" else 70)
    chunked = align(*args)
    torch.testing.assert_close(chunked, whole)
    torch.testing.assert_close(torch.autograd.grad(chunked, (patches, tokens), upstream), want)


@pytest.mark.parametrize("grad", transport.GRADS)
@pytest.mark.parametrize("score", transport.SCORES)
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_align_similarity_reads_every_layout(grad: str, score: str, backend: str) -> None:
    """As one GEMM leaves it, [B, K, C, M], and as [B, C, K, M]."""
    wide = torch.rand(3, 6, 4, 5, requires_grad=True)
    a, b, upstream = torch.rand(3, 1, 6) + 0.1, torch.rand(4, 5) + 0.1, torch.randn(3, 4)
    options = {"grad": grad, "score": score, "return_plan": True, "tol": 1e-6, "max_iter": 500}
    outs, grads = [], []
    for sim, name in (
        (wide.transpose(1, 2), backend),
        (wide.transpose(1, 2).contiguous(), backend),
        (wide.transpose(1, 2), "reference"),
    ):
        outs.append(transport.align_similarity(sim, a, b, backend=name, **options))
        grads += torch.autograd.grad(outs[-1].score, wide, upstream)
    for x, y in zip(outs[0], outs[1], strict=True):
        assert torch.equal(x, y)
    assert torch.equal(grads[0], grads[1])
    torch.testing.assert_close(outs[0].score, outs[2].score)
    torch.testing.assert_close(grads[0], grads[2], rtol=1e-4, atol=1e-6)
    cost = 1 - wide.detach().transpose(1, 2)
    want = sinkhorn(cost, a, b, score=score, tol=1e-6, max_iter=500, backend=backend)
    torch.testing.assert_close(outs[0].score, want if score == "value" else 1 - want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("size", [(3, 6, 4, 5), (0, 6, 4, 5), (3, 6, 0, 5)])
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_align_opcheck(size: tuple[int, ...], backend: str) -> None:
    sim = torch.rand(size, requires_grad=True)
    a, b = torch.full((1, 6), 1 / 6), torch.full((1, 5), 1 / 5)
    args = (sim, a, b, 0.1, 8, 1e-3, False, "envelope", backend, True)
    torch.library.opcheck(OPS._sinkhorn_fwd.default, args)
    with torch.no_grad():
        score, f, g, n_iter, _ = OPS._sinkhorn_fwd(*args)
    sim = sim.detach()
    torch.library.opcheck(
        OPS._sinkhorn_bwd.default, (score, sim, a, b, f, g, n_iter, 0.1, False, "envelope", backend, True)
    )
    torch.library.opcheck(OPS._sinkhorn_plan.default, (sim, a, b, f, g, 0.1, True))


def test_unit_op() -> None:
    x = torch.randn(3, 4, 5, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(OPS._unit, x)
    torch.autograd.gradgradcheck(OPS._unit, x)
    torch.library.opcheck(OPS._unit.default, (torch.randn(2, 3, 4, requires_grad=True),))
    # Far from 1 a norm is taken in fp64, which changes no other row.
    x = torch.randn(4, 16)
    want = normalize(x.double(), dim=-1)
    alone, _ = OPS._unit(x[2:])
    scaled = x * torch.tensor([[1e-30], [1e37], [1.0], [1.0]])
    y, inverse = OPS._unit(scaled)
    torch.testing.assert_close(y.double(), want, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(
        inverse.double() * scaled.double().norm(dim=-1, keepdim=True), want.new_ones(4, 1)
    )
    assert torch.equal(y[2:], alone)


def test_align_layouts() -> None:
    patches, tokens = features()
    want = SinkhornAlign()(patches, tokens)
    turned = patches.transpose(1, 2).contiguous().transpose(1, 2)
    spread = torch.zeros(4, 10, 16)
    spread[:, ::2, ::2] = tokens
    torch.testing.assert_close(SinkhornAlign()(turned, spread[:, ::2, ::2]), want)
    one = patches[:1].clone().requires_grad_()
    SinkhornAlign()(one.expand(3, 6, 8), tokens).sum().backward()
    grad, one.grad = one.grad, None
    SinkhornAlign()(one, tokens).sum().backward()
    torch.testing.assert_close(grad, 3 * one.grad)


def test_align_is_a_module() -> None:
    align = SinkhornAlign(reg=0.2, numItermax=9, thresh=0.0, solver="sinkhorn", grad="implicit")
    assert (align.eps, align.max_iter, align.tol) == (0.2, 9, 0.0)
    assert "eps=0.2, max_iter=9" in repr(align)
    assert "grad='implicit'" in repr(align)
    assert align.state_dict() == {}
    assert not list(align.parameters())
    patches, tokens = features()
    twin = copy.deepcopy(align)
    twin.load_state_dict(align.state_dict())
    assert torch.equal(twin.eval()(patches, tokens), align.train()(patches, tokens))


@pytest.mark.parametrize(
    ("error", "match", "kwargs"),
    [
        (ValueError, "eps", {"eps": 0.0}),
        (ValueError, "solver.*'sinkhron'.*did you mean 'sinkhorn'", {"solver": "sinkhron"}),
        (ValueError, "nonfinite", {"nonfinite": "ignore"}),
        (ValueError, "backend", {"backend": "gpu"}),
        (TypeError, "normalise.*did you mean 'normalize'", {"normalise": True}),
        (TypeError, "reg.*eps", {"eps": 0.1, "reg": 0.1}),
        (TypeError, "blur: expected a number, got str", {"blur": "x"}),
        (TypeError, "blur: expected a number, got bool", {"blur": True}),
        (TypeError, "eps: expected a number, got Tensor", {"eps": torch.tensor(0.1)}),
        (TypeError, "eps: expected a number, got NoneType", {"eps": None}),
        (TypeError, "max_iter: expected an integer, got bool", {"max_iter": True}),
        (TypeError, "max_iter: expected an integer, got Tensor", {"max_iter": torch.tensor(3)}),
        (TypeError, "tol: expected a number, got str", {"tol": "1e-3"}),
        (TypeError, "tol: expected a number, got bool", {"tol": False}),
    ],
)
def test_align_refuses_options(error: type[Exception], match: str, kwargs: dict[str, object]) -> None:
    with pytest.raises(error, match=match):
        SinkhornAlign(**kwargs)


@pytest.mark.parametrize(
    ("error", "match", "change"),
    [
        (ValueError, r"patches: expected \[B, K, D\], got \[6, 8\]", {"patches": torch.zeros(6, 8)}),
        (ValueError, r"tokens: .*\[\*, \*, 8\], got \[4, 5, 7\]", {"tokens": torch.zeros(4, 5, 7)}),
        (ValueError, r"tokens: .*got \[2, 4, 5, 8\]", {"tokens": torch.zeros(2, 4, 5, 8)}),
        (ValueError, "tokens: expected M >= 1", {"tokens": torch.zeros(4, 0, 8)}),
        (ValueError, "patches: expected K >= 1", {"patches": torch.zeros(3, 0, 8)}),
        (TypeError, "tokens: expected the dtype of patches", {"tokens": torch.zeros(4, 5, 8).half()}),
        (
            ValueError,
            "tokens: expected the device of patches",
            {"tokens": torch.zeros(4, 5, 8, device="meta")},
        ),
        (TypeError, "patches: .*int64", {"patches": torch.zeros(3, 6, 8, dtype=torch.int64)}),
        (TypeError, "tokens: .*complex64", {"tokens": torch.zeros(4, 5, 8, dtype=torch.complex64)}),
        (TypeError, "patch_mask: expected bool", {"patch_mask": torch.ones(3, 6)}),
        (ValueError, r"patch_mask: .*\[3, 6\], got \[3, 5\]", {"patch_mask": torch.ones(3, 5).bool()}),
        (ValueError, r"token_mask: .*\[4, 5\], got \[5\]", {"token_mask": torch.ones(5).bool()}),
        (ValueError, "a: .*-1", {"a": -torch.ones(6)}),
        (ValueError, r"b: .*got \[3, 5\]", {"b": torch.ones(3, 5)}),
        (ValueError, "b: expected a constant", {"b": torch.ones(4, 5, requires_grad=True)}),
        (ValueError, r"tokens: expected \[sum M, D\]", {"cu_tokens": [0, 4]}),
        (ValueError, "cu_tokens: .*3 tokens", {"tokens": torch.zeros(3, 8), "cu_tokens": [0, 2, 1, 3]}),
        (ValueError, "cu_tokens: .*3 tokens", {"tokens": torch.zeros(3, 8), "cu_tokens": [0, 2]}),
        (TypeError, "cu_tokens: .*float32", {"tokens": torch.zeros(3, 8), "cu_tokens": torch.zeros(2)}),
        *(
            (TypeError, f"cu_tokens: expected {what}", {"tokens": torch.zeros(3, 8), "cu_tokens": offsets})
            for what, offsets in (
                (r"a tensor, list or tuple .*, got str", "03"),
                (r"a tensor, list or tuple .*, got int", 3),
                (r"a tensor, list or tuple .*, got set", {0, 3}),
                (r"integers, got float at \[1\]", [0, 1.0, 3]),
                (r"integers, got bool at \[0\]", [False, 3]),
                (r"integers, got str at \[1\]", [0, "a", 3]),
                (r"integers, got NoneType at \[1\]", (0, None)),
            )
        ),
        *(
            (TypeError, f"{name}: expected a tensor, got {type(x).__name__}", {name: x})
            for name in ("patches", "tokens", "a", "b", "patch_mask", "token_mask")
            for x in ([[1.0]], "x", 1)
        ),
        (TypeError, "patches: expected a dense tensor, got torch.sparse_coo", {"patches": SPARSE}),
        (
            TypeError,
            "token_mask: expected a dense tensor, got torch.sparse_coo",
            {"token_mask": SPARSE.bool()},
        ),
        (TypeError, "tokens: .*float8_e4m3fn", {"tokens": torch.zeros(4, 5, 8).to(torch.float8_e4m3fn)}),
        (TypeError, "b: .*complex64", {"b": torch.ones(4, 5, dtype=torch.complex64)}),
        (
            ValueError,
            "patches: expected a device that holds values, got meta",
            {"patches": torch.zeros(3, 6, 8, device="meta"), "tokens": torch.zeros(4, 5, 8, device="meta")},
        ),
    ],
)
def test_align_refuses_inputs(error: type[Exception], match: str, change: dict[str, object]) -> None:
    patches, tokens = features()
    with pytest.raises(error, match=match):
        SinkhornAlign()(**({"patches": patches, "tokens": tokens} | change))


def test_patch_aligner_is_spa_scores() -> None:
    patches, tokens = torch.randn(3, 20, 8), torch.randn(4, 5, 8)
    aligner = PatchAligner(7, reg=0.2, reduce="mean", grad="implicit")
    want = spa_scores(patches, tokens, 7, 0.2, reduce="mean", grad="implicit")
    assert torch.equal(aligner(patches, tokens), want)
    frozen = torch.randn(3, 20, 6), torch.randn(4, 2, 6)
    torch.testing.assert_close(
        aligner(patches, tokens, select_patches=frozen[0], select_tokens=frozen[1]),
        spa_scores(patches, tokens, 7, 0.2, reduce="mean", select_patches=frozen[0], select_tokens=frozen[1]),
    )
    assert "k=7, eps=0.2" in repr(aligner)
    with pytest.raises(ValueError, match="k: expected >= 1"):
        PatchAligner(0)
    with pytest.raises(ValueError, match="k: expected 1 <= k <= N = 20"):
        PatchAligner(21)(patches, tokens)


@pytest.mark.gpu
def test_align_on_a_gpu_matches_the_cpu() -> None:
    patches, tokens = features(5, 7, 32, 16, 64)
    want = SinkhornAlign(tol=1e-5)(patches, tokens)
    got = SinkhornAlign(tol=1e-5)(patches.cuda(), tokens.cuda())
    torch.testing.assert_close(got.cpu(), want, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="device"):
        SinkhornAlign()(patches.cuda(), tokens)


def test_compiled_ragged_classes_of_any_lengths() -> None:
    align = torch.compile(SinkhornAlign(), fullgraph=True)
    patches, tokens = torch.randn(2, 4, 8), torch.randn(30, 8)
    for offsets in ((0, 4, 10, 30), (0, 5, 12, 30), (0, 0, 29, 30)):
        found = align(patches, tokens, cu_tokens=offsets)
        torch.testing.assert_close(found, SinkhornAlign()(patches, tokens, cu_tokens=offsets))


def test_autocast_features_meet_cached_fp32_tokens() -> None:
    linear, patches, tokens = torch.nn.Linear(8, 8), torch.randn(2, 4, 8), torch.randn(3, 5, 8)
    with torch.autocast("cpu", torch.bfloat16):
        projected = linear(patches)
        assert projected.dtype == torch.bfloat16
        scores = SinkhornAlign()(projected, tokens)
    scores.sum().backward()
    assert scores.dtype == torch.float32
    assert linear.weight.grad.isfinite().all()
    with pytest.raises(TypeError, match="tokens: expected the dtype of patches"):
        SinkhornAlign()(projected, tokens)


def test_negative_blur_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"blur: expected a finite number > 0 \(eps is its power\), got -0.5"
    ):
        SinkhornAlign(blur=-0.5)
