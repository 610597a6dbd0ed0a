"""One SPA training step and one evaluation pass per backend, and where their time goes."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import pytest
import torch
from cases import DEVICE
from measure import time_row
from torch import Tensor

from spa_fast._backends import available
from spa_fast.cil.config import SpaConfig
from spa_fast.cil.data.stream import ClassTexts
from spa_fast.cil.methods import local_branch
from spa_fast.cil.methods.spa import Spa

B, N, D, C, M, OLD = 64, 196, 512, 100, 6, 90
SHAPE = f"B={B} N={N} D={D} C={C} M={M} k={SpaConfig.k}"
BACKENDS = ("reference", "native", "triton")


@cache
def batch() -> tuple[Tensor, Tensor, Tensor]:
    """Global tokens, patches as the cache holds them, and labels among the newest classes."""
    g = torch.Generator().manual_seed(0)
    whole, patches = torch.randn(B, D, generator=g), torch.randn(B, N, D, generator=g)
    return whole, patches.half(), torch.randint(OLD, C, (B,), generator=g)


@cache
def method(backend: str) -> Spa:
    """At its last task of ten: old classes have Gaussians, the newest projectors are trained."""
    g = torch.Generator().manual_seed(1)
    spa = Spa(SpaConfig(backend=backend), D, 100.0)
    mask = torch.ones(C, M, dtype=torch.bool)
    spa.texts = ClassTexts(torch.randn(C, 1, D, generator=g), torch.randn(C, M, D, generator=g), mask)
    for bank in spa.projectors.values():
        bank.add_task()
    for replay in (spa.replay, spa.local.replay):
        replay.fit(torch.randn(2 * OLD, D, generator=g), torch.arange(OLD).repeat(2))
    return spa


@cache
def kept(backend: str) -> local_branch.Kept:
    spa = method(backend)
    return spa.local.select(batch()[1], spa.seen_texts())


def train_step(spa: Spa, indices: local_branch.Kept | None, stages: Stages) -> Tensor:
    whole, patches, targets = batch()
    loss = spa._loss(whole, patches, targets, indices, spa.seen_texts(), range(OLD, C))
    # Returned in place of a step, which would change the next call's input.
    with stages.of("backward"):
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, spa._trainable())])


def evaluate(spa: Spa, _indices: Any, _stages: Stages) -> Tensor:
    whole, patches, _ = batch()
    return spa.scores(whole, patches)


class Stages:
    """Seconds by stage; a stage within another counts for itself only."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._inner = [0.0]

    @contextmanager
    def of(self, name: str) -> Iterator[None]:
        self._inner.append(0.0)
        start = time.perf_counter()
        try:
            yield
        finally:
            took = time.perf_counter() - start
            self.seconds[name] += took - self._inner.pop()
            self._inner[-1] += took

    def within(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            with self.of(name):
                return function(*args, **kwargs)

        return run

    def percent(self) -> dict[str, int]:
        total = sum(self.seconds.values())
        return {name: round(100 * s / total) for name, s in sorted(self.seconds.items(), key=lambda x: -x[1])}


def shares(spa: Spa, run: Callable[[Stages], Any], monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Percent of one call by stage, compiled selection and alignment being one stage."""
    stages = Stages()
    with monkeypatch.context() as patch:
        for name, stage in (
            ("spa_scores", "selection and alignment"),
            ("align_selected", "alignment"),
            ("sinkhorn_align", "alignment"),
            ("topk_patches", "selection"),
        ):
            patch.setattr(local_branch, name, stages.within(stage, getattr(local_branch, name)))
        for bank in spa.projectors.values():
            patch.setattr(bank, "forward", stages.within("projectors", bank.forward))
        for replay in (spa.replay, spa.local.replay):
            patch.setattr(replay, "draw", stages.within("pseudo-features", replay.draw))
        with stages.of("rest"):
            run(stages)
    return stages.percent()


def time_stage(
    benchmark: Any, not_measured: Any, monkeypatch: Any, group: str, who: str, work: Any, select: bool
) -> None:
    benchmark.group = group
    backend = who.partition(",")[0]
    reason = available()[backend]
    if reason is None and DEVICE == "cuda":
        reason = "training is on the CPU"
    if reason is not None:
        not_measured(f"{group}, {SHAPE}", who, reason)
    spa, indices = method(backend), kept(backend) if select else None

    def run(stages: Stages | None = None) -> Tensor:
        spa.generator.manual_seed(0)
        return work(spa, indices, stages or Stages())

    def check(got: Tensor) -> None:
        want = expected(work)
        assert (got - want).norm() <= 1e-3 * want.norm()

    # The first draw factorises the covariances of a task; steps share them.
    run()
    time_row(benchmark, run, lambda *out: check(torch.stack(out)), backend=who, shape=SHAPE)
    benchmark.extra_info["shares"] = shares(spa, run, monkeypatch)


@cache
def expected(work: Any) -> Tensor:
    spa = method("reference")
    spa.generator.manual_seed(0)
    return work(spa, None, Stages())


@pytest.mark.parametrize("who", ["reference", "native", "native, choices kept", "triton"])
def bench_training_step(
    benchmark: Any, one_thread: None, not_measured: Any, monkeypatch: pytest.MonkeyPatch, who: str
) -> None:
    """Forward and backward, as training does or with patches that were chosen before, by `align_selected`."""
    time_stage(benchmark, not_measured, monkeypatch, "SPA training step", who, train_step, "kept" in who)


@pytest.mark.parametrize("who", BACKENDS)
def bench_evaluation_pass(
    benchmark: Any, one_thread: None, not_measured: Any, monkeypatch: pytest.MonkeyPatch, who: str
) -> None:
    time_stage(benchmark, not_measured, monkeypatch, "SPA evaluation pass", who, evaluate, False)
