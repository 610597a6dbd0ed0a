"""Representative and diverse images of a class, for whoever writes its descriptions (Stage A of SPA)."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

Selection = Literal["kmeans_medoid", "farthest_point", "herding", "random"]


def select_exemplars(
    features: Tensor, count: int, how: Selection = "kmeans_medoid", seed: int = 1993
) -> list[int]:
    """Row numbers of `count` images (all, where there are fewer) of one class.

    The first is the image nearest the class mean; the others are diverse: medoids of k-means clusters,
    greedily farthest points, herding (each brings the running mean closest to the class mean), or random.

    Args:
        features: global features [n, D] of the class.
        count: images wanted.
        how: see above.
        seed: of k-means and of the random choice.
    """
    points = F.normalize(features.float(), dim=-1)
    mean = F.normalize(points.mean(0), dim=-1)
    chosen = [int((points @ mean).argmax())]
    count = min(count, len(points))
    if how == "random":
        rest = [i for i in np.random.default_rng(seed).permutation(len(points)).tolist() if i != chosen[0]]
        return chosen + rest[: count - 1]
    if how == "kmeans_medoid" and count > 1:
        chosen += _medoids(points, chosen[0], count - 1, seed)
    while len(chosen) < count:
        if how == "herding":
            running = (points[chosen].sum(0) + points) / (len(chosen) + 1)
            gain = -(running - points.mean(0)).norm(dim=-1)
        else:
            gain = -(points @ points[chosen].T).max(-1).values
        gain[chosen] = -torch.inf
        chosen.append(int(gain.argmax()))
    return chosen


def _medoids(points: Tensor, taken: int, clusters: int, seed: int) -> list[int]:
    """The image nearest each k-means centre, skipping `taken` and clusters that hold nothing else."""
    from sklearn.cluster import KMeans

    clusters = min(clusters, len(points.unique(dim=0)))
    labels = KMeans(clusters, n_init=1, random_state=seed).fit_predict(points.numpy())
    medoids = []
    for cluster in range(clusters):
        members = [int(i) for i in np.flatnonzero(labels == cluster) if i != taken]
        if members:
            centre = points[members].mean(0)
            medoids.append(members[int((points[members] @ centre).argmax())])
    return medoids
