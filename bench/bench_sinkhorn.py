"""Entropic transport forward: ours on every CPU backend beside the torch.logsumexp loop people write."""

from __future__ import annotations

import os
from functools import cache
from typing import Any

import pytest
import torch
from cases import TRANSPORT, TransportCase
from torch import Tensor

from spa_fast import sinkhorn
from spa_fast._backends import available

WHO = ["torch loop", "reference", "native"]


def torch_loop(cost: Tensor, case: TransportCase) -> Tensor:
    """The same iteration, but one stop for all problems and so one host synchronisation an iteration."""
    _, K, M = cost.shape
    a, b = torch.tensor(1 / K), torch.tensor(1 / M)
    scaled = -cost / case.eps
    psi = torch.zeros(cost.shape[0], M)
    for _ in range(case.max_iter):
        phi = -torch.logsumexp(scaled + (psi + b.log())[:, None, :], 2)
        psi = -torch.logsumexp(scaled + (phi + a.log())[:, :, None], 1)
        if case.tol > 0:
            plan = a * b * (scaled + phi[:, :, None] + psi[:, None, :]).exp()
            if (plan.sum(2) - a).abs().sum(1).max() <= case.tol:
                break
    plan = a * b * (scaled + phi[:, :, None] + psi[:, None, :]).exp()
    return (plan * cost).sum((1, 2))


def solve(who: str, cost: Tensor, case: TransportCase) -> Tensor:
    if who == "torch loop":
        return torch_loop(cost, case)
    out: Tensor = sinkhorn(cost, eps=case.eps, max_iter=case.max_iter, tol=case.tol, backend=who)
    return out


@cache
def expected(case: TransportCase) -> Tensor:
    out: Tensor = sinkhorn(
        case.cost().double(), eps=case.eps, max_iter=case.max_iter, tol=case.tol, backend="reference"
    )
    return out


@pytest.mark.parametrize("who", WHO)
@pytest.mark.parametrize("case", TRANSPORT, ids=str)
def bench_sinkhorn_fwd(benchmark: Any, one_thread: None, case: TransportCase, who: str) -> None:
    reason = available().get(who)
    if reason is not None:
        pytest.skip(f"not measured: {reason}")
    cost = case.cost()
    # Problems that stop by themselves stop earlier than the loop's common stop: equal within the tolerance.
    score = solve(who, cost, case).double()
    torch.testing.assert_close(score, expected(case), rtol=1e-5, atol=1e-5 + case.tol)
    benchmark.group = f"sinkhorn fwd {case}"
    benchmark.extra_info |= {
        "shape": [case.P, case.K, case.M],
        "dtype": "float32",
        "backend": who,
        "threads": torch.get_num_threads(),
        "cpus": os.cpu_count(),
        "bytes_moved": cost.numel() * 4 + case.P * (case.K + case.M + 3) * 4,
    }
    rounds = 30 if who == "native" else 5
    benchmark.pedantic(
        solve, (who, cost, case), rounds=rounds, warmup_rounds=1, iterations=4 if who == "native" else 1
    )
