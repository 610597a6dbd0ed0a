"""Class order and task split, bit for bit as LAMDA-style repositories draw them."""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from spa_fast.cil.errors import RunError


def class_order(n_classes: int, seed: int = 1993) -> list[int]:
    """Folder-sorted class indices in the order in which they arrive.

    Equals `np.random.seed(seed); np.random.permutation(n_classes)`: the legacy generator, on purpose.
    """
    order = np.random.RandomState(seed).permutation(n_classes)
    return [int(i) for i in order]


def split_tasks(n_classes: int, init_classes: int, increment: int) -> list[range]:
    """Label ranges of the tasks.

    Args:
        n_classes: all classes.
        init_classes: classes of the first task; 0 means `increment` (the B0 convention).
        increment: classes of every later task; a remainder forms a smaller last task.

    Raises:
        RunError: negative numbers, increment 0, or a first task larger than the data set.
    """
    if n_classes < 1:
        raise RunError(f"classes: expected at least 1, got {n_classes}")
    if increment < 1:
        raise RunError(f"--increment: expected at least 1, got {increment}")
    if not 0 <= init_classes <= n_classes:
        raise RunError(
            f"--init-classes: expected 0 to {n_classes} (the data set's classes), got {init_classes}"
        )
    edges = [0, init_classes or min(increment, n_classes)]
    while edges[-1] < n_classes:
        edges.append(min(edges[-1] + increment, n_classes))
    return [range(lo, hi) for lo, hi in pairwise(edges)]
