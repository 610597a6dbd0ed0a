"""SPA (reconstructed): global and patch-level alignment with class texts, calibrated by pseudo-features.

Source: "Unlocking Patch-Level Features for CLIP-Based Class-Incremental Learning", arXiv 2605.13835. The
paper's text beyond its abstract and its code are not public; every open choice is a field of `SpaConfig`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spa_fast.cil.config import SpaConfig
from spa_fast.cil.data.stream import ClassTexts, Task
from spa_fast.cil.errors import RunError
from spa_fast.cil.methods.base import Method, described_classifier, prompt_classifier
from spa_fast.cil.methods.local_branch import Explanation, Kept, LocalBranch
from spa_fast.cil.methods.replay import Replay
from spa_fast.cil.projectors import ProjectorBank


class Spa(Method):
    """Two branches over frozen features.

    Global: cosine of projected image and prompt features. Local: for every class the k patches that its
    descriptions choose, aligned with the descriptions by optimal transport. Both train on the images of the
    current task and on draws from the Gaussians of old classes.

    Args:
        config: settings.
        width: D of the joint space.
        logit_scale: the backbone's exp(logit_scale).
        seed: of batches and pseudo-features.
    """

    def __init__(self, config: SpaConfig, width: int, logit_scale: float, seed: int = 1) -> None:
        def projectors() -> ProjectorBank:
            return ProjectorBank(
                width,
                form=config.projector,
                bias=config.projector_bias,
                aggregate=config.projector_aggregate,
                backend=config.backend,
            )

        self.config = config
        self.width = width
        self.logit_scale = logit_scale if config.logit_scale_mode == "exp" else math.log(logit_scale)
        self.projectors = {"visual": projectors(), "textual": projectors()}
        if config.project_patches == "separate":
            self.projectors |= {"local_visual": projectors(), "local_textual": projectors()}
        self.generator = torch.Generator().manual_seed(seed)
        self.replay = Replay(config, self.generator)
        self.local: LocalBranch | None = None
        if config.local_branch:
            visual, textual = self._local_projectors()
            self.local = LocalBranch(config, visual, textual, self.generator)

    @property
    def n_classes(self) -> int:
        return 0 if self.texts is None else len(self.texts.mask)

    def learn(self, task: Task) -> dict[str, float]:
        config = self.config
        texts = self.remember_texts(task)
        decaying = self._trainable() if config.decay_old_projectors else []
        for bank in self.projectors.values():
            bank.add_task()
        optimizer = self._optimizer(self._trainable() + decaying)
        schedule = self._schedule(optimizer)
        whole, patches = self._space(task.features.globals), task.features.patches
        # Weights of frozen choices are computed once; equal weights need no more than the fused call, which
        # takes less time to choose anew than plain PyTorch to align what was chosen.
        kept = None
        if self.local and config.selection_space == "frozen" and config.marginals != "uniform":
            kept = self.local.select(patches, texts)
        mean_loss = 0.0
        for epoch in range(config.epochs):
            batches = torch.randperm(len(whole), generator=self.generator).split(config.batch_size)
            mean_loss = 0.0
            for rows in batches:
                own = kept.rows(rows) if kept else None
                try:
                    loss = self._loss(whole[rows], patches[rows], task.targets[rows], own, texts, task.labels)
                    value = finite(loss)
                except ValueError as error:
                    where = f"task {task.index}, epoch {epoch}"
                    raise RunError(
                        f"{where}: {error}; if training diverges lower --lr ({config.lr})"
                    ) from error
                optimizer.zero_grad()
                loss.backward()
                for parameter in decaying:
                    parameter.grad = torch.zeros_like(parameter)
                optimizer.step()
                mean_loss += value / len(batches)
            if self.on_epoch:
                lr = optimizer.param_groups[0]["lr"]
                self.on_epoch({"stage": task.index, "epoch": epoch, "loss": mean_loss, "lr": lr})
            schedule.step()
        if not all(bool(p.isfinite().all()) for p in self._trainable()):
            raise RunError(f"task {task.index}: training diverged; lower --lr ({config.lr})")
        self.replay.fit(whole, task.targets)
        self.replay.freeze()
        if self.local:
            self.local.remember(patches, task.targets, texts, task.labels)
        return {"loss": mean_loss}

    def _loss(
        self,
        whole: Tensor,
        patches: Tensor,
        targets: Tensor,
        kept: Kept | None,
        texts: ClassTexts,
        labels: range,
    ) -> Tensor:
        config, old = self.config, labels.start
        drawn, drawn_targets = self.replay.draw(old, config.pseudo_per_class, self.width)
        prompts = F.normalize(self.projectors["textual"](texts.templates[:, 0]), dim=-1)
        scores = self._global_scores(torch.cat([whole, drawn]), prompts)
        loss = scores.new_zeros(())
        if self.local and config.loss == "joint":
            fused = scores[: len(whole)] + config.fusion_weight * self.local.scores(patches, texts, kept)
            scores = torch.cat([fused, scores[len(whole) :]])
        elif self.local and config.project_patches != "none" and config.local_loss_weight > 0:
            pseudo, pseudo_targets = self.local.pseudo_scores(texts, old)
            local = torch.cat([self.local.scores(patches, texts, kept), pseudo])
            loss = config.local_loss_weight * self._cross_entropy(local, torch.cat([targets, pseudo_targets]))
        loss = loss + self._cross_entropy(scores, torch.cat([targets, drawn_targets]))
        if config.description_loss_weight > 0:
            contrast = prompts @ described_classifier(texts).T
            classes = torch.arange(len(contrast))
            both = self._cross_entropy(contrast, classes) + self._cross_entropy(contrast.T, classes)
            loss = loss + config.description_loss_weight * both / 2
        return loss

    @torch.no_grad()
    def scores(self, globals_: Tensor, patches: Tensor) -> Tensor:
        texts = self.seen_texts()
        prompts = prompt_classifier(self.projectors["textual"](texts.templates))
        scores = self._global_scores(self._space(globals_), prompts)
        if self.local and self.config.fusion_weight > 0:
            scores = scores + self.config.fusion_weight * self.local.scores(patches, texts)
        return scores

    def explain(self, patches: Tensor, label: int) -> Explanation:
        """Kept patches, relevance and transport plan of one image [N, D] for one class.

        Raises:
            RunError: the local branch is off.
        """
        if not self.local:
            raise RunError("explain: this run has no local branch (fusion and local loss weights are 0)")
        return self.local.explain(patches, self.seen_texts(), label)

    def _global_scores(self, whole: Tensor, prompts: Tensor) -> Tensor:
        return F.normalize(self.projectors["visual"](whole), dim=-1) @ prompts.T

    def _cross_entropy(self, scores: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(self.logit_scale * scores, targets)

    def _space(self, whole: Tensor) -> Tensor:
        return F.normalize(whole, dim=-1) if self.config.statistics == "normalized" else whole

    def _local_projectors(self) -> tuple[nn.Module, nn.Module]:
        if self.config.project_patches == "none":
            return nn.Identity(), nn.Identity()
        prefix = "local_" if self.config.project_patches == "separate" else ""
        return self.projectors[prefix + "visual"], self.projectors[prefix + "textual"]

    def _trainable(self) -> list[nn.Parameter]:
        return [p for bank in self.projectors.values() for p in bank.trainable()]

    def _optimizer(self, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        c = self.config
        if c.optimizer == "adamw":
            return torch.optim.AdamW(parameters, lr=c.lr, weight_decay=c.weight_decay)
        return torch.optim.SGD(parameters, lr=c.lr, momentum=c.momentum, weight_decay=c.weight_decay)

    def _schedule(self, optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
        epochs = self.config.epochs
        if self.config.schedule == "step":
            drops = [math.ceil(0.4 * epochs), math.ceil(0.75 * epochs)]
            return torch.optim.lr_scheduler.MultiStepLR(optimizer, drops)
        return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)

    def state_dict(self) -> dict[str, Tensor]:
        parts = {name: bank.state_dict() for name, bank in self.projectors.items()}
        parts |= {"texts": self.seen_texts().tensors(), "gaussians": self.replay.state_dict()}
        if self.local:
            parts["local_gaussians"] = self.local.replay.state_dict()
        return {f"{part}/{key}": value for part, state in parts.items() for key, value in state.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        parts: dict[str, dict[str, Tensor]] = {}
        for key, value in state.items():
            part, _, name = key.partition("/")
            parts.setdefault(part, {})[name] = value
        self.texts = ClassTexts(**parts["texts"])
        self.replay.load_state_dict(parts["gaussians"])
        if self.local and "local_gaussians" in parts:
            self.local.replay.load_state_dict(parts["local_gaussians"])
        for name, bank in self.projectors.items():
            for _ in {key.split(".")[1] for key in parts[name]}:
                bank.add_task()
            bank.load_state_dict(parts[name])


def finite(loss: Tensor) -> float:
    """The loss as a number.

    Raises:
        ValueError: it is NaN or infinite.
    """
    value = loss.item()
    if not math.isfinite(value):
        raise ValueError(f"the loss is {value}")
    return value
