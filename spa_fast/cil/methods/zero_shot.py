"""Zero-shot CLIP: nothing is learnt; classes are their texts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from spa_fast.cil.data.stream import Task
from spa_fast.cil.methods.base import Method, described_classifier, prompt_classifier


class ZeroShot(Method):
    """Cosine to the mean prompt feature, or to the mean description feature, of each class."""

    def __init__(self, texts: Literal["templates", "descriptions"] = "templates") -> None:
        self.source = texts
        self.classifier = torch.zeros(0, 0)

    @property
    def n_classes(self) -> int:
        return len(self.classifier)

    def learn(self, task: Task) -> dict[str, float]:
        texts = self.remember_texts(task)
        if self.source == "templates":
            self.classifier = prompt_classifier(texts.templates)
        else:
            self.classifier = described_classifier(texts)
        return {}

    def scores(self, globals_: Tensor, patches: Tensor) -> Tensor:
        return F.normalize(globals_, dim=-1) @ self.classifier.T

    def state_dict(self) -> dict[str, Tensor]:
        return {"classifier": self.classifier}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.classifier = state["classifier"]
