"""Representative and diverse images of a class, for whoever writes its descriptions (Stage A of SPA)."""

from __future__ import annotations

from typing import Literal

import numpy as np
from torch import Tensor

Selection = Literal["representative_diverse", "farthest_point", "herding", "random"]

# Distances between all pairs of more images than this are not made: a class that large is thinned out first.
LARGEST = 2048


def select_exemplars(
    features: Tensor, count: int, how: Selection = "representative_diverse", seed: int = 1993
) -> list[int]:
    """Row numbers of `count` images (all, where there are fewer) of one class.

    The first is the representative, the image nearest the class mean in cosine. The others are diverse:

    - `representative_diverse`: k-medoids around it. The representative is a medoid that stays; the others
      minimise the sum over all images of the cosine distance to the nearest medoid, by greedy addition and
      then by swaps as long as one lowers the sum.
    - `farthest_point`: each is the image farthest from its nearest chosen one.
    - `herding`: each brings the mean of the chosen closest to the class mean.
    - `random`: drawn without replacement from `seed`.

    Ties go to the lowest row; the result depends on nothing but the arguments.

    Args:
        features: global features [n, D] of the class, any norm.
        count: images wanted, at least 1.
        how: see above.
        seed: of the random choice, and of which 2048 of a larger class are looked at.

    Raises:
        ValueError: no features, a count below 1, or features that are not finite.
    """
    if features.dim() != 2 or not len(features):
        raise ValueError(f"features: expected [n, D] with n at least 1, got {list(features.shape)}")
    if count < 1:
        raise ValueError(f"count: expected at least 1, got {count}")
    points = features.double().numpy()
    if not np.isfinite(points).all():
        raise ValueError("features: expected finite values")
    points = points / np.maximum(np.linalg.norm(points, axis=1, keepdims=True), 1e-12)
    rng = np.random.default_rng(seed)
    first = int((points @ points.mean(0)).argmax())
    if how == "random":
        rest = [i for i in rng.permutation(len(points)).tolist() if i != first]
        return [first, *rest[: count - 1]]
    rows = np.arange(len(points))
    if len(points) > LARGEST:
        others = rng.choice(np.delete(rows, first), LARGEST - 1, replace=False)
        rows = np.sort(np.append(others, first))
    choose = {"representative_diverse": _medoids, "farthest_point": _farthest, "herding": _herd}[how]
    start = int(np.searchsorted(rows, first))
    return [int(rows[i]) for i in choose(points[rows], start, min(count, len(rows)))]


def _medoids(points: np.ndarray, first: int, count: int) -> list[int]:
    distance = 1 - points @ points.T
    chosen = [first]
    nearest = distance[first]
    while len(chosen) < count:
        sums = np.minimum(distance, nearest).sum(1)
        sums[chosen] = np.inf
        chosen.append(int(sums.argmin()))
        nearest = np.minimum(nearest, distance[chosen[-1]])
    best = nearest.sum()
    swapped = True
    while swapped:
        swapped = False
        for place in range(1, count):
            others = [i for i in chosen if i != chosen[place]]
            sums = np.minimum(distance, distance[others].min(0)).sum(1)
            sums[others] = np.inf
            candidate = int(sums.argmin())
            # Below rounding a swap would go back and forth.
            if sums[candidate] < best - 1e-9:
                chosen[place], best, swapped = candidate, sums[candidate], True
    return chosen


def _farthest(points: np.ndarray, first: int, count: int) -> list[int]:
    chosen = [first]
    nearest = 1 - points @ points[first]
    while len(chosen) < count:
        nearest[chosen] = -np.inf
        chosen.append(int(nearest.argmax()))
        nearest = np.minimum(nearest, 1 - points @ points[chosen[-1]])
    return chosen


def _herd(points: np.ndarray, first: int, count: int) -> list[int]:
    chosen = [first]
    mean = points.mean(0)
    while len(chosen) < count:
        running = (points[chosen].sum(0) + points) / (len(chosen) + 1)
        gap = np.linalg.norm(running - mean, axis=1)
        gap[chosen] = np.inf
        chosen.append(int(gap.argmin()))
    return chosen
