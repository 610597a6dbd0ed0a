"""Entropic optimal transport over many small problems: of a ready cost, and between patches and tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from spa_fast import _backends
from spa_fast import _checks as checks
from spa_fast import _features as features
from spa_fast._aliases import accept_aliases
from spa_fast._ops import sinkhorn as _ops
from spa_fast.reference.ablations import closed_form_plan

__all__ = ["SinkhornOutput", "align_similarity", "sinkhorn", "sinkhorn_align"]

Score = Literal["transport", "value"]
Grad = Literal["envelope", "implicit", "unroll"]
Plan = Literal["sinkhorn", "uniform", "double_softmax", "max_mean"]

SCORES, GRADS, SOLVERS = get_args(Score), get_args(Grad), get_args(Plan)

# Tolerance that `converged` is judged by where tol = 0 fixes the number of iterations.
_FIXED_TOL = 1e-3

# Similarities held at once: 64 MiB in fp32.
_CHUNK = 1 << 24


class SinkhornOutput(NamedTuple):
    """What a solver found; `...` is the batch shape of the cost. Only `score` carries a gradient."""

    score: Tensor
    """[...]"""
    plan: Tensor
    """[..., K, M], P_ij = a_i b_j exp((f_i + g_j - C_ij) / eps)"""
    f: Tensor
    """[..., K], in units of cost"""
    g: Tensor
    """[..., M]"""
    n_iter: Tensor
    """int32 [...], iterations done"""
    marginal_error: Tensor
    """[...], sum_i |sum_j P_ij - a_i| of the plan returned"""
    converged: Tensor
    """bool [...], marginal_error <= tol, or <= 1e-3 where tol = 0"""


@accept_aliases
def sinkhorn(
    cost: Tensor,
    a: Tensor | None = None,
    b: Tensor | None = None,
    *,
    eps: float = 0.1,
    max_iter: int = 100,
    tol: float = 1e-3,
    score: Score = "transport",
    grad: Grad = "envelope",
    return_plan: bool = False,
    backend: str = "auto",
    **aliases: float,
) -> Any:
    """Solve every K x M entropic transport problem of a batch.

    P = argmin_P <P, C> + eps KL(P | a b^T) over plans with row sums a and column sums b.

    Args:
        cost: [..., K, M], fp16, bf16, fp32 or fp64; K, M >= 1. Accumulated in fp32 (fp64 for fp64). +inf
            forbids a pair; NaN makes its own problem's outputs NaN.
        a, b: weights, [K] or broadcastable to [..., K], and [M] or [..., M]; >= 0, any floating dtype,
            normalised to sum 1 in the accumulate dtype. Default uniform. A zero takes its row or column out,
            whatever its cost; a problem of zeros only scores 0. They are constants: no gradient flows to
            them.
        eps: regularisation > 0 in units of cost. Also reg, epsilon; blur gives eps = blur**2.
        max_iter: iterations at most, >= 1. Also numItermax, iters, max_iterations.
        tol: each problem stops by itself once the L1 error of its row sums is <= tol; 0 means exactly
            max_iter iterations. Also stopThr, thresh.
        score: "transport" is <P, C>; "value" is <P, C> + eps KL(P | a b^T), KL = sum P log(P / (a b^T)) - P +
            a b^T. Neither is <P, C> - eps H(P).
        grad: "envelope" is d cost = g P: exact for the value at convergence; for <P, C> it holds the plan
            fixed. "implicit" is exact at the fixed point, "unroll" for the iterate returned.
        return_plan: return a `SinkhornOutput` instead of the score.
        backend: "auto", "triton", "native" or "reference"; see `spa_fast._backends.resolve`.

    Returns:
        [...] in the accumulate dtype, or `SinkhornOutput`. An unconverged problem is flagged, never an error.

    Raises:
        TypeError: a dtype outside the list, an unknown argument, an argument given twice.
        ValueError: a shape, device or range that does not fit; negative or non-finite weights (values are
            looked at on a CPU, outside of torch.compile).
        RuntimeError: a named backend that is not usable here.

    Source:
        Cuturi, "Sinkhorn Distances", NeurIPS 2013, algorithm 1, in the log domain.

    Notes:
        Deterministic, without host synchronisation. O(P K M) work per iteration; between forward and backward
        O(P (K + M)) memory beside the cost. On a CPU "envelope" runs compiled code; "implicit" for <P, C> and
        "unroll" run the reference formulas for every backend. "unroll" alone has a second derivative. No
        forward-mode derivative and none inside torch.func.grad: both raise RuntimeError; vmap works.
    """
    checks.check_input("cost", cost)
    _check_sides("cost", cost)
    check_options(eps, max_iter, tol, score, grad)
    backend = _backends.resolve(backend, cost)
    *batch, K, M = cost.shape
    flat = cost.reshape(-1, K, M).contiguous()
    rows, cols = _weights("a", a, cost, batch, K), _weights("b", b, cost, batch, M)
    return _solve(flat, rows, cols, batch, eps, max_iter, tol, score, grad, return_plan, backend)


def align_similarity(
    sim: Tensor,
    a: Tensor | None = None,
    b: Tensor | None = None,
    *,
    eps: float = 0.1,
    max_iter: int = 100,
    tol: float = 1e-3,
    score: Score = "transport",
    grad: Grad = "envelope",
    solver: Plan = "sinkhorn",
    return_plan: bool = False,
    backend: str = "auto",
) -> Any:
    """<P, S> of similarities S [..., K, M] under the plan P of `solver`, the cost being 1 - S.

    Args:
        score: "transport" is <P, S>, also where P has less than mass 1 (a token that no patch may go to);
            "value" is the regularised transport value of the cost 1 - S, for solver "sinkhorn" only.
        solver:
            "sinkhorn": the entropic plan.
            "uniform": P = a b^T.
            "double_softmax": P = (diag(a) R + L diag(b)) / 2 with R_ij = b_j e^(S_ij / eps) normalised over j
                and L_ij = a_i e^(S_ij / eps) normalised over i. grad="envelope" holds P fixed, else it is
                differentiated.
            "max_mean": P_ij = a_i at the first j that maximises S_ij among b_j > 0: sum_i a_i max_j S_ij.
            The last three have potentials 0 and n_iter 0.
        others: as `sinkhorn`.

    Returns:
        [...] in the accumulate dtype, or `SinkhornOutput`.
    """
    checks.check_input("sim", sim)
    _check_sides("sim", sim)
    check_options(eps, max_iter, tol, score, grad, solver)
    sim = sim.to(checks.accumulate_dtype(sim))
    *batch, K, M = sim.shape
    if solver == "sinkhorn":
        backend = _backends.resolve(backend, sim)
    rows, cols = _weights("a", a, sim, batch, K), _weights("b", b, sim, batch, M)
    if solver == "sinkhorn":
        # All pairs of one GEMM are solved where they lie.
        beside = sim.dim() == 4 and not sim.is_contiguous() and sim.transpose(1, 2).is_contiguous()
        flat = sim.transpose(1, 2) if beside else sim.reshape(-1, K, M).contiguous()
        return _solve(flat, rows, cols, batch, eps, max_iter, tol, score, grad, return_plan, backend, True)
    flat = sim.reshape(-1, K, M)
    flat = flat.masked_fill((rows == 0)[:, :, None] | (cols == 0)[:, None, :], 0.0)
    plan = closed_form_plan(flat, rows, cols, eps, solver)
    if grad == "envelope":
        plan = plan.detach()
    value = (plan * flat).sum((-2, -1)).view(batch)
    if not return_plan:
        return value
    plan = plan.detach()
    error = (plan.sum(-1) - rows).abs().sum(-1)
    return SinkhornOutput(
        value,
        plan.reshape(sim.shape),
        sim.new_zeros(*batch, K),
        sim.new_zeros(*batch, M),
        torch.zeros(batch, dtype=torch.int32, device=sim.device),
        error.view(batch),
        _converged(error, tol).view(batch),
    )


@accept_aliases
def sinkhorn_align(
    patches: Tensor,
    tokens: Tensor,
    a: Tensor | None = None,
    b: Tensor | None = None,
    *,
    patch_mask: Tensor | None = None,
    token_mask: Tensor | None = None,
    cu_tokens: Tensor | Sequence[int] | None = None,
    pairwise: bool = True,
    eps: float = 0.1,
    max_iter: int = 100,
    tol: float = 1e-3,
    score: Score = "transport",
    grad: Grad = "envelope",
    solver: Plan = "sinkhorn",
    normalize: bool = True,
    return_plan: bool = False,
    backend: str = "auto",
    nonfinite: Literal["raise", "propagate", "zero"] = "raise",
    **aliases: float,
) -> Any:
    """Align the patches of every image with the semantic tokens of every class.

    score_{b,c} = <P, S>, S_ij = cos(p_bi, s_cj), P the plan of cost 1 - S between the patches and the tokens.

    Args:
        patches: [B, K, D], fp16, bf16, fp32 or fp64.
        tokens: [C, M, D], or [B, C, M, D] for tokens of each image; [B, M, D] with pairwise=False; [sum M, D]
            with `cu_tokens`. The patches' dtype and device.
        a: weights of the patches, [K], [B, K] or, with pairwise, [B, C, K].
        b: weights of the tokens, [M] or the shape of `tokens` without D ([C, M] also where tokens are [B, C,
            M, D]). Both as in `sinkhorn`; default uniform over the unmasked.
        patch_mask: bool [B, K]; True takes part.
        token_mask: bool of the shape of `tokens` without D ([C, M] also where tokens are [B, C, M, D]).
        cu_tokens: offsets [C + 1], rising from 0 to sum M: class c owns tokens cu_tokens[c] to cu_tokens[c +
            1]. A tensor is read on the host, for which a GPU is waited for; inside torch.compile pass a
            tuple, inside a CUDA graph use `token_mask`.
        pairwise: False aligns image i with tokens i only and returns [B].
        eps: regularisation > 0 in units of cost (cosine distance, 0 to 2).
        max_iter, tol, grad, backend, aliases: as in `sinkhorn`.
        score, solver: as in `align_similarity`.
        normalize: False takes <p_i, s_j> as it is in place of the cosine.
        return_plan: return a `SinkhornOutput`, its plan [B, C, K, M].
        nonfinite: what NaN and Inf in an unmasked patch or token do. "raise": ValueError naming the tensor
            and the first bad image or class; values are looked at on a CPU and outside of torch.compile,
            elsewhere it acts as "propagate": every score they enter is NaN. "zero": that patch or token
            counts as the zero vector.

    Returns:
        [B, C] ([B] with pairwise=False) in fp32 (fp64 for fp64), or `SinkhornOutput`. A fully masked image or
        class scores 0 with gradient 0; B = 0 or C = 0 gives an empty differentiable result.

    Raises:
        TypeError, ValueError, RuntimeError: as `sinkhorn`; ValueError also for a positive weight on a class
            or image that is masked entirely.

    Notes:
        One normalisation and one GEMM serve all images and classes; both run in fp32 (fp64), also under
        autocast. On a CPU with the compiled extension a score of fp16, bf16 or fp32 features depends on its
        own image and class alone, bit for bit, whatever else is in the batch; elsewhere the GEMM may round
        otherwise at another B or C. A vector of norm 0 has cosine 0 and gradient 0. Beyond 2^24 similarities
        images go through in chunks, whose similarities the backward computes again; not with return_plan, nor
        under torch.compile.
    """
    check_options(eps, max_iter, tol, score, grad, solver, backend, nonfinite)
    if cu_tokens is not None:
        tokens, b, token_mask = features.pad_ragged(tokens, b, token_mask, cu_tokens)
    features.check_pair(patches, tokens, pairwise, patch_mask, token_mask)
    B, C = patches.shape[0], tokens.shape[-3]
    lead = (B, C) if pairwise else (B,)
    rows = features.masked_weights("a", a, patch_mask, patches, lead, per_class=pairwise)
    cols = features.masked_weights("b", b, token_mask, tokens, lead)
    p = features.prepare("patches", patches, patch_mask, ("image", "patch"), normalize, nonfinite)
    own_tokens = tokens.dim() == 4 or not pairwise
    places = (*(["image"] if own_tokens else []), *(["class"] if pairwise else []), "token")
    s = features.prepare("tokens", tokens, token_mask, places, normalize, nonfinite)

    def align(images: slice) -> Any:
        return align_similarity(
            features.similarity(p[images], s[images] if own_tokens else s, pairwise),
            features.take(rows, images, len(lead)),
            features.take(cols, images, len(lead)),
            eps=eps,
            max_iter=max_iter,
            tol=tol,
            score=score,
            grad=grad,
            solver=solver,
            return_plan=return_plan,
            backend=backend,
        )

    if return_plan:
        return align(slice(None))
    each = patches.shape[1] * tokens.shape[-2] * (C if pairwise else 1)
    return _in_chunks(align, B, each, torch.is_grad_enabled() and (p.requires_grad or s.requires_grad))


def _in_chunks(align: Callable[[slice], Any], B: int, each: int, wanted: bool) -> Any:
    """Scores of all images, `each` similarities an image; `wanted`: with a gradient."""
    if torch.compiler.is_compiling() or B * each <= _CHUNK:
        return align(slice(None))
    step = max(1, _CHUNK // each)
    chunks = (slice(i, i + step) for i in range(0, B, step))
    if not wanted:
        return torch.cat([align(chunk) for chunk in chunks])
    # The backward computes a chunk's similarities again rather than keep those of all.
    return torch.cat(
        [checkpoint(align, chunk, use_reentrant=False, preserve_rng_state=False) for chunk in chunks]
    )


def check_options(
    eps: float,
    max_iter: int,
    tol: float,
    score: str,
    grad: str,
    solver: str = "sinkhorn",
    backend: str = "auto",
    nonfinite: str = "raise",
) -> None:
    checks.check_eps(eps)
    checks.check_max_iter(max_iter)
    checks.check_tol(tol)
    checks.check_choice("score", score, SCORES)
    checks.check_choice("grad", grad, GRADS)
    checks.check_choice("solver", solver, SOLVERS)
    checks.check_choice("backend", backend, _backends.BACKENDS)
    checks.check_choice("nonfinite", nonfinite, features.NONFINITE)
    if score == "value" and solver != "sinkhorn":
        raise ValueError(f"score: 'value' is defined for solver 'sinkhorn', got solver {solver!r}")


def _check_sides(name: str, x: Tensor) -> None:
    if x.dim() < 2 or 0 in x.shape[-2:]:
        raise ValueError(f"{name}: expected [..., K, M] with K, M >= 1, got {list(x.shape)}")


def _solve(
    cost: Tensor,
    rows: Tensor,
    cols: Tensor,
    batch: Sequence[int],
    eps: float,
    max_iter: int,
    tol: float,
    score: str,
    grad: str,
    return_plan: bool,
    backend: str,
    similarity: bool = False,
) -> Any:
    """The operator on cost [P, K, M] or [B, K, C, M] with weights [P or 1, ...], its outputs in shape."""
    K, M = rows.shape[-1], cols.shape[-1]
    eps, tol = float(eps), float(tol)
    value, f, g, n_iter, error = _ops.sinkhorn_fwd(
        cost, rows, cols, eps, max_iter, tol, score == "value", grad, backend, similarity
    )
    if not return_plan:
        return value.view(batch)
    return SinkhornOutput(
        value.view(batch),
        _ops.sinkhorn_plan(cost.detach(), rows, cols, f, g, eps, similarity).view(*batch, K, M),
        f.view(*batch, K),
        g.view(*batch, M),
        n_iter.view(batch),
        error.view(batch),
        _converged(error, tol).view(batch),
    )


def _converged(error: Tensor, tol: float) -> Tensor:
    return error <= (tol if tol > 0 else _FIXED_TOL)


def _weights(name: str, weights: Tensor | None, cost: Tensor, batch: Sequence[int], n: int) -> Tensor:
    """[P, n], or [1, n] where one row serves all problems; contiguous, normalised."""
    acc = checks.accumulate_dtype(cost)
    if weights is None:
        return torch.full((1, n), 1.0 / n, dtype=acc, device=cost.device)
    checks.check_weights(name, weights, "the cost", cost, (*batch, n))
    weights = features.normalize_weights(weights.to(acc))
    shape = (1, n) if weights.dim() == 1 else (*batch, n)
    return weights.expand(shape).reshape(-1, n).contiguous()
