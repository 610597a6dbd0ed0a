"""Who solves the same transport problems: ours, what people write in PyTorch, and the installed libraries."""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from importlib.util import find_spec
from typing import Any

import torch
from cases import DEVICE, MAIN, TRANSPORT, TransportCase
from torch import Tensor

from spa_fast import sinkhorn
from spa_fast._backends import available
from spa_fast._native import extension, native_info

Result = tuple[Any, Any]
"""Scores [P], and the gradient of their sum with respect to the cost or None."""
Run = Callable[[], Result]


@dataclass(frozen=True)
class Peer:
    build: Callable[[TransportCase, bool], Run]
    """Of a case and whether the gradient is wanted; inputs are made here, outside of what is timed."""
    reason: Callable[[], str | None] = lambda: None
    """Why it cannot run here, or None."""
    score: str = "transport"
    """"transport": <P, C>; "value": <P, C> + eps KL(P | a b^T)."""
    grad: str = "envelope"
    """"envelope": the plan; "unroll": of <P, C> through the iterations; "double": twice the plan."""
    atol: float = 1e-5
    grad_rtol: float = 1e-3
    short_factor: float = 1
    """By which both grow where there are fewer than 50 iterations."""
    cases: tuple[TransportCase, ...] = tuple(TRANSPORT)
    backward: tuple[TransportCase, ...] = tuple(TRANSPORT)
    unfit: Callable[[TransportCase, bool], str | None] = lambda case, backward: None
    """Why it does not run a case of its list, or None: a row of the record that says so."""


def ours(case: TransportCase, backward: bool, backend: str) -> Run:
    cost, (_, b) = case.cost(), case.weights()
    options = {"eps": case.eps, "max_iter": case.max_iter, "tol": case.tol, "backend": backend}
    return _differentiated(lambda C: sinkhorn(C, None, b if case.ragged else None, **options), cost, backward)


def native_of(case: TransportCase, backward: bool, isa: str) -> Run:
    """The native solver held to narrower vectors than the machine has; no gradient."""
    cost, (a, b) = case.cost(), case.weights()
    P, K, M = cost.shape
    f, g, n_iter = torch.empty(P, K), torch.empty(P, M), torch.empty(P, dtype=torch.int32)
    score, error = torch.empty(P), torch.empty(P)

    def run() -> Result:
        extension().sinkhorn_fwd(
            *(cost.data_ptr(), 0, a.data_ptr(), K, b.data_ptr(), M),
            *(P, K, M, case.eps, case.max_iter, case.tol, False),
            *(score.data_ptr(), f.data_ptr(), g.data_ptr(), n_iter.data_ptr(), error.data_ptr()),
            threads=torch.get_num_threads(),
            isa=isa,
        )
        return score, None

    return run


def torch_step(scaled: Tensor, log_a: Tensor, log_b: Tensor, psi: Tensor) -> tuple[Tensor, Tensor]:
    phi = -torch.logsumexp(scaled + (log_b + psi)[:, None, :], 2)
    return phi, -torch.logsumexp(scaled + (log_a + phi)[:, :, None], 1)


def torch_loop(cost: Tensor, a: Tensor, b: Tensor, case: TransportCase, step: Any = torch_step) -> Tensor:
    """The same iteration, but one stop for all problems and so one host synchronisation an iteration."""
    scaled, log_a, log_b = -cost / case.eps, a.log(), b.log()
    psi = torch.zeros_like(b)
    for _ in range(case.max_iter):
        phi, psi = step(scaled, log_a, log_b, psi)
        if case.tol > 0:
            plan = (scaled + (log_a + phi)[:, :, None] + (log_b + psi)[:, None, :]).exp()
            if (plan.sum(2) - a).abs().sum(1).max() <= case.tol:
                break
    return (scaled + (log_a + phi)[:, :, None] + (log_b + psi)[:, None, :]).exp()


def plot_step(kernel: Tensor, a: Tensor, b: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    r = a / (kernel @ c)
    return r, b / (kernel.mT @ r)


def plot_loop(cost: Tensor, a: Tensor, b: Tensor, case: TransportCase, step: Any = plot_step) -> Tensor:
    """Kernel space, the stop of PLOT: mean |r - r0| over all problems; wrong where exp(-cost / eps) is 0."""
    kernel = (-cost / case.eps).exp()
    a, b = a[:, :, None], b[:, :, None]
    r, c = torch.ones_like(a), torch.ones_like(b)
    for _ in range(case.max_iter):
        before = r
        r, c = step(kernel, a, b, c)
        if case.tol > 0 and (r - before).abs().mean() < 1e-2:
            break
    return r * kernel * c.mT


def looped(case: TransportCase, backward: bool, loop: Any, unrolled: bool) -> Run:
    cost, (a, b) = case.cost(), case.weights()

    def score(C: Tensor) -> Tensor:
        with torch.set_grad_enabled(unrolled and backward):
            plan = loop(C, a, b, case)
        return (plan * C).sum((1, 2))

    return _differentiated(score, cost, backward)


def compiled(case: TransportCase, backward: bool) -> Run:
    torch._dynamo.reset()
    # One iteration is compiled: all 50 in one graph take half a minute to compile and run no faster.
    step = torch.compile(torch_step, dynamic=False)
    return looped(case, backward, partial(torch_loop, step=step), True)


def pot(case: TransportCase, backward: bool, method: str) -> Run:
    import ot

    cost, (a, b) = case.cost(), case.weights()
    options = {"reg": case.eps, "max_iter": case.max_iter, "tol": case.tol, "method": method}

    def run() -> Result:
        if not backward:
            return ot.solve_batch(cost, a=a, b=b, grad="detach", **options).value_linear, None
        leaf = cost.detach().requires_grad_()
        out = ot.solve_batch(leaf, a=a, b=b, grad="envelope", **options)
        return out.value_linear.detach(), torch.autograd.grad(out.value.sum(), leaf)[0]

    return run


def geomloss(case: TransportCase, backward: bool) -> Run:
    from geomloss.ot import solve_batch

    cost, (a, b) = case.cost(), case.weights()

    def score(C: Tensor) -> Tensor:
        return solve_batch(C, reg=case.eps, a=a, b=b, max_iter=case.max_iter).value

    return _differentiated(score, cost, backward)


def ott(case: TransportCase, backward: bool) -> Run:
    jax = _jax()
    from ott.geometry.geometry import Geometry
    from ott.solvers.linear import solve

    T = case.max_iter
    inputs = [jax.numpy.asarray(x.cpu().numpy()) for x in (case.cost(), *case.weights())]
    if case.tol:
        # The error is looked at every inner_iterations.
        stop = {"threshold": case.tol, "inner_iterations": 1}
    else:
        # Equal minimum and maximum fix the number.
        stop = {"min_iterations": T, "inner_iterations": T}

    def value(C: Any, a: Any, b: Any) -> Any:
        out = solve(Geometry(cost_matrix=C, epsilon=case.eps), a, b, max_iterations=T, **stop)
        return out.reg_ot_cost, (out.matrix * C).sum()

    def graded(C: Any, a: Any, b: Any) -> Any:
        (_, score), grad = jax.value_and_grad(value, has_aux=True)(C, a, b)
        return score, grad

    solver = jax.jit(jax.vmap(graded if backward else lambda *x: (value(*x)[1], None)))

    def run() -> Result:
        return jax.block_until_ready(solver(*inputs))

    return run


def _differentiated(score: Callable[[Tensor], Tensor], cost: Tensor, backward: bool) -> Run:
    def run() -> Result:
        if not backward:
            with torch.no_grad():
                return score(cost), None
        leaf = cost.detach().requires_grad_()
        out = score(leaf)
        return out.detach(), torch.autograd.grad(out.sum(), leaf)[0]

    return run


def _no_stop(case: TransportCase, backward: bool) -> str | None:
    return "it has no stop by tolerance (0.3.1): NotImplementedError" if case.tol else None


def _slow_to_compile(case: TransportCase, backward: bool) -> str | None:
    if backward and case != MAIN:
        return "compiling forward and backward takes some 10 s a shape; measured at the first shape"
    return None


def _missing(module: str, package: str) -> str | None:
    return None if find_spec(module) else f"{package} is not installed"


def _isa_missing(isa: str) -> str | None:
    info = native_info()
    if not info["available"]:
        return str(info["reason"])
    # From narrow to wide; the widest this processor runs is `simd`.
    order = ("portable", "avx2", "avx512")
    if isa not in info["simd_compiled"] or order.index(isa) > order.index(info["simd"]):
        return f"no {isa} code for this processor"
    return None


def no_compiler() -> str | None:
    if DEVICE == "cpu" and not any(map(shutil.which, ("g++", "clang++", "c++"))):
        return "no C++ compiler for torch.compile"
    return None


@cache
def _jax() -> Any:
    """jax with a thread pool of one where torch has one: it is sized and pinned when the client is made."""
    cpus = os.sched_getaffinity(0)
    if torch.get_num_threads() == 1:
        os.sched_setaffinity(0, {min(cpus)})
    try:
        import jax

        jax.devices()
    finally:
        os.sched_setaffinity(0, cpus)
    return jax


PEERS = {
    "native": Peer(partial(ours, backend="native"), lambda: available()["native"]),
    "native, all threads": Peer(partial(ours, backend="native"), lambda: available()["native"]),
    "native, AVX2": Peer(
        partial(native_of, isa="avx2"), lambda: _isa_missing("avx2"), cases=(MAIN,), backward=()
    ),
    "native, portable": Peer(
        partial(native_of, isa="portable"), lambda: _isa_missing("portable"), cases=(MAIN,), backward=()
    ),
    "triton": Peer(partial(ours, backend="triton"), lambda: available()["triton"]),
    "reference": Peer(partial(ours, backend="reference"), cases=(MAIN,), backward=(MAIN,)),
    "torch loop": Peer(partial(looped, loop=torch_loop, unrolled=True), grad="unroll"),
    "torch loop, plan detached": Peer(
        partial(looped, loop=torch_loop, unrolled=False), cases=(), backward=(MAIN,)
    ),
    "torch.compile of the loop": Peer(compiled, no_compiler, grad="unroll", unfit=_slow_to_compile),
    "PLOT's kernel-space loop": Peer(partial(looped, loop=plot_loop, unrolled=False)),
    "POT solve_batch, log": Peer(partial(pot, method="log_sinkhorn"), lambda: _missing("ot", "POT")),
    "POT solve_batch, kernel": Peer(partial(pot, method="sinkhorn"), lambda: _missing("ot", "POT")),
    # It lowers eps and averages its iterates: after 50 still 5e-5 off, after 20 ten times that. The gradient
    # of its value is twice the plan (0.3.1).
    "GeomLoss solve_batch": Peer(
        geomloss,
        lambda: _missing("geomloss", "geomloss"),
        score="value",
        grad="double",
        atol=2e-4,
        grad_rtol=2e-2,
        short_factor=5,
        unfit=_no_stop,
    ),
    # It starts with the other side: after 20 iterations 2e-5 apart.
    "OTT-JAX vmap": Peer(ott, lambda: _missing("ott", "OTT-JAX"), atol=1e-4),
}


def rows(backward: bool) -> list[tuple[TransportCase, str]]:
    """Which peer has a row for which case."""
    return [
        (case, who)
        for case in TRANSPORT
        for who, peer in PEERS.items()
        if case in (peer.backward if backward else peer.cases)
    ]


# POT's kernel-space method divides where a weight is 0, and warns.
warnings.filterwarnings("ignore", module="ot")
