"""Pseudo-features of old classes, drawn from what was stored of them."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from spa_fast.bank import GaussianBank
from spa_fast.cil.config import SpaConfig


class Replay:
    """Class Gaussians and the draws that the config asks for.

    Args:
        config: settings.
        generator: source of every draw.
    """

    def __init__(self, config: SpaConfig, generator: torch.Generator) -> None:
        self.config = config
        self.generator = generator
        self.bank = GaussianBank(covariance=config.covariance, ridge=config.ridge, shrink=config.shrink)

    def fit(self, features: Tensor, targets: Tensor) -> None:
        """Store the classes of features [n, D] with labels [n]."""
        self.bank.fit(features, targets)

    def freeze(self) -> None:
        """Keep of all classes stored so far what draws need, and no more: a label never comes back."""
        self.bank.freeze()

    def draw(self, old: int, per_class: int, width: int) -> tuple[Tensor, Tensor]:
        """`per_class` features of each replayed class among labels 0..old-1: [n, width] and labels [n]."""
        if not old or not per_class:
            return torch.zeros(0, width), torch.zeros(0, dtype=torch.long)
        classes = list(range(old))
        if self.config.pseudo_classes:
            classes = (
                torch.randperm(old, generator=self.generator)[: self.config.pseudo_classes]
                .sort()
                .values.tolist()
            )
        if self.config.pseudo_form == "gaussian":
            return self.bank.sample(per_class, classes, generator=self.generator)
        means = self.bank.mean(classes).float().repeat_interleave(per_class, 0)
        noise = torch.randn(means.shape, generator=self.generator)
        scale = self.config.isotropic_std * means.norm(dim=-1, keepdim=True) / math.sqrt(width)
        return means + scale * noise, torch.tensor(classes).repeat_interleave(per_class)

    def state_dict(self) -> dict[str, Tensor]:
        return self.bank.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.bank.load_state_dict(dict(state))
