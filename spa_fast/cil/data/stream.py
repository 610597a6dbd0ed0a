"""The stream of tasks: the only door to images and texts, and it opens one task at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from spa_fast.cil.config import SpaConfig
from spa_fast.cil.data.cache import FeatureCache
from spa_fast.cil.data.features import Features, Stacked
from spa_fast.cil.data.layout import Split


@dataclass(frozen=True)
class ClassTexts:
    """Text features of C classes, fp32, not normalised.

    Attributes:
        templates: [C, T, D], one feature per prompt template.
        tokens: [C, M, D] semantic tokens, padded with zeros.
        mask: [C, M], True where a token is real.
    """

    templates: Tensor
    tokens: Tensor
    mask: Tensor

    def joined(self, other: ClassTexts) -> ClassTexts:
        """These classes followed by `other`'s; shorter token sets are padded."""
        width = max(self.mask.shape[1], other.mask.shape[1])
        tokens = [_padded(t.tokens, width) for t in (self, other)]
        mask = [_padded(t.mask, width) for t in (self, other)]
        return ClassTexts(torch.cat([self.templates, other.templates]), torch.cat(tokens), torch.cat(mask))

    def only(self, label: int) -> ClassTexts:
        """One class."""
        return ClassTexts(self.templates[label, None], self.tokens[label, None], self.mask[label, None])

    def tensors(self) -> dict[str, Tensor]:
        """The fields by name."""
        return {"templates": self.templates, "tokens": self.tokens, "mask": self.mask}


@dataclass(frozen=True)
class Task:
    """What a method may learn from at one stage.

    Attributes:
        index: stage, from 0.
        labels: the new classes; labels count classes in order of arrival.
        features: training features of the new classes.
        targets: [n] label of each image.
        texts: texts of the new classes.
    """

    index: int
    labels: range
    features: Features
    targets: Tensor
    texts: ClassTexts


class TaskStream:
    """Tasks in class order. Features and texts of a class are read when its task arrives, never before.

    Args:
        cache: features by folder index, and of texts.
        order: folder index of each label.
        tasks: label ranges.
        descriptions: those in use, per folder index; None leaves classes without semantic tokens.
        templates: prompt templates with `{}` for the class name.
        config: how texts become tokens.
    """

    def __init__(
        self,
        cache: FeatureCache,
        order: Sequence[int],
        tasks: Sequence[range],
        descriptions: Sequence[Sequence[str]] | None,
        templates: Sequence[str],
        config: SpaConfig,
    ) -> None:
        self.tasks = tuple(tasks)
        self.order = tuple(order)
        self.templates = tuple(templates)
        self._cache = cache
        self._descriptions = descriptions
        self._config = config
        self._stage = -1

    def __iter__(self) -> Iterator[Task]:
        for stage, labels in enumerate(self.tasks):
            self._stage = stage
            features, targets = self._load("train", labels)
            yield Task(stage, labels, features, targets, self._texts(labels))

    def test(self, task: int) -> tuple[Features, Tensor]:
        """Test features and targets of a task that has arrived.

        Raises:
            RuntimeError: the task lies in the future.
        """
        if task > self._stage:
            raise RuntimeError(
                f"test images of task {task} asked for at stage {self._stage}: that is the future"
            )
        return self._load("test", self.tasks[task])

    def descriptions(self, label: int) -> list[str]:
        """The descriptions of one class that are in use."""
        if self._descriptions is None:
            return []
        return list(self._descriptions[self.order[label]])

    def open_all(self) -> None:
        """Open every task, for scoring a method that has learnt them all."""
        self._stage = len(self.tasks) - 1

    def _load(self, split: Split, labels: range) -> tuple[Features, Tensor]:
        parts = [self._cache.load(split, self.order[label]) for label in labels]
        targets = torch.cat([torch.full((len(p),), label) for p, label in zip(parts, labels, strict=True)])
        patches = Stacked([part.patches for part in parts])
        return Features(torch.cat([part.globals for part in parts]), patches), targets

    def _texts(self, labels: range) -> ClassTexts:
        names = [self._cache.data.names[self.order[label]] for label in labels]
        prompts = [[template.replace("{}", name) for template in self.templates] for name in names]
        templates = torch.stack([self._cache.texts.encode(lines) for lines in prompts])
        tokens = [self._tokens(name, label) for name, label in zip(names, labels, strict=True)]
        most = max(len(t) for t in tokens)
        mask = torch.stack([torch.arange(most) < len(t) for t in tokens])
        return ClassTexts(templates, torch.cat([_padded(t[None], most) for t in tokens]), mask)

    def _tokens(self, name: str, label: int) -> Tensor:
        config = self._config
        lines = self.descriptions(label)
        if not lines:
            return torch.zeros(0, self._cache.backbone.width)
        join = config.description_template.replace("{name}", name)
        sentences = [join.replace("{description}", line.lower()) for line in lines]
        if config.semantic_tokens == "sentence_eos":
            return self._cache.texts.encode(sentences)
        return self._cache.texts.encode(sentences, config.word_limit)


def _padded(tensor: Tensor, width: int) -> Tensor:
    """Grow dimension 1 to `width` with zeros (False for masks)."""
    missing = width - tensor.shape[1]
    return (
        torch.cat([tensor, tensor.new_zeros(tensor.shape[0], missing, *tensor.shape[2:])], 1)
        if missing
        else tensor
    )
