"""Draws on a device: those of the CPU within rounding, whatever the launch; graphs, streams, no host sync."""

import math

import pytest
import torch
from torch import Tensor

from spa_fast import sample_gaussian
from spa_fast._native import native_info
from spa_fast._ops.gaussian import sample_gaussian as op

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not native_info().get("cuda_archs"), reason="built without CUDA"),
]

KINDS = ("tril", "diag", "lowrank")
DTYPES = [torch.float16, torch.bfloat16, torch.float32]


def operands(
    kind: str, C: int, D: int, rank=5, shared=False
) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(D)
    rows = 1 if shared else C
    size = {"tril": (D * (D + 1) // 2,), "diag": (D,), "lowrank": (D, rank)}[kind]
    mean, factor = torch.randn(C, D, generator=generator), torch.randn(rows, *size, generator=generator)
    diag = torch.rand(rows, D, generator=generator) if kind == "lowrank" else None
    return mean, factor, diag, 7 * torch.arange(C), torch.tensor([-(1 << 40) - 3])


def on_device(operands: tuple[Tensor | None, ...]) -> list[Tensor | None]:
    return [None if x is None else x.cuda() for x in operands]


def test_normals_are_those_of_the_cpu():
    C, D = 50, 512
    ids = torch.arange(C)
    seed = torch.tensor([1234567890123])
    x = (torch.zeros(C, D), torch.ones(1, D), None, ids, seed)
    want = op(*x, 100, 3, "diag", "native")
    got = op(*on_device(x), 100, 3, "diag", "native").cpu()
    size = want.abs().clamp(min=1e-8)
    ulp = torch.nextafter(size, torch.tensor(math.inf)) - size
    assert float(((got - want).abs() / ulp).max()) <= 4


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("D", [1, 5, 31, 128, 129, 512])
def test_draws_are_those_of_the_cpu(kind, shared, D):
    x = operands(kind, 3, D, shared=shared)
    for n in (1, 4, 7, 40):
        want = op(*x, n, 2, kind, "native")
        got = op(*on_device(x), n, 2, kind, "native").cpu()
        torch.testing.assert_close(got, want, rtol=0, atol=2e-6 * float(want.abs().max()))


@pytest.mark.parametrize("factor_dtype", DTYPES)
@pytest.mark.parametrize("mean_dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_dtypes(factor_dtype, mean_dtype, kind):
    mean, factor, diag, *rest = on_device(operands(kind, 3, 130))
    factor, diag = factor.to(factor_dtype), None if diag is None else diag.to(factor_dtype)
    for n in (3, 20):
        low = op(mean.to(mean_dtype), factor, diag, *rest, n, 0, kind, "native")
        wide = op(mean.to(mean_dtype).float(), factor, diag, *rest, n, 0, kind, "native")
        assert torch.equal(low, wide.to(mean_dtype))
        want = op(
            *(None if x is None else x.cpu() for x in (mean.to(mean_dtype).float(), factor, diag, *rest)),
            n,
            0,
            kind,
            "native",
        )
        torch.testing.assert_close(wide.cpu(), want, rtol=0, atol=2e-6 * float(want.abs().max()))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("D", [37, 512])
def test_a_draw_depends_on_nothing_else(kind, D):
    mean, factor, diag, ids, seed = on_device(operands(kind, 60, D))
    whole = op(mean, factor, diag, ids, seed, 70, 0, kind, "native")
    for n, first in ((1, 0), (4, 5), (16, 11), (33, 37)):
        assert torch.equal(
            op(mean, factor, diag, ids, seed, n, first, kind, "native"), whole[:, first : first + n]
        )
    some = torch.tensor([41, 3], device="cuda")
    rows = (mean[some], factor[some], None if diag is None else diag[some], ids[some])
    assert torch.equal(op(*rows, seed, 70, 0, kind, "native"), whole[some])
    assert torch.equal(op(mean, factor, diag, ids[some], seed, 70, 0, kind, "native", some), whole[some])


def test_graph_replays_draw_anew():
    mean, factor, diag, ids, _ = on_device(operands("tril", 5, 64))

    def draw() -> Tensor:
        seed = torch.randint((1 << 63) - 1, (1,), device="cuda")
        return op(mean, factor, diag, ids, seed, 4, 0, "tril", "native")

    draw()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        x = draw()
    graph.replay()
    first = x.clone()
    graph.replay()
    assert bool(x.isfinite().all())
    assert not torch.equal(x, first)


def test_no_host_sync():
    x = on_device(operands("tril", 5, 64))
    op(*x, 4, 0, "tril", "native")
    torch.cuda.set_sync_debug_mode("error")
    try:
        op(*x, 4, 0, "tril", "native")
        sample_gaussian(x[0], x[1], 4)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_another_stream_gives_the_same_bits():
    x = on_device(operands("lowrank", 5, 64))
    want = op(*x, 4, 0, "lowrank", "native")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        got = op(*x, 4, 0, "lowrank", "native")
    stream.synchronize()
    assert torch.equal(got, want)


def test_too_wide_for_shared_memory():
    x = on_device(operands("diag", 2, 4097))
    with pytest.raises(RuntimeError, match="4096"):
        op(*x, 2, 0, "diag", "native")
    assert op(*x, 2, 0, "diag", "auto").shape == (2, 2, 4097)


def test_one_device():
    mean, factor, _, ids, seed = operands("tril", 2, 5)
    with pytest.raises(ValueError, match="seed"):
        op(mean.cuda(), factor.cuda(), None, ids.cuda(), seed, 2, 0, "tril", "auto")
