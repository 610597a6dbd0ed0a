"""What a method is to the loop, to checkpoints and to `predict`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping

import torch.nn.functional as F
from torch import Tensor

from spa_fast.cil.data.stream import ClassTexts, Task


class Method(ABC):
    """Learns tasks as they arrive and scores images over all classes seen so far."""

    texts: ClassTexts | None = None
    on_epoch: Callable[[Mapping[str, float]], None] | None = None
    """Called at the end of every epoch with the task's index, the epoch and figures worth logging."""

    @property
    @abstractmethod
    def n_classes(self) -> int:
        """Classes seen."""

    @abstractmethod
    def learn(self, task: Task) -> dict[str, float]:
        """Learn one task; returns figures worth logging, for example the last epoch's loss."""

    @abstractmethod
    def scores(self, globals_: Tensor, patches: Tensor) -> Tensor:
        """Class scores [B, C] of images given by global [B, D] and patch tokens [B, N, D]."""

    @abstractmethod
    def state_dict(self) -> dict[str, Tensor]:
        """Everything that scores and later tasks need."""

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore what `state_dict` gave, in a freshly made method."""

    def remember_texts(self, task: Task) -> ClassTexts:
        """Append the new classes' texts to those seen."""
        self.texts = task.texts if self.texts is None else self.texts.joined(task.texts)
        return self.texts

    def seen_texts(self) -> ClassTexts:
        """Texts of all classes seen.

        Raises:
            RuntimeError: no task has been learnt.
        """
        if self.texts is None:
            raise RuntimeError("no task has been learnt yet")
        return self.texts


def prompt_classifier(templates: Tensor) -> Tensor:
    """Normalise each template's feature [C, T, D], average over templates, normalise: [C, D]."""
    return F.normalize(F.normalize(templates, dim=-1).mean(1), dim=-1)


def described_classifier(texts: ClassTexts) -> Tensor:
    """Normalised mean of each class's normalised semantic tokens: [C, D]."""
    tokens = F.normalize(texts.tokens, dim=-1) * texts.mask[..., None]
    return F.normalize(tokens.sum(1), dim=-1)
