"""Patch selection and `spa_scores` beside einsum, amax, topk, gather and PLOT's loop; parity comes first.

`spa_scores` runs MAIN and every shape of GRID, forward and forward + backward: plain PyTorch, the product of
patches and tokens alone, and ours with all iterations. torch.compile, the reference, a stop by tolerance and
indices given are slow, or need one shape only: they run MAIN. `topk_patches` runs SELECTED forward, and MAIN
forward + backward.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, lru_cache, partial
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from cases import DEVICE, TransportCase, unit
from measure import synchronised, time_row
from peers import no_compiler, plot_loop, plot_step
from torch import Tensor

from spa_fast import spa_scores, topk_patches
from spa_fast._backends import available
from spa_fast.patches import align_selected

B, N, D = 8, 196, 512
EPS, STEPS = 0.1, 100


@dataclass(frozen=True)
class PatchCase:
    """C classes of M tokens, k patches kept."""

    M: int
    C: int
    k: int

    def __str__(self) -> str:
        return f"B={B} N={N} D={D} C={self.C} M={self.M} k={self.k}"

    def features(self) -> tuple[Tensor, Tensor]:
        g = torch.Generator().manual_seed(0)
        shapes = (B, N, D), (self.C, self.M, D)
        patches, tokens = (torch.randn(*shape, generator=g).to(DEVICE) for shape in shapes)
        return patches, tokens


MAIN = PatchCase(6, 100, 16)
GRID = [PatchCase(M, C, k) for M in (5, 16, 25) for C in (100, 300) for k in (8, 16, 32, 64)]
SELECTED = [
    MAIN,
    PatchCase(5, 300, 64),
    PatchCase(16, 100, 16),
    PatchCase(25, 100, 32),
    PatchCase(25, 300, 8),
]


def gemm(patches: Tensor, tokens: Tensor) -> Tensor:
    """One product; with its backward three."""
    return patches.view(-1, D) @ tokens.view(-1, D).T


def plain_topk(patches: Tensor, tokens: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    sim = torch.einsum("bnd,cmd->bcnm", unit(patches), unit(tokens))
    scores, indices = sim.amax(-1).topk(k, dim=-1)
    return scores, indices, sim


def plain_scores(patches: Tensor, tokens: Tensor, k: int, topk: Any = None, step: Any = plot_step) -> Tensor:
    """PLOT's loop over all pairs, STEPS iterations, the plan held fixed."""
    _, indices, sim = (topk or plain_topk)(patches, tokens, k)
    sim = sim.gather(2, indices[..., None].expand(-1, -1, -1, sim.shape[-1])).flatten(0, 1)
    with torch.no_grad():
        case = TransportCase(*sim.shape, STEPS, eps=EPS)
        plan = plot_loop(1 - sim, *case.weights(), case, step)
    return (plan * sim).sum((1, 2)).view(indices.shape[:2])


def maxsim(patches: Tensor, tokens: Tensor) -> Tensor:
    """Its sum over patches of the largest cosine: no selection, [B, C]."""
    from late_interaction_kernels import maxsim as kernel

    return kernel(unit(patches), unit(tokens))


def ours(patches: Tensor, tokens: Tensor, k: int, backend: str, tol: float = 0.0) -> Tensor:
    return spa_scores(patches, tokens, k, EPS, max_iter=STEPS, tol=tol, backend=backend)


def given(patches: Tensor, tokens: Tensor, k: int) -> Tensor:
    indices = chosen(patches.shape, tokens.shape, k)
    return align_selected(patches, tokens, indices, eps=EPS)


@cache
def chosen(patches: torch.Size, tokens: torch.Size, k: int) -> Tensor:
    return topk_patches(*PatchCase(tokens[1], tokens[0], k).features(), k)[1]


@dataclass(frozen=True)
class Row:
    run: Callable[[Tensor, Tensor, int], Any]
    reason: Callable[[], str | None] = lambda: None
    everywhere: bool = False
    """In all shapes, not just MAIN."""
    checked: bool = True


def _compiled(scores: bool) -> Callable[[Tensor, Tensor, int], Any]:
    # One iteration is compiled: all of them in one graph take minutes to compile and run no faster.
    topk, step = torch.compile(plain_topk, dynamic=False), torch.compile(plot_step, dynamic=False)
    return partial(plain_scores, topk=topk, step=step) if scores else lambda p, s, k: topk(p, s, k)


def _no_maxsim() -> str | None:
    if DEVICE != "cuda":
        return "no CUDA device"
    return None if find_spec("late_interaction_kernels") else "late-interaction-kernels is not installed"


def _why_not(backend: str) -> Callable[[], str | None]:
    if backend == "native" and DEVICE == "cuda":
        return lambda: "it runs on the CPU"
    return lambda: available()[backend]


def _common(plain: str, run: Any, compiled: Any, ours: Any) -> dict[str, Row]:
    """Plain PyTorch, its product alone, the same compiled, and ours per backend."""
    return {
        plain: Row(run, everywhere=True),
        "gemm alone": Row(lambda p, s, k: gemm(p, s), everywhere=True, checked=False),
        "torch.compile of it": Row(compiled, no_compiler),
        **{
            backend: Row(partial(ours, backend=backend), _why_not(backend), everywhere=backend != "reference")
            for backend in ("native", "triton", "reference")
        },
    }


TOPK = {
    **_common("torch: einsum, amax, topk", plain_topk, _compiled(False), topk_patches),
    "late-interaction-kernels maxsim (no selection)": Row(
        lambda p, s, k: maxsim(p, s), _no_maxsim, checked=False
    ),
}
SCORES = {
    **_common("torch: einsum, amax, topk, gather, PLOT's loop", plain_scores, _compiled(True), ours),
    "native, tol 1e-3": Row(partial(ours, backend="native", tol=1e-3), _why_not("native")),
    "triton, tol 1e-3": Row(partial(ours, backend="triton", tol=1e-3), _why_not("triton")),
    "indices given, tol 1e-3": Row(given),
}


@lru_cache(maxsize=1)
def expected(case: PatchCase, scores: bool, backward: bool) -> tuple[Tensor, ...]:
    return prepared(case, plain_scores if scores else plain_topk, backward)()


def prepared(case: PatchCase, function: Any, backward: bool) -> Callable[[], tuple[Tensor, ...]]:
    """One call: scores, and their sum's gradients."""
    features = case.features()

    def run() -> tuple[Tensor, ...]:
        with torch.set_grad_enabled(backward):
            leaves = [x.detach().requires_grad_(backward) for x in features]
            out = function(*leaves, case.k)
            out = out[0] if isinstance(out, tuple) else out
            return (out.detach(), *(torch.autograd.grad(out.sum(), leaves) if backward else ()))

    return run


def time_case(
    benchmark: Any, not_measured: Any, name: str, case: PatchCase, who: str, row: Row, backward: bool
) -> None:
    benchmark.group = f"{name} {'fwd+bwd' if backward else 'fwd'} {case}"
    reason = row.reason()
    if reason is not None:
        not_measured(benchmark.group, who, reason)

    def check(*got: Tensor) -> None:
        if row.checked:
            score, *grads = expected(case, name == "spa_scores", backward)
            # A stop by tolerance is that far from STEPS iterations.
            torch.testing.assert_close(got[0], score, rtol=1e-4, atol=2e-3 if "tol" in who else 1e-5)
            # A patch that takes the place of a nearly equal one changes a gradient by more than rounding.
            for g, want in zip(got[1:], grads, strict=True):
                assert (g - want).norm() <= 2e-2 * want.norm()

    flops = 2 * B * N * case.C * case.M * D
    run = synchronised(prepared(case, row.run, backward))
    if who.startswith("torch.compile"):
        run()
    # Many shapes, so less time for each.
    seconds = 1 if case == MAIN else 0.4
    time_row(benchmark, run, check, seconds, backend=who, shape=str(case), flops=flops)


def rows(table: dict[str, Row], cases: list[PatchCase], without: tuple[str, ...] = ()) -> list[Any]:
    return [
        (case, who)
        for case in cases
        for who, row in table.items()
        if (row.everywhere or case == MAIN) and not who.startswith(without)
    ]


@pytest.mark.parametrize(("case", "who"), rows(TOPK, SELECTED), ids=str)
def bench_topk_patches(
    benchmark: Any, one_thread: None, not_measured: Any, case: PatchCase, who: str
) -> None:
    time_case(benchmark, not_measured, "topk_patches", case, who, TOPK[who], False)


@pytest.mark.parametrize(("case", "who"), rows(TOPK, [MAIN], without=("late-interaction",)), ids=str)
def bench_topk_patches_fwd_bwd(
    benchmark: Any, one_thread: None, not_measured: Any, case: PatchCase, who: str
) -> None:
    time_case(benchmark, not_measured, "topk_patches", case, who, TOPK[who], True)


@pytest.mark.parametrize(("case", "who"), rows(SCORES, [MAIN, *GRID]), ids=str)
def bench_spa_scores(benchmark: Any, one_thread: None, not_measured: Any, case: PatchCase, who: str) -> None:
    time_case(benchmark, not_measured, "spa_scores", case, who, SCORES[who], False)


@pytest.mark.parametrize(("case", "who"), rows(SCORES, [MAIN, *GRID]), ids=str)
def bench_spa_scores_fwd_bwd(
    benchmark: Any, one_thread: None, not_measured: Any, case: PatchCase, who: str
) -> None:
    time_case(benchmark, not_measured, "spa_scores", case, who, SCORES[who], True)
