"""Frozen features of a set of images, laid over memory-mapped shards without copying them."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor


class Stacked:
    """Tensors [n_i, ...] seen as one of sum n_i rows; rows are copied when asked for, never all at once."""

    def __init__(self, parts: Sequence[Tensor | Stacked]) -> None:
        self.parts: list[Tensor] = []
        for part in parts:
            self.parts += part.parts if isinstance(part, Stacked) else [part]
        self.ends = torch.tensor(list(itertools.accumulate(len(part) for part in self.parts)))

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, rows: Tensor) -> Tensor:
        """Rows by index or by boolean mask, in that order."""
        rows = rows.nonzero().flatten() if rows.dtype == torch.bool else rows
        owner = torch.bucketize(rows, self.ends, right=True)
        gathered: Tensor = self.parts[0].new_empty(len(rows), *self.parts[0].shape[1:])
        for index in owner.unique().tolist():
            here = owner == index
            part = self.parts[index]
            gathered[here] = part[rows[here] - self.ends[index] + len(part)]
        return gathered

    def split(self, size: int) -> Iterator[Tensor]:
        """Consecutive rows, at most `size` at a time."""
        return (self[rows] for rows in torch.arange(len(self)).split(size))


Rows = Tensor | Stacked


@dataclasses.dataclass(frozen=True)
class Features:
    """Frozen features of n images, not normalised: `globals` [n, D] fp32, `patches` [n, N, D] fp16, bf16."""

    globals: Tensor
    patches: Rows

    def __len__(self) -> int:
        return len(self.globals)


@dataclasses.dataclass(frozen=True)
class ClassFeatures(Features):
    """Those of one class and split, of one shard."""

    patches: Tensor
