"""sample_gaussian and its operator: what decides a draw, forms, dtypes, strides, refusals."""

import pytest
import torch
from torch import Tensor

from spa_fast import sample_gaussian
from spa_fast._backends import available
from spa_fast._ops.gaussian import sample_gaussian as op
from spa_fast.reference import gaussian as reference
from spa_fast.reference.gaussian import pack_tril

BACKENDS = [
    pytest.param(name, marks=[] if reason is None else [pytest.mark.skip(reason=reason)])
    for name, reason in available().items()
    if name != "triton"
]
KINDS = ("tril", "diag", "lowrank")
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def case(C=3, D=5):
    mean = torch.randn(C, D, generator=torch.Generator().manual_seed(0))
    return mean, torch.randn(C, D, D, generator=torch.Generator().manual_seed(1)).tril()


def operands(
    kind: str, C=3, D=5, rank=2, shared=False
) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor]:
    """mean, factor, diag, class ids and seed, as the operator takes them."""
    generator = torch.Generator().manual_seed(2)
    rows = 1 if shared else C
    size = {"tril": (D * (D + 1) // 2,), "diag": (D,), "lowrank": (D, rank)}[kind]
    mean, factor = torch.randn(C, D, generator=generator), torch.randn(rows, *size, generator=generator)
    diag = torch.rand(rows, D, generator=generator) if kind == "lowrank" else None
    return mean, factor, diag, 10 * torch.arange(C), torch.tensor([-3])


def test_seed_ids_and_number_decide():
    mean, tril = case()
    x = sample_gaussian(mean, tril, 6, seed=3)
    assert x.shape == (3, 6, 5)
    assert torch.equal(sample_gaussian(mean, tril, 6, seed=3, class_ids=torch.arange(3)), x)
    part = sample_gaussian(mean[1:], tril[1:], 4, seed=3, class_ids=torch.tensor([1, 2]))
    torch.testing.assert_close(part, x[1:, :4])
    assert not torch.equal(sample_gaussian(mean, tril, 6, seed=4), x)


def test_forms_agree():
    mean, tril = case()
    want = sample_gaussian(mean, tril, 4, seed=1)
    torch.testing.assert_close(sample_gaussian(mean, pack_tril(tril), 4, seed=1), want)
    torch.testing.assert_close(sample_gaussian(mean, tril.mT.contiguous().mT, 4, seed=1), want)
    std = tril.diagonal(dim1=1, dim2=2).abs()
    diag = sample_gaussian(mean, std, 4, seed=1)
    torch.testing.assert_close(diag, sample_gaussian(mean, torch.diag_embed(std), 4, seed=1))
    low_rank = (torch.zeros(3, 5, 2), std)
    torch.testing.assert_close(sample_gaussian(mean, low_rank, 4, seed=1), diag)


def test_generator_gives_the_seed():
    mean, tril = case()
    generator = torch.Generator().manual_seed(0)
    first = sample_gaussian(mean, tril, 2, generator=generator)
    assert not torch.equal(sample_gaussian(mean, tril, 2, generator=generator), first)
    assert torch.equal(sample_gaussian(mean, tril, 2, generator=generator.manual_seed(0)), first)


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtype_is_that_of_the_mean(dtype):
    mean, tril = case()
    assert sample_gaussian(mean.to(dtype), tril, 2, seed=0).dtype == dtype


@pytest.mark.parametrize(("C", "n"), [(0, 3), (3, 0)])
def test_nothing_to_draw(C, n):
    mean, tril = case()
    assert sample_gaussian(mean[:C], tril[:C], n, seed=0).shape == (C, n, 5)


def test_refusals():
    mean, tril = case()
    for factor in (tril[:2], tril[:, :4], torch.zeros(3, 14), (tril, torch.zeros(3, 4))):
        with pytest.raises(ValueError, match="factor: expected"):
            sample_gaussian(mean, factor, 1, seed=0)
    with pytest.raises(ValueError, match="mean: expected"):
        sample_gaussian(mean[0], tril, 1, seed=0)
    with pytest.raises(TypeError, match="mean: expected"):
        sample_gaussian(mean.long(), tril, 1, seed=0)
    with pytest.raises(ValueError, match="n: expected"):
        sample_gaussian(mean, tril, -1, seed=0)
    for seed in (-1, 1 << 64):
        with pytest.raises(ValueError, match="seed: expected"):
            sample_gaussian(mean, tril, 1, seed=seed)
    for name, bad in (("n", {"n": 1.5}), ("seed", {"seed": 1.5}), ("class_ids", {"class_ids": [0, 1, 2]})):
        with pytest.raises(TypeError, match=f"{name}: expected"):
            sample_gaussian(mean, tril, **{"n": 1, "seed": 0, **bad})
    with pytest.raises(TypeError, match="class_ids"):
        sample_gaussian(mean, tril, 1, seed=0, class_ids=torch.ones(3))
    with pytest.raises(ValueError, match="class_ids"):
        sample_gaussian(mean, tril, 1, seed=0, class_ids=torch.arange(4))
    with pytest.raises(ValueError, match="class ids"):
        sample_gaussian(mean, tril, 1, seed=0, class_ids=torch.tensor([0, 1, 1 << 32]))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("dtype", DTYPES[:3])
def test_op_against_fp64(backend, kind, shared, dtype):
    mean, factor, diag, ids, seed = operands(kind, D=37, shared=shared)
    factor, diag = factor.to(dtype), None if diag is None else diag.to(dtype)
    both = factor.double() if diag is None else (factor.double(), diag.double())
    for n, first in ((1, 0), (4, 2), (9, 100)):
        want = reference.sample_gaussian(mean.double(), both, n, seed, ids, first)
        got = op(mean, factor, diag, ids, seed, n, first, kind, backend)
        torch.testing.assert_close(got.double(), want, rtol=0, atol=1e-6 * float(want.abs().max()))
        low = op(mean.to(dtype), factor, diag, ids, seed, n, first, kind, backend)
        assert low.dtype == dtype
        torch.testing.assert_close(low.float(), got, rtol=2.0**-7, atol=2.0**-7)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_op_takes_any_strides(backend, kind):
    mean, factor, diag, ids, seed = operands(kind, C=4)

    def strided(x):
        return None if x is None else torch.stack([x, x.neg()], dim=-1)[..., 0]

    want = op(mean, factor, diag, ids, seed, 6, 0, kind, backend)
    got = op(strided(mean), strided(factor), strided(diag), strided(ids), strided(seed), 6, 0, kind, backend)
    assert torch.equal(got, want)
    expanded = op(mean, factor[:1].expand_as(factor), diag, ids, seed, 6, 0, kind, backend)
    assert torch.equal(expanded, op(mean, factor[:1], diag, ids, seed, 6, 0, kind, backend))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shared", [False, True])
def test_op_reads_rows_where_they_lie(backend, kind, shared):
    mean, factor, diag, _, seed = operands(kind, C=4, shared=shared)
    rows, ids = torch.tensor([3, 0, 3, 1, 2]), torch.tensor([8, 1, 5, 0, (1 << 32) - 1])

    def picked(x):
        return x if x is None or x.shape[0] == 1 else x[rows]

    want = op(mean[rows], picked(factor), picked(diag), ids, seed, 6, 2, kind, backend)
    got = op(mean, factor, diag, ids, seed, 6, 2, kind, backend, rows)
    torch.testing.assert_close(got, want, rtol=0, atol=0)
    apart = torch.stack([rows, rows], 1)[:, 0]
    assert torch.equal(op(mean, factor, diag, ids, seed, 6, 2, kind, backend, apart), got)
    none = op(mean, factor, diag, ids[:0], seed, 6, 2, kind, backend, rows[:0])
    assert none.shape == (0, 6, 5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_op_without_a_factor_left(backend):
    mean, _, diag, ids, seed = operands("lowrank")
    got = op(mean, torch.zeros(3, 5, 0), diag, ids, seed, 4, 0, "lowrank", backend)
    torch.testing.assert_close(got, op(mean, diag, None, ids, seed, 4, 0, "diag", backend))
    for C, D, n in ((0, 5, 2), (3, 0, 2), (3, 5, 0)):
        x = op(mean[:C, :D], mean[:C, :D], None, ids[:C], seed, n, 0, "diag", backend)
        assert x.shape == (C, n, D)


@pytest.mark.parametrize("kind", KINDS)
def test_opcheck(kind):
    for backend in ("auto", "reference"):
        torch.library.opcheck(op, (*operands(kind), 4, 0, kind, backend))
        torch.library.opcheck(op, (*operands(kind), 4, 0, kind, backend, torch.tensor([2, 0, 2])))


@pytest.mark.parametrize("kind", KINDS)
def test_compiles_without_a_break(kind):
    mean, factor, diag, ids, seed = operands(kind)
    compiled = torch.compile(
        lambda *x: op(*x, 4, 0, kind, "auto") * 2, fullgraph=True, backend="aot_eager", dynamic=True
    )
    got = compiled(mean, factor, diag, ids, seed)
    assert torch.equal(got, 2 * op(mean, factor, diag, ids, seed, 4, 0, kind, "auto"))


def test_op_has_no_gradient():
    mean, *rest = operands("diag")
    x = op(mean.requires_grad_(), *rest, 4, 0, "diag", "auto")
    with pytest.raises(RuntimeError, match="autograd"):
        x.sum().backward()


def test_op_refusals():
    mean, factor, _, ids, seed = operands("tril")

    def draw(
        mean=mean,
        factor=factor,
        diag=None,
        ids=ids,
        seed=seed,
        n=2,
        first=0,
        kind="tril",
        backend="auto",
        rows=None,
    ):
        return op(mean, factor, diag, ids, seed, n, first, kind, backend, rows)

    cases = [
        ({"kind": "full"}, "kind"),
        ({"mean": mean[0]}, "mean"),
        ({"factor": factor[:2]}, "factor"),
        ({"factor": factor[:, 1:]}, "factor"),
        ({"factor": mean, "diag": mean, "kind": "lowrank"}, "factor"),
        ({"factor": mean[0, 0]}, "factor"),
        ({"diag": mean}, "diag"),
        ({"factor": torch.zeros(3, 5, 2), "kind": "lowrank"}, "diag"),
        ({"factor": torch.zeros(3, 5, 2), "diag": mean[:2], "kind": "lowrank"}, "diag"),
        ({"ids": ids[:2]}, "class_ids"),
        ({"ids": ids.int()}, "class_ids"),
        ({"seed": torch.tensor(3)}, "seed"),
        ({"seed": torch.tensor([3.0])}, "seed"),
        ({"rows": torch.tensor([0, 1, 3])}, "rows: expected 0 <= row < 3, got 0 to 3"),
        ({"rows": torch.tensor([0, 1, -1])}, "rows"),
        ({"rows": torch.tensor([0, 1])}, "rows"),
        ({"rows": torch.zeros(3)}, "rows"),
        ({"n": -1}, "n, first"),
        ({"first": -1}, "n, first"),
        ({"first": (1 << 32) - 1}, "n, first"),
        ({"backend": "cuda"}, "backend"),
    ]
    for change, name in cases:
        with pytest.raises(ValueError, match=name):
            draw(**change)
    for change, name in (({"mean": mean.long()}, "mean"), ({"factor": factor.to(torch.complex64)}, "factor")):
        with pytest.raises(TypeError, match=name):
            draw(**change)
    for change in ({"backend": "triton"}, {"backend": "native", "mean": mean.double()}):
        with pytest.raises(RuntimeError, match="not usable"):
            draw(**change)
