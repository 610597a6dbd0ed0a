"""Entropic transport, ours beside its peers: same problems, same T, same eps, parity asserted first."""

from __future__ import annotations

import os
from functools import cache, partial
from typing import Any

import numpy as np
import pytest
import torch
from cases import DEVICE, TransportCase, unit
from measure import synchronised, time_row
from peers import PEERS, plot_loop, rows
from torch import Tensor

from spa_fast import SinkhornAlign, sinkhorn

# Problems that parity is asserted on: the fp64 reference is slow.
CHECKED = 640


@cache
def expected(case: TransportCase, score: str, grad: str | None) -> tuple[Tensor, Tensor | None]:
    """Of the fp64 reference, for the first problems of a case."""
    cost, (a, b) = case.cost()[:CHECKED].double().requires_grad_(grad is not None), case.weights()
    out = sinkhorn(
        cost,
        a[:CHECKED],
        b[:CHECKED],
        eps=case.eps,
        max_iter=case.max_iter,
        tol=case.tol,
        score=score,
        grad=grad or "envelope",
        backend="reference",
    )
    got = None if grad is None else torch.autograd.grad(out.sum(), cost)[0]
    return out.detach(), got


def check(case: TransportCase, who: str, score: Any, grad: Any) -> None:
    peer = PEERS[who]
    kind = None if grad is None else "unroll" if peer.grad == "unroll" else "envelope"
    want, want_grad = expected(case, peer.score, kind)
    score, grad = (x if x is None else torch.as_tensor(_array(x))[:CHECKED].to(want) for x in (score, grad))
    # Where each has a stop of its own, they agree within the tolerance.
    slack = peer.short_factor if case.max_iter < 50 else 1
    torch.testing.assert_close(score, want, rtol=1e-5, atol=peer.atol * slack + 2 * case.tol)
    if grad is not None:
        error = grad / (2 if peer.grad == "double" else 1) - want_grad
        assert error.norm() <= (peer.grad_rtol * slack + 20 * case.tol) * want_grad.norm()


def _array(x: Any) -> Any:
    return x if isinstance(x, Tensor) else np.array(x)


def run_case(benchmark: Any, not_measured: Any, case: TransportCase, who: str, backward: bool) -> None:
    benchmark.group = f"sinkhorn {'fwd+bwd' if backward else 'fwd'} {case}"
    reason = PEERS[who].reason() or PEERS[who].unfit(case, backward)
    if reason is None and DEVICE == "cuda" and who.startswith("native"):
        reason = "it runs on the CPU"
    if reason is None and who.endswith("all threads"):
        if os.cpu_count() == 1:
            reason = "one CPU"
        torch.set_num_threads(os.cpu_count() or 1)
    if reason is not None:
        not_measured(benchmark.group, who, reason)
    run = synchronised(PEERS[who].build(case, backward))
    numbers = case.P * case.K * case.M * (2 if backward else 1) + case.P * (case.K + case.M + 3)
    time_row(
        benchmark,
        run,
        partial(check, case, who),
        backend=who,
        shape=[case.P, case.K, case.M],
        bytes_moved=4 * numbers,
    )


@pytest.mark.parametrize(("case", "who"), rows(backward=False), ids=str)
def bench_sinkhorn_fwd(
    benchmark: Any, one_thread: None, not_measured: Any, case: TransportCase, who: str
) -> None:
    run_case(benchmark, not_measured, case, who, backward=False)


@pytest.mark.parametrize(("case", "who"), rows(backward=True), ids=str)
def bench_sinkhorn_fwd_bwd(
    benchmark: Any, one_thread: None, not_measured: Any, case: TransportCase, who: str
) -> None:
    run_case(benchmark, not_measured, case, who, backward=True)


B, C, K, M, D = 8, 100, 32, 16, 512
ALL_PAIRS = TransportCase(B * C, K, M, 50)


def plain_align(patches: Tensor, tokens: Tensor) -> Tensor:
    """Similarities by einsum, then PLOT's loop, 50 iterations, the plan held fixed."""
    sim = torch.einsum("bkd,cmd->bckm", unit(patches), unit(tokens)).flatten(0, 1)
    with torch.no_grad():
        plan = plot_loop(1 - sim, *ALL_PAIRS.weights(), ALL_PAIRS)
    return (plan * sim).sum((1, 2)).view(B, C)


ALIGN = {
    "gemm alone": lambda p, s: p.view(B * K, D) @ s.view(C * M, D).T,
    "torch: einsum, kernel-space loop": plain_align,
    "spa_fast T=50": SinkhornAlign(max_iter=50, tol=0),
    "spa_fast tol=1e-3": SinkhornAlign(tol=1e-3),
}


@pytest.mark.parametrize("who", ALIGN)
@pytest.mark.parametrize("backward", [False, True], ids=["fwd", "fwd+bwd"])
def bench_sinkhorn_align(benchmark: Any, one_thread: None, who: str, backward: bool) -> None:
    benchmark.group = f"sinkhorn_align {'fwd+bwd' if backward else 'fwd'} B={B} C={C} K={K} M={M} D={D}"
    generator = torch.Generator().manual_seed(0)
    patches, tokens = (torch.randn(n, m, D, generator=generator).to(DEVICE) for n, m in ((B, K), (C, M)))

    def run(function: Any = ALIGN[who]) -> tuple[Tensor, ...]:
        with torch.set_grad_enabled(backward):
            leaves = [x.detach().requires_grad_(backward) for x in (patches, tokens)]
            out = function(*leaves)
            return (out.detach(), *(torch.autograd.grad(out.sum(), leaves) if backward else ()))

    if who != "gemm alone":
        # A stop by tolerance is that far from 50 iterations.
        rtol = 2e-2 if "tol" in who else 1e-4
        for got, want in zip(run(), run(plain_align), strict=True):
            assert (got - want).norm() <= rtol * want.norm()
    flops = 2 * B * K * C * M * D * (3 if backward else 1)
    time_row(benchmark, synchronised(run), backend=who, shape=[B, C, K, M, D], flops=flops)
