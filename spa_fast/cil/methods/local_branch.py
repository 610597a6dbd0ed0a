"""The patch branch of SPA: descriptions choose patches, transport aligns them with the descriptions."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spa_fast.cil.config import SpaConfig
from spa_fast.cil.data.features import Rows
from spa_fast.cil.data.stream import ClassTexts
from spa_fast.cil.errors import RunError
from spa_fast.cil.methods.replay import Replay
from spa_fast.patches import align_selected, spa_scores, topk_patches
from spa_fast.transport import SinkhornOutput, sinkhorn, sinkhorn_align

# Images whose patches are widened to fp32 at a time.
SELECT_BATCH = 256


class Kept(NamedTuple):
    """Kept patches of every (image, class): `indices` [B, C, k] and their weights [B, C, k] (None: equal)."""

    indices: Tensor
    weights: Tensor | None

    def rows(self, rows: Tensor) -> Kept:
        """Those of some images."""
        return Kept(self.indices[rows], None if self.weights is None else self.weights[rows])


class Explanation(NamedTuple):
    """Why an image got its local score for a class.

    Attributes:
        kept: [k] indices of the kept patches, best first.
        relevance: [N] of every patch to the class, as patches are chosen by.
        similarity: [k, M] cosines of the kept patches to the descriptions, as aligned.
        transport: plan [k, M] and what goes with it.
    """

    kept: Tensor
    relevance: Tensor
    similarity: Tensor
    transport: SinkhornOutput


class LocalBranch:
    """Selection, projection, alignment and replay of patch tokens.

    Args:
        config: settings.
        visual, textual: projectors of patches and of semantic tokens.
        generator: source of pseudo-features.
    """

    def __init__(
        self, config: SpaConfig, visual: nn.Module, textual: nn.Module, generator: torch.Generator
    ) -> None:
        self.config = config
        self.visual = visual
        self.textual = textual
        self.replay = Replay(config, generator)

    def scores(self, patches: Tensor, texts: ClassTexts, kept: Kept | None = None) -> Tensor:
        """Transport scores [B, C] of patches [B, N, D]; selects first where `kept` is not given."""
        config, patches = self.config, patches.float()
        if kept is None and config.marginals != "uniform":
            kept = self.select(patches, texts)
        visual, textual = self.visual(patches), self.textual(texts.tokens)
        scores: Tensor
        if kept is None:
            select: dict[str, Any] = {}
            if config.selection_space == "frozen":
                select = {"select_patches": patches, "select_tokens": texts.tokens}
            scores = spa_scores(
                visual,
                textual,
                config.k,
                reduce=config.patch_score,
                class_conditional=config.class_conditional,
                token_mask=texts.mask,
                **select,
                **self._transport,
            )
            return scores
        scores = align_selected(
            visual,
            textual,
            kept.indices,
            weights=kept.weights,
            token_mask=texts.mask,
            **self._transport,
        )
        return scores

    @property
    def _transport(self) -> dict[str, Any]:
        names = ("eps", "max_iter", "tol", "solver", "grad", "backend")
        return {name: getattr(self.config, name) for name in names}

    @torch.no_grad()
    def select(self, patches: Rows, texts: ClassTexts) -> Kept:
        """The k patches of every (image, class) that agree best with the class's descriptions."""
        parts = [self._ranked(part.float(), texts, self.config.k) for part in patches.split(SELECT_BATCH)]
        indices = torch.cat([indices for _, indices in parts])
        if self.config.marginals == "uniform":
            return Kept(indices, None)
        return Kept(indices, (torch.cat([scores for scores, _ in parts]) / self.config.eps).softmax(-1))

    def _ranked(self, patches: Tensor, texts: ClassTexts, k: int) -> tuple[Tensor, Tensor]:
        """Relevance and indices [B, C, k] of the patches that agree best, in the space they are chosen in."""
        config, tokens = self.config, texts.tokens
        if config.selection_space == "projected":
            patches, tokens = self.visual(patches), self.textual(tokens)
        return topk_patches(
            patches,
            tokens,
            k,
            reduce=config.patch_score,
            class_conditional=config.class_conditional,
            token_mask=texts.mask,
            backend=config.backend,
        )

    def remember(self, patches: Rows, targets: Tensor, texts: ClassTexts, labels: range) -> None:
        """Fit Gaussians of the new classes' kept patches, or of each image's mean of them."""
        if self.config.local_replay == "none":
            return
        for label in labels:
            own = patches[targets == label].float()
            kept = self._of_class(own, texts, label).indices[:, 0]
            chosen = own.gather(1, kept[..., None].expand(-1, -1, own.shape[-1]))
            chosen = chosen.mean(1) if self.config.local_replay == "mean" else chosen.flatten(0, 1)
            self.replay.fit(chosen, torch.full((len(chosen),), label))
        self.replay.freeze()

    def pseudo_scores(self, texts: ClassTexts, old: int) -> tuple[Tensor, Tensor]:
        """Scores [n, C] of pseudo-images, each a set of drawn patches (or one mean patch), and labels [n]."""
        config = self.config
        size = config.k if config.local_replay == "patches" else 1
        count = 0 if config.local_replay == "none" else config.local_pseudo_per_class * size
        drawn, targets = self.replay.draw(old, count, texts.tokens.shape[-1])
        patches = drawn.unflatten(0, (len(drawn) // size, size))
        # All of them are kept.
        visual, textual = self.visual(patches), self.textual(texts.tokens)
        scores: Tensor = sinkhorn_align(visual, textual, token_mask=texts.mask, **self._transport)
        return scores, targets[::size]

    @torch.no_grad()
    def explain(self, patches: Tensor, texts: ClassTexts, label: int) -> Explanation:
        """For one image's patches [N, D] and one class.

        Raises:
            RunError: the run aligns without transport.
        """
        config = self.config
        if config.solver != "sinkhorn":
            raise RunError(f"explain: shows a transport plan; this run aligns by {config.solver!r}")
        patches = patches.float()
        kept = self._of_class(patches[None], texts, label)
        tokens = texts.tokens[label][texts.mask[label]]
        rows = kept.indices[0, 0]
        ranked, order = self._ranked(patches[None], texts.only(label), len(patches))
        relevance = torch.empty_like(ranked[0, 0]).scatter_(0, order[0, 0], ranked[0, 0])
        aligned = F.normalize(self.visual(patches[rows]), dim=-1)
        similarity = aligned @ F.normalize(self.textual(tokens), dim=-1).T
        weights = None if kept.weights is None else kept.weights[0, 0]
        transport = sinkhorn(
            1 - similarity,
            weights,
            eps=config.eps,
            max_iter=config.max_iter,
            tol=config.tol,
            return_plan=True,
            backend=config.backend,
        )
        assert isinstance(transport, SinkhornOutput)
        return Explanation(rows, relevance, similarity, transport)

    def _of_class(self, patches: Tensor, texts: ClassTexts, label: int) -> Kept:
        """What `select` keeps for one class, [B, 1, k]."""
        if self.config.class_conditional:
            return self.select(patches, texts.only(label))
        # One choice an image, over all classes seen.
        kept = self.select(patches, texts)
        return Kept(kept.indices[:, :1], None if kept.weights is None else kept.weights[:, label, None])
