"""kernels.sinkhorn_bwd against the fp64 oracle's explicit gradients, and offsets past 2^31."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from spa_fast.kernels import BlockConfig, sinkhorn_bwd, sinkhorn_fwd
from spa_fast.kernels._math import offset, problem
from tolerance import assert_grad
from torch import Tensor

from spa_fast.reference import sinkhorn as reference

MODES = ["envelope", "implicit", "unroll"]
INF, NAN = float("inf"), float("nan")


def problems(device: str, P: int, K: int, M: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    cost = 2 * torch.rand(P, K, M)
    a, b = torch.rand(P, K) + 0.1, torch.rand(P, M) + 0.1
    a, b = a / a.sum(1, keepdim=True), b / b.sum(1, keepdim=True)
    return [cost.to(device, dtype), a.to(device), b.to(device)]


def check(
    inputs: list[Tensor], eps: float, max_iter: int, value: bool, mode: str, config: BlockConfig | None = None
) -> Tensor:
    """One problem's gradient an assertion, so that a large one hides no small one."""
    cost, a, b = inputs
    exact = [x.double().cpu() for x in inputs]
    found = sinkhorn_fwd(cost, a, b, eps, max_iter, 1e-4, value)[1:4]
    want = reference.sinkhorn_fwd(*exact, eps, max_iter, 1e-4, value)[1:4]
    assert torch.equal(found[2].cpu(), want[2])
    grad = torch.randn(cost.shape[0])
    out = sinkhorn_bwd(grad.to(cost.device), cost, a, b, *found, eps, value, mode, config=config)
    expected = reference.sinkhorn_bwd(grad.double(), *exact, *want, eps, value, mode)
    assert out.dtype == cost.dtype
    for x, y in zip(out, expected, strict=True):
        assert_grad(x, y, cost.dtype)
    return out


@pytest.mark.parametrize("value", [False, True], ids=["transport", "value"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("K", "M"), [(1, 1), (1, 5), (7, 1), (7, 5), (5, 7)])
def test_sinkhorn_bwd_matches_the_oracle(device: str, K: int, M: int, mode: str, value: bool) -> None:
    check(problems(device, 2, K, M), 0.1, 8, value, mode)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_sinkhorn_bwd_half_precision(device: str, dtype: torch.dtype, mode: str) -> None:
    if device == "cpu" and dtype == torch.bfloat16:
        pytest.skip("the interpreter truncates fp32 to bf16")
    check(problems(device, 2, 7, 5, dtype), 0.1, 8, False, mode)


@pytest.mark.parametrize("mode", ["implicit", "unroll"])
def test_sinkhorn_bwd_in_blocks(device: str, mode: str) -> None:
    check(problems(device, 2, 6, 13), 0.1, 6, False, mode, BlockConfig(1, 32))


def test_sinkhorn_bwd_unroll_recomputes_what_it_does_not_keep(device: str) -> None:
    """40 iterations in 32 slots; each problem stops by itself."""
    inputs = problems(device, 3, 4, 3)
    inputs[0] *= torch.tensor([0.05, 1.0, 8.0], device=device)[:, None, None]
    n_iter = sinkhorn_fwd(*inputs, 0.1, 40, 1e-4, False)[3].tolist()
    assert n_iter[0] < 10
    assert max(n_iter) > 33
    check(inputs, 0.1, 40, False, "unroll")


def test_sinkhorn_bwd_implicit_near_a_permutation(device: str) -> None:
    """A nearly singular system: entries off the permutation are e^-9 of those on it."""
    cost = 0.5 + 0.5 * torch.rand(1, 5, 5)
    cost[0, range(5), [2, 0, 3, 1, 4]] = 0.05 * torch.rand(5)
    even = torch.full((1, 5), 0.2)
    check([x.to(device) for x in (cost, even, even.clone())], 0.05, 60, False, "implicit")


@pytest.mark.parametrize("mode", MODES)
def test_sinkhorn_bwd_masked_forbidden_empty_and_bad(device: str, mode: str) -> None:
    cost, a, b = problems(device, 5, 6, 4)
    grad = torch.ones(5, device=device)
    a[0, 4:], b[0, 3] = 0, 0
    cost[0, 4:], cost[0, :, 3] = NAN, -1e30
    cost[1, 2, 1:3] = INF
    b[2] = 0
    cost[3, 1, 1] = NAN
    f, g, n = sinkhorn_fwd(cost, a, b, 0.1, 6, 0.0, False)[1:4]
    out = sinkhorn_bwd(grad, cost, a, b, f, g, n, 0.1, False, mode)
    assert not out[0, 4:].any()
    assert not out[0, :, 3].any()
    assert not out[1, 2, 1:3].any()
    assert not out[2].any()
    assert out[3].isnan().all()
    fine = [0, 1, 2, 4]
    want = reference.sinkhorn_bwd(
        *(x[fine].double().cpu() for x in (grad, cost, a, b, f, g)), n[fine].cpu(), 0.1, False, mode
    )
    for x, y in zip(out[fine], want, strict=True):
        assert_grad(x, y, torch.float32)
    alone = sinkhorn_bwd(*(x[4:].clone() for x in (grad, cost, a, b, f, g, n)), 0.1, False, mode)
    assert torch.equal(out[4:], alone)
    shared = [grad[:2], cost[3:].nan_to_num(0.5), a[4:], b[4:]]
    f, g, n = sinkhorn_fwd(*shared[1:], 0.1, 6, 0.0, False)[1:4]
    wide = [*shared[:2], *(x.expand(2, -1).contiguous() for x in shared[2:])]
    both = [sinkhorn_bwd(*x, f, g, n, 0.1, False, mode) for x in (shared, wide)]
    assert torch.equal(*both)


def test_sinkhorn_bwd_no_problems(device: str) -> None:
    cost, a, b = problems(device, 1, 7, 5)
    f, g, n = sinkhorn_fwd(cost[:0], a, b[:0], 0.1, 10, 1e-3, False)[1:4]
    for mode in MODES:
        out = sinkhorn_bwd(torch.ones(0, device=device), cost[:0], a, b[:0], f, g, n, 0.1, False, mode)
        assert out.shape == (0, 7, 5)


@pytest.mark.parametrize("similarity", [False, True], ids=["cost", "similarity"])
@pytest.mark.parametrize("value", [False, True], ids=["transport", "value"])
@pytest.mark.parametrize("mode", MODES)
def test_sinkhorn_bwd_all_pairs_in_their_layout_and_sign(
    device: str, mode: str, value: bool, similarity: bool
) -> None:
    """As the oracle on [P, K, M]; dC = -dS turns the sign for the value only, as <P, S> = 1 - <P, C>."""
    B, K, C, M = 2, 5, 3, 4
    cost, a, b = problems(device, B * C, K, M)
    b = b[:1]
    stored = (1 - cost if similarity else cost).view(B, C, K, M).transpose(1, 2).contiguous()
    found = sinkhorn_fwd(stored, a, b, 0.1, 8, 0.0, value, similarity)[1:4]
    grad = torch.randn(B * C)
    out = sinkhorn_bwd(grad.to(device), stored, a, b, *found, 0.1, value, mode, similarity)
    assert out.shape == stored.shape
    assert out.is_contiguous()
    exact = [x.double().cpu() for x in (1 - (1 - cost) if similarity else cost, a, b)]
    want = reference.sinkhorn_fwd(*exact, 0.1, 8, 0.0, value)[1:4]
    expected = reference.sinkhorn_bwd(grad.double(), *exact, *want, 0.1, value, mode)
    sign = -1 if similarity and value else 1
    for x, y in zip(out.transpose(1, 2).reshape(B * C, K, M), sign * expected, strict=True):
        assert_grad(x, y, torch.float32)


@triton.jit(do_not_specialize=["p", "K", "C", "M"])
def probe(out_ptr, p, K, C, M):
    tl.store(out_ptr, problem(p, K, C, M) + offset(K - 1, C) * M)


def test_offsets_pass_two_to_the_31st(device: str) -> None:
    """The helpers that place every problem and row, for problems that no test has the memory to reach."""
    out = torch.zeros(1, dtype=torch.int64, device=device)
    top = 2**31 - 1024
    for p, K, C, M in (
        (307199, 196, 1, 36),
        (307199, 196, 300, 36),
        (top, 256, 1, 256),
        (top, 256, top, 256),
    ):
        probe[(1,)](out, p, K, C, M)
        assert out.item() == ((p // C * K + K - 1) * C + p % C) * M


@pytest.mark.gpu
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("K", [16, 196, 256])
@pytest.mark.parametrize("M", [5, 256])
def test_sinkhorn_bwd_on_a_device(K: int, M: int, mode: str) -> None:
    check(problems("cuda", 33, K, M), 0.1, 50, False, mode)
    inputs = problems("cuda", 33, K, M)
    f, g, n = sinkhorn_fwd(*inputs, 0.1, 50, 1e-4, False)[1:4]
    run = (torch.ones(33, device="cuda"), *inputs, f, g, n, 0.1, False, mode)
    torch.cuda.set_sync_debug_mode("error")
    try:
        first, second = sinkhorn_bwd(*run), sinkhorn_bwd(*run)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(first, second)
