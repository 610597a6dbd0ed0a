"""Fronts shaped like POT's `ot.sinkhorn` and `ot.sinkhorn2`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from spa_fast import _checks as checks
from spa_fast import _features as features
from spa_fast import transport


def ot_sinkhorn(
    a: Any,
    b: Any,
    M: Any,
    reg: float,
    method: str = "sinkhorn",
    numItermax: int = 1000,
    stopThr: float = 1e-9,
    verbose: bool = False,
    log: bool = False,
    warn: bool = True,
    warmstart: None = None,
    *,
    backend: str = "auto",
) -> Any:
    """The plan argmin_P <P, M> + reg KL(P | a b^T), called like POT's `ot.sinkhorn`.

    Args:
        a, b: weights [K] and [M], or broadcastable to the batch of M; None or empty is uniform. The plan has
            the mass of `a`, to which b is scaled.
        M: cost [K, M], also any batch [..., K, M]. All three are tensors or what torch.tensor reads; unless M
            is a tensor, results are NumPy arrays.
        reg: regularisation > 0 in units of cost. POT's entropy and this KL have the same plan.
        method: "sinkhorn", "sinkhorn_log" or "sinkhorn_stabilized", which are one and the same here.
        numItermax: iterations at most.
        stopThr: each problem stops once the L1 error of its row sums (of mass 1) is <= stopThr. POT looks at
            every tenth iteration, at the L2 error of the columns. fp32 does not reach much below 1e-6: there
            a smaller stopThr runs numItermax iterations.
        log: return (plan, log), log holding niter, err, converged, log_u and log_v per problem with P =
            exp(log_u + log_v - M / reg).
        verbose, warn: without effect: looking at values would synchronise; read `converged`.
        warmstart: None; iterations start at potentials 0.

    Returns:
        P [..., K, M] in the accumulate dtype, a constant: gradients flow through `ot_sinkhorn2` only.
    """
    a, b, cost, as_numpy = _arguments(a, b, M, reg, method, numItermax, stopThr, warmstart)
    out = transport.sinkhorn(
        cost.detach(), a, b, eps=reg, max_iter=numItermax, tol=stopThr, return_plan=True, backend=backend
    )
    plan = out.plan if a is None else out.plan * a.to(out.plan.dtype).sum(-1)[..., None, None]
    return _results(plan, _log(out, a, b, reg) if log else None, as_numpy)


def ot_sinkhorn2(
    a: Any,
    b: Any,
    M: Any,
    reg: float,
    method: str = "sinkhorn",
    numItermax: int = 1000,
    stopThr: float = 1e-9,
    verbose: bool = False,
    log: bool = False,
    warn: bool = False,
    warmstart: None = None,
    *,
    grad: transport.Grad = "implicit",
    backend: str = "auto",
) -> Any:
    """<P, M> of the plan of `ot_sinkhorn`, called like POT's `ot.sinkhorn2`.

    Args:
        grad: "implicit" is exact at convergence, as POT's own gradient through all of its iterations is;
            "unroll" is exact for the iterate, "envelope" holds the plan fixed. Weights get no gradient.
        log: return (score, log), log as of `ot_sinkhorn`.
        others: as `ot_sinkhorn`.

    Returns:
        [...] in the accumulate dtype.
    """
    a, b, cost, as_numpy = _arguments(a, b, M, reg, method, numItermax, stopThr, warmstart)
    out = transport.sinkhorn(
        cost,
        a,
        b,
        eps=reg,
        max_iter=numItermax,
        tol=stopThr,
        grad=grad,
        return_plan=log,
        backend=backend,
    )
    score = out.score if log else out
    if a is not None:
        score = score * a.to(score.dtype).sum(-1)
    return _results(score, _log(out, a, b, reg) if log else None, as_numpy)


def _arguments(
    a: Any, b: Any, M: Any, reg: float, method: str, numItermax: int, stopThr: float, warmstart: Any
) -> tuple[Tensor | None, Tensor | None, Tensor, bool]:
    """a, b and M as tensors, and whether results are to be NumPy arrays."""
    checks.check_choice("method", method, ("sinkhorn", "sinkhorn_log", "sinkhorn_stabilized"))
    checks.check_eps(reg, "reg")
    checks.check_max_iter(numItermax, "numItermax")
    checks.check_tol(stopThr, "stopThr")
    if warmstart is not None:
        kind = type(warmstart).__name__
        raise ValueError(f"warmstart: expected None (iterations start at potentials 0), got {kind}")
    cost = _as_tensor("M", M)
    checks.check_input("M", cost)
    return _weights_of("a", a, cost), _weights_of("b", b, cost), cost, not isinstance(M, Tensor)


def _log(out: transport.SinkhornOutput, a: Tensor | None, b: Tensor | None, reg: float) -> dict[str, Tensor]:
    mass = out.f.new_ones(()) if a is None else a.to(out.f.dtype).sum(-1)
    rows, cols = (
        f.new_full(f.shape[-1:], 1 / f.shape[-1]) if w is None else features.normalize_weights(w.to(f.dtype))
        for w, f in ((a, out.f), (b, out.g))
    )
    return {
        "niter": out.n_iter,
        "err": out.marginal_error,
        "converged": out.converged,
        "log_u": (rows * mass[..., None]).log() + out.f / reg,
        "log_v": cols.log() + out.g / reg,
    }


def _results(result: Any, log: dict[str, Any] | None, as_numpy: bool) -> Any:
    if as_numpy:
        # [()] turns an array without dimensions into a number.
        result = result.numpy()[()]
        log = None if log is None else {name: x.numpy()[()] for name, x in log.items()}
    return result if log is None else (result, log)


def _as_tensor(name: str, x: Any) -> Tensor:
    if isinstance(x, Tensor):
        return x
    try:
        return torch.tensor(x)
    except (TypeError, ValueError, RuntimeError) as error:
        kind = type(x).__name__
        raise TypeError(f"{name}: expected a tensor, an array or numbers, got {kind} ({error})") from error


def _weights_of(name: str, weights: Any, cost: Tensor) -> Tensor | None:
    """POT's weights: an empty list means uniform."""
    if weights is None or isinstance(weights, Tensor):
        return None if weights is None or weights.numel() == 0 else weights
    weights = _as_tensor(name, weights)
    if weights.is_complex():
        raise TypeError(f"{name}: expected real weights, got {weights.dtype}")
    return weights.to(cost.device, checks.accumulate_dtype(cost)) if weights.numel() else None
