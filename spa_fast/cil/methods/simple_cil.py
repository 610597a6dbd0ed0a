"""SimpleCIL: the raw mean feature of each class is its cosine prototype; nothing is trained.

Source: Zhou et al., "Revisiting Class-Incremental Learning with Pre-Trained Models", arXiv 2303.07338.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from spa_fast.cil.data.stream import Task
from spa_fast.cil.methods.base import Method


class SimpleCil(Method):
    """Cosine to the mean of the un-normalised global features of each class."""

    def __init__(self) -> None:
        self.prototypes = torch.zeros(0, 0)

    @property
    def n_classes(self) -> int:
        return len(self.prototypes)

    def learn(self, task: Task) -> dict[str, float]:
        means = torch.stack([task.features.globals[task.targets == label].mean(0) for label in task.labels])
        self.prototypes = torch.cat([self.prototypes, means]) if len(self.prototypes) else means
        return {}

    def scores(self, globals_: Tensor, patches: Tensor) -> Tensor:
        return F.normalize(globals_, dim=-1) @ F.normalize(self.prototypes, dim=-1).T

    def state_dict(self) -> dict[str, Tensor]:
        return {"prototypes": self.prototypes}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.prototypes = state["prototypes"]
