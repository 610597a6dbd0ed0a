"""Patches scored by semantic tokens: selection, alignment of the selected ones, and both in one call."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from spa_fast import _backends
from spa_fast import _checks as checks
from spa_fast import _features as features
from spa_fast._ops import patches as _ops
from spa_fast._ops.selected import selected_sim
from spa_fast.reference.patches import SOFTMAX_TEMPERATURE
from spa_fast.transport import Grad, Plan, Score, SinkhornOutput, align_similarity, check_options

__all__ = ["SOFTMAX_TEMPERATURE", "PatchScores", "align_selected", "spa_scores", "topk_patches"]

Reduce = Literal["max", "mean", "softmax"]

# Where no gradient is wanted, at once: numbers that go with the pairs (4 MiB in fp32, with a few copies), and
# features of the tokens, which are copied at norm 1 (4 MiB).
_CHUNK = 1 << 20
_TOKEN_CHUNK = 1 << 20


class _Inputs(NamedTuple):
    """Tensors in the order in which the operator takes them; by `select_*`, where given, patches are kept."""

    patches: Tensor
    tokens: Tensor
    select_patches: Tensor | None = None
    select_tokens: Tensor | None = None
    patch_mask: Tensor | None = None
    token_mask: Tensor | None = None
    select_token_mask: Tensor | None = None


class _Options(NamedTuple):
    eps: float
    max_iter: int
    tol: float
    score: Score
    grad: Grad
    solver: Plan
    backend: str


@dataclass(frozen=True, eq=False)
class PatchScores:
    """What `spa_scores` found; only `scores` carries a gradient.

    Attributes:
        scores: [B, C].
        indices: int64 [B, C, k], the kept patches, best first.
        n_iter: int32 [B, C], Sinkhorn iterations done (0 for the other solvers).
    """

    scores: Tensor
    indices: Tensor
    n_iter: Tensor
    _inputs: _Inputs = field(repr=False)
    _options: _Options = field(repr=False)

    @torch.no_grad()
    def plan_for(self, i: int, c: int) -> SinkhornOutput:
        """The plan [k, M] of image i and class c, solved again, with its potentials and errors.

        Rows follow `indices[i, c]`. A masked patch or token has plan 0. It reads the features given to
        `spa_scores`, which must not have been written to since.

        Raises:
            TypeError: i or c not an integer.
            ValueError: i or c out of range.
        """
        for name, index, size in (("i", i, len(self.scores)), ("c", c, self.scores.shape[1])):
            try:
                operator.index(index)
            except TypeError:
                raise TypeError(f"{name}: expected an integer, got {type(index).__name__}") from None
            if not 0 <= index < size:
                raise ValueError(f"{name}: expected 0 <= {name} < {size}, got {index}")
        image, label = slice(i, i + 1), slice(c, c + 1)
        pair = _part(self._inputs, image, label)
        out: SinkhornOutput = _align(pair, self.indices[image, label], None, self._options, return_plan=True)
        return SinkhornOutput(*(x[0, 0] for x in out))


def topk_patches(
    patches: Tensor,
    tokens: Tensor,
    k: int,
    *,
    reduce: Reduce = "max",
    class_conditional: bool = True,
    patch_mask: Tensor | None = None,
    token_mask: Tensor | None = None,
    cu_tokens: Tensor | Sequence[int] | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The k patches of each image that agree best with each class's semantic tokens.

    r_{b,c,n} = reduce_j cos(p_bn, s_cj); kept are the k largest over n, equal values by lowest index.

    Args:
        patches: [B, N, D], fp16, bf16, fp32 or fp64; accumulated in fp32 (fp64 for fp64).
        tokens: [C, M, D], M >= 1, or [sum M, D] with `cu_tokens`; the patches' dtype and device.
        k: patches kept, 1 <= k <= N.
        reduce: "max", "mean", or "softmax": sum_j softmax_j(cos_j / T) cos_j with T = SOFTMAX_TEMPERATURE.
        class_conditional: False selects once per image, by max_c r over the classes that have tokens: the
            same indices for every class; the scores remain each class's own r.
        patch_mask: bool [B, N], True takes part. Masked patches come after all others, in order of index,
            with score 0.
        token_mask: bool [C, M] ([sum M] with `cu_tokens`), True takes part.
        cu_tokens: offsets [C + 1], rising from 0 to sum M: class c owns tokens cu_tokens[c] to cu_tokens[c +
            1]. A tensor is read on the host; inside torch.compile pass a tuple.
        backend: "auto", "triton", "native" or "reference"; see `spa_fast._backends.resolve_patches`.

    Returns:
        scores [B, C, k] in the accumulate dtype and indices int64 [B, C, k]. A class without tokens keeps the
        first k unmasked patches with score 0.

    Raises:
        ValueError: k outside 1..N, M = 0, shapes or devices that do not fit, NaN or Inf in an unmasked patch
            or token (values are looked at on a CPU, outside of torch.compile).
        TypeError: a dtype outside the list, or mixed dtypes.
        RuntimeError: a named backend that is not usable here.

    Notes:
        The gradient flows through the scores at fixed indices; for "max" to the first of equal tokens. A
        vector of norm 0 has cosine 0 and gradient 0. Deterministic. Similarities of all N patches exist for a
        block of images and classes at a time: beside a copy of the tokens, extra memory does not grow with
        B C N M. Equal patches are equal to "native" and "triton"; PyTorch's product, which "reference" uses,
        may round their cosines differently. Ragged classes of very different lengths go in groups of similar
        ones on a CPU, else padded to the longest. The backward runs the reference formulas on every backend.
        No second derivative.
    """
    if class_conditional and (groups := features.by_length(tokens, token_mask, cu_tokens)):
        parts = [
            topk_patches(
                patches,
                tokens[group.rows],
                k,
                reduce=reduce,
                patch_mask=patch_mask,
                token_mask=_rows(token_mask, group.rows),
                cu_tokens=group.offsets,
                backend=backend,
            )
            for group in groups
        ]
        scores, indices = (features.in_order(groups, part) for part in zip(*parts, strict=True))
        return scores, indices
    if cu_tokens is not None:
        tokens, _, token_mask = features.pad_ragged(tokens, None, token_mask, cu_tokens)
    _check(patches, tokens, k, reduce, patch_mask, token_mask)
    patches, tokens = _same_dtype(patches, tokens)
    backend = _backends.resolve_patches(backend, (patches, tokens))
    scores, indices, _ = _ops.topk_patches(
        patches, tokens, patch_mask, token_mask, k, reduce, class_conditional, backend
    )
    return scores, indices


def spa_scores(
    patches: Tensor,
    tokens: Tensor,
    k: int,
    eps: float = 0.1,
    *,
    max_iter: int = 100,
    tol: float = 1e-3,
    reduce: Reduce = "max",
    score: Score = "transport",
    grad: Grad = "envelope",
    solver: Plan = "sinkhorn",
    class_conditional: bool = True,
    patch_mask: Tensor | None = None,
    token_mask: Tensor | None = None,
    cu_tokens: Tensor | Sequence[int] | None = None,
    select_patches: Tensor | None = None,
    select_tokens: Tensor | None = None,
    return_details: bool = False,
    backend: str = "auto",
) -> Any:
    """Score every class for every image: keep k patches and align them with the class's tokens by transport.

    score_{b,c} = <P, S>, S the cosines of the kept patches to the tokens, P the plan of cost 1 - S with
    uniform marginals over the unmasked.

    Args:
        patches, tokens: [B, N, D], [C, M, D], the features that are aligned.
        k: patches kept per image and class, 1 <= k <= N.
        eps: regularisation > 0 in units of cost (cosine distance, 0 to 2).
        max_iter, tol, grad: as in `sinkhorn`.
        score, solver: as in `align_similarity`.
        reduce, class_conditional, patch_mask, token_mask, cu_tokens: as in `topk_patches`. A masked patch
            that had to be kept has weight 0; without any patch or token left the score is 0.
        select_patches, select_tokens: [B, N, D'], [C, M', D'] ([sum M, D'] with `cu_tokens`), both or
            neither: features to select by instead, say frozen ones where the others are projected.
            `token_mask` holds for them if M' = M.
        return_details: return `PatchScores`, which also gives the plan of a chosen pair.
        backend: as in `topk_patches`, for selection and transport.

    Returns:
        [B, C] in the accumulate dtype, or `PatchScores`.

    Raises:
        TypeError, ValueError, RuntimeError: as `topk_patches` and `sinkhorn`.

    Source:
        "Unlocking Patch-Level Features for CLIP-Based Class-Incremental Learning", arXiv 2605.13835, rebuilt
        from its abstract.

    Notes:
        The selection carries no gradient. "envelope" (and "implicit" for the value) run compiled code where
        the backend has it; the other gradients and the solvers without iteration run reference formulas.
        Deterministic; no second derivative. Neither all similarities nor the kept features of all pairs exist
        at once. Between forward and backward O(B C (k + M)) memory. Without gradient and with
        class_conditional, pairs go through in chunks: at most 64 MB beside the result, whatever B and C.
    """
    named = {"tokens": tokens, "select_patches": select_patches, "select_tokens": select_tokens}
    for name, x in named.items():
        if x is not None:
            checks.check_float(name, x)
    if select_tokens is not None and cu_tokens is not None:
        checks.check_shape("select_tokens", select_tokens, "[sum M, D']", (tokens.shape[0], None))
    grouped = class_conditional and not return_details
    if grouped and (groups := features.by_length(tokens, token_mask, cu_tokens)):
        parts = [
            spa_scores(
                patches,
                tokens[group.rows],
                k,
                eps,
                max_iter=max_iter,
                tol=tol,
                reduce=reduce,
                score=score,
                grad=grad,
                solver=solver,
                patch_mask=patch_mask,
                token_mask=_rows(token_mask, group.rows),
                cu_tokens=group.offsets,
                select_patches=select_patches,
                select_tokens=_rows(select_tokens, group.rows),
                backend=backend,
            )
            for group in groups
        ]
        return features.in_order(groups, parts)
    if select_tokens is not None and cu_tokens is not None:
        select_tokens = features.pad_ragged(select_tokens, None, None, cu_tokens)[0]
    if cu_tokens is not None:
        tokens, _, token_mask = features.pad_ragged(tokens, None, token_mask, cu_tokens)
    _check(patches, tokens, k, reduce, patch_mask, token_mask)
    check_options(eps, max_iter, tol, score, grad, solver, backend)
    patches, tokens = _same_dtype(patches, tokens)
    inputs = _Inputs(patches, tokens, None, None, patch_mask, token_mask, token_mask)
    inputs = _select_by(select_patches, select_tokens, inputs, k, reduce)
    given = [x for x in inputs[:4] if x is not None]
    backend = _backends.resolve_patches(backend, given, k if solver == "sinkhorn" else None)
    options = _Options(float(eps), max_iter, float(tol), score, grad, solver, backend)

    def fused(images: slice, classes: slice) -> tuple[Tensor, ...]:
        transport = options.eps, max_iter, options.tol
        rest = reduce, class_conditional, score == "value", grad, backend
        out, indices, _f, _g, n_iter = _ops.spa_scores(*_part(inputs, images, classes), k, *transport, *rest)
        return out, indices, n_iter

    def in_two_steps(images: slice, classes: slice) -> tuple[Tensor, ...]:
        x = _part(inputs, images, classes)
        by_patches = x.patches.detach() if x.select_patches is None else x.select_patches
        by_tokens = x.tokens.detach() if x.select_tokens is None else x.select_tokens
        _, indices, _ = _ops.topk_patches(
            by_patches, by_tokens, x.patch_mask, x.select_token_mask, k, reduce, class_conditional, backend
        )
        out = _align(x, indices, None, options)
        return out, indices, indices.new_zeros(out.shape, dtype=torch.int32)

    iterates = solver == "sinkhorn"
    results = _in_chunks(
        fused if iterates else in_two_steps,
        inputs,
        3 * k + tokens.shape[1] + 2 if iterates else k * tokens.shape[1],
        class_conditional,
        3 if return_details else 1,
    )
    if not return_details:
        return results[0]
    scores, indices, n_iter = results
    aligned = _Inputs(patches, tokens, patch_mask=patch_mask, token_mask=token_mask)
    return PatchScores(scores, indices, n_iter, aligned, options)


def align_selected(
    patches: Tensor,
    tokens: Tensor,
    indices: Tensor,
    *,
    eps: float = 0.1,
    max_iter: int = 100,
    tol: float = 1e-3,
    score: Score = "transport",
    grad: Grad = "envelope",
    solver: Plan = "sinkhorn",
    weights: Tensor | None = None,
    patch_mask: Tensor | None = None,
    token_mask: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """The second half of `spa_scores`: align the patches `indices` int64 [B, C, K] with each class's tokens.

    Args:
        weights: of the kept patches, [K], [B, 1, K] or [B, C, K], >= 0 and constant; default uniform over the
            unmasked. Normalised per image and class.
        backend: of the transport, as in `sinkhorn`; the similarities are plain PyTorch.
        others: as in `spa_scores`.

    Returns:
        [B, C] in the accumulate dtype.
    """
    B, C = patches.shape[0], tokens.shape[0]
    if indices.dtype != torch.int64:
        raise TypeError(f"indices: expected int64, got {indices.dtype}")
    checks.check_shape("indices", indices, f"[{B}, {C}, K]", (B, C, None))
    _check(patches, tokens, indices.shape[2], "max", patch_mask, token_mask)
    checks.check_like("indices", indices, "patches", patches, dtype=False)
    if checks.values_checkable(indices) and indices.numel():
        low, high = int(indices.min()), int(indices.max())
        if low < 0 or high >= patches.shape[1]:
            raise ValueError(f"indices: expected 0 <= index < N = {patches.shape[1]}, got {low} to {high}")
    inputs = _Inputs(patches, tokens, patch_mask=patch_mask, token_mask=token_mask)
    options = _Options(eps, max_iter, tol, score, grad, solver, backend)

    def align(images: slice, classes: slice) -> tuple[Tensor]:
        a = weights
        if a is not None and a.dim() == 3:
            a = a[images] if a.shape[1] == 1 else a[images, classes]
        return (_align(_part(inputs, images, classes), indices[images, classes], a, options),)

    return _in_chunks(align, inputs, indices.shape[2] * tokens.shape[1], True, 1)[0]


def _select_by(
    patches: Tensor | None, tokens: Tensor | None, inputs: _Inputs, k: int, reduce: str
) -> _Inputs:
    """`inputs` with features to select by, if given; `token_mask` holds for them where M is the same."""
    if patches is None and tokens is None:
        return inputs
    if patches is None or tokens is None:
        raise ValueError("select_patches, select_tokens: expected both or neither")
    (B, N, _), (C, M, _) = inputs.patches.shape, inputs.tokens.shape
    checks.check_shape("select_patches", patches, f"[{B}, {N}, D']", (B, N, None))
    checks.check_shape("select_tokens", tokens, f"[{C}, M', D']", (C, None, None))
    checks.check_like("select_patches", patches, "patches", inputs.patches, dtype=False)
    mask = inputs.token_mask if tokens.shape[1] == M else None
    _check(patches, tokens, k, reduce, inputs.patch_mask, mask, "select_")
    patches, tokens = _same_dtype(patches.detach(), tokens.detach())
    return inputs._replace(select_patches=patches, select_tokens=tokens, select_token_mask=mask)


def _align(
    x: _Inputs, indices: Tensor, weights: Tensor | None, options: _Options, return_plan: bool = False
) -> Any:
    sim = selected_sim(x.patches, x.tokens, indices, x.patch_mask, x.token_mask)
    if x.patch_mask is not None:
        kept = x.patch_mask[:, None].expand(-1, indices.shape[1], -1).gather(2, indices).to(sim.dtype)
        weights = kept if weights is None else weights * kept
    token_weights = None if x.token_mask is None else x.token_mask.to(sim.dtype)
    return align_similarity(sim, weights, token_weights, return_plan=return_plan, **options._asdict())


def _in_chunks(
    run: Callable[[slice, slice], tuple[Tensor, ...]],
    inputs: _Inputs,
    pair: int,
    split_classes: bool,
    n_results: int,
) -> tuple[Tensor, ...]:
    """The first results of `run` over all images and classes.

    At once where a gradient is wanted or a graph is traced; else in chunks of about _CHUNK numbers, at `pair`
    numbers a pair.
    """
    B, C = inputs.patches.shape[0], inputs.tokens.shape[0]
    wanted = torch.is_grad_enabled() and (inputs.patches.requires_grad or inputs.tokens.requires_grad)
    classes = max(C, 1)
    if split_classes:
        sets = [x for x in (inputs.tokens, inputs.select_tokens) if x is not None]
        widest = max(x.shape[1] * x.shape[2] for x in sets)
        classes = min(classes, max(1, _TOKEN_CHUNK // max(widest, 1)), max(1, _CHUNK // pair))
    images = max(1, _CHUNK // (pair * classes))
    if torch.compiler.is_compiling() or wanted or (images >= B and classes >= C):
        return run(slice(None), slice(None))[:n_results]
    results: tuple[Tensor, ...] = ()
    for b in range(0, B, images):
        for c in range(0, C, classes):
            here = slice(b, min(b + images, B)), slice(c, min(c + classes, C))
            parts = run(*here)[:n_results]
            results = results or tuple(x.new_empty(B, C, *x.shape[2:]) for x in parts)
            for whole, part in zip(results, parts, strict=True):
                whole[here] = part
    return results


def _part(x: _Inputs, images: slice, classes: slice) -> _Inputs:
    return _Inputs(
        x.patches[images],
        x.tokens[classes],
        _rows(x.select_patches, images),
        _rows(x.select_tokens, classes),
        _rows(x.patch_mask, images),
        _rows(x.token_mask, classes),
        _rows(x.select_token_mask, classes),
    )


def _rows(x: Tensor | None, rows: slice | Tensor) -> Tensor | None:
    return None if x is None else x[rows]


def _same_dtype(patches: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Under autocast the two may differ: both in the accumulate dtype then."""
    if patches.dtype == tokens.dtype:
        return patches, tokens
    acc = checks.accumulate_dtype(patches)
    return patches.to(acc), tokens.to(acc)


def _check(
    patches: Tensor,
    tokens: Tensor,
    k: int,
    reduce: str,
    patch_mask: Tensor | None,
    token_mask: Tensor | None,
    prefix: str = "",
) -> None:
    for name, x, sizes in (("patches", patches, "[B, N, D]"), ("tokens", tokens, "[C, M, D]")):
        (checks.check_input if name == "patches" else checks.check_float)(prefix + name, x)
        checks.check_reverse(prefix + name, x)
        checks.check_shape(prefix + name, x, sizes, (None, None, None))
    B, N, D = patches.shape
    C, M, _ = tokens.shape
    checks.check_like(f"{prefix}tokens", tokens, f"{prefix}patches", patches)
    sizes = f"[C, M, {D}] with the width of {prefix}patches"
    checks.check_shape(f"{prefix}tokens", tokens, sizes, (None, None, D))
    if M == 0:
        raise ValueError(f"{prefix}tokens: expected M >= 1 tokens per class, got {list(tokens.shape)}")
    checks.check_k(k, N)
    checks.check_choice("reduce", reduce, get_args(Reduce))
    if patch_mask is not None:
        checks.check_mask("patch_mask", patch_mask, f"[{B}, {N}]", (B, N), patches)
    if token_mask is not None:
        checks.check_mask("token_mask", token_mask, f"[{C}, {M}]", (C, M), tokens)
    checks.check_finite(f"{prefix}patches", patches, ("image", "patch"), patch_mask)
    checks.check_finite(f"{prefix}tokens", tokens, ("class", "token"), token_mask)
