"""Modules over the transport and patch functions: they hold options, not parameters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

from torch import Tensor, nn

from spa_fast import _checks as checks
from spa_fast import patches as _patches
from spa_fast import transport
from spa_fast._aliases import accept_aliases

__all__ = ["PatchAligner", "SinkhornAlign"]


class SinkhornAlign(nn.Module):
    """Score images against classes by entropic transport between patches and semantic tokens.

    score_{b,c} = <P, S>, S_ij = cos(p_bi, s_cj), P = argmin_P <P, 1 - S> + eps KL(P | a b^T).

    Args:
        eps, max_iter, tol, score, grad, solver, normalize, return_plan, backend, nonfinite: as in
            `spa_fast.sinkhorn_align`, with its aliases (reg, numItermax, thresh, ...).
        pairwise: False aligns image i with tokens i only; `SinkhornAlign.paired(...)` is the same.

    Example:
        align = SinkhornAlign(eps=0.1)
        scores = align(patches, tokens)  # [B, K, D], [C, M, D] -> [B, C]

    Notes:
        Without parameters and buffers. Not sensitive to train() and eval().
    """

    @accept_aliases
    def __init__(
        self,
        eps: float = 0.1,
        max_iter: int = 100,
        tol: float = 1e-3,
        *,
        score: transport.Score = "transport",
        grad: transport.Grad = "envelope",
        solver: transport.Plan = "sinkhorn",
        normalize: bool = True,
        return_plan: bool = False,
        pairwise: bool = True,
        backend: str = "auto",
        nonfinite: Literal["raise", "propagate", "zero"] = "raise",
        **aliases: float,
    ) -> None:
        super().__init__()
        transport.check_options(eps, max_iter, tol, score, grad, solver, backend, nonfinite)
        self.eps = eps
        self.max_iter = max_iter
        self.tol = tol
        self.score = score
        self.grad = grad
        self.solver = solver
        self.normalize = normalize
        self.return_plan = return_plan
        self.pairwise = pairwise
        self.backend = backend
        self.nonfinite = nonfinite

    @classmethod
    def paired(cls, *args: Any, **kwargs: Any) -> SinkhornAlign:
        """SinkhornAlign(..., pairwise=False): patches [B, K, D] and tokens [B, M, D] give scores [B]."""
        return cls(*args, pairwise=False, **kwargs)

    def forward(
        self,
        patches: Tensor,
        tokens: Tensor,
        a: Tensor | None = None,
        b: Tensor | None = None,
        *,
        patch_mask: Tensor | None = None,
        token_mask: Tensor | None = None,
        cu_tokens: Tensor | Sequence[int] | None = None,
    ) -> Any:
        """Scores [B, C] ([B] where paired) or `SinkhornOutput`; arguments as `spa_fast.sinkhorn_align`."""
        return transport.sinkhorn_align(
            patches,
            tokens,
            a,
            b,
            patch_mask=patch_mask,
            token_mask=token_mask,
            cu_tokens=cu_tokens,
            pairwise=self.pairwise,
            eps=self.eps,
            max_iter=self.max_iter,
            tol=self.tol,
            score=self.score,
            grad=self.grad,
            solver=self.solver,
            normalize=self.normalize,
            return_plan=self.return_plan,
            backend=self.backend,
            nonfinite=self.nonfinite,
        )

    def extra_repr(self) -> str:
        options = ("score", "grad", "solver", "normalize", "return_plan", "pairwise", "backend", "nonfinite")
        numbers = f"eps={self.eps}, max_iter={self.max_iter}, tol={self.tol}"
        return ", ".join([numbers, *(f"{name}={getattr(self, name)!r}" for name in options)])


class PatchAligner(nn.Module):
    """Select the k patches that agree best with each class, align them, score: `spa_fast.spa_scores` as a
    module.

    Args:
        k: patches kept per image and class.
        eps, max_iter, tol, reduce, score, grad, solver, class_conditional, return_details, backend: as in
            `spa_fast.spa_scores`, with the aliases of `spa_fast.sinkhorn` (reg, numItermax, thresh, ...).

    Example:
        align = PatchAligner(k=16)
        scores = align(patches, tokens)  # [B, N, D], [C, M, D] -> [B, C]

    Notes:
        Without parameters and buffers. Not sensitive to train() and eval().
    """

    @accept_aliases
    def __init__(
        self,
        k: int,
        eps: float = 0.1,
        max_iter: int = 100,
        tol: float = 1e-3,
        *,
        reduce: _patches.Reduce = "max",
        score: transport.Score = "transport",
        grad: transport.Grad = "envelope",
        solver: transport.Plan = "sinkhorn",
        class_conditional: bool = True,
        return_details: bool = False,
        backend: str = "auto",
        **aliases: float,
    ) -> None:
        super().__init__()
        transport.check_options(eps, max_iter, tol, score, grad, solver, backend)
        checks.check_k(k)
        checks.check_choice("reduce", reduce, get_args(_patches.Reduce))
        self.k = k
        self.eps = eps
        self.max_iter = max_iter
        self.tol = tol
        self.reduce = reduce
        self.score = score
        self.grad = grad
        self.solver = solver
        self.class_conditional = class_conditional
        self.return_details = return_details
        self.backend = backend

    def forward(
        self,
        patches: Tensor,
        tokens: Tensor,
        *,
        patch_mask: Tensor | None = None,
        token_mask: Tensor | None = None,
        cu_tokens: Tensor | Sequence[int] | None = None,
        select_patches: Tensor | None = None,
        select_tokens: Tensor | None = None,
    ) -> Any:
        """Scores [B, C] of patches [B, N, D] and tokens [C, M, D], or `PatchScores`; arguments as
        `spa_fast.spa_scores`.
        """
        return _patches.spa_scores(
            patches,
            tokens,
            self.k,
            self.eps,
            max_iter=self.max_iter,
            tol=self.tol,
            reduce=self.reduce,
            score=self.score,
            grad=self.grad,
            solver=self.solver,
            class_conditional=self.class_conditional,
            patch_mask=patch_mask,
            token_mask=token_mask,
            cu_tokens=cu_tokens,
            select_patches=select_patches,
            select_tokens=select_tokens,
            return_details=self.return_details,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        options = ("reduce", "score", "grad", "solver", "class_conditional", "return_details", "backend")
        numbers = f"k={self.k}, eps={self.eps}, max_iter={self.max_iter}, tol={self.tol}"
        return ", ".join([numbers, *(f"{name}={getattr(self, name)!r}" for name in options)])
