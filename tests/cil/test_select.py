"""Selection of images: hand-made point sets, brute force, ties, hostile input."""

from itertools import combinations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from spa_fast.cil.descriptions import select
from spa_fast.cil.descriptions.select import select_exemplars

WAYS = ["representative_diverse", "farthest_point", "herding", "random"]


def gaussian(n, width=8, seed=0):
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed))


def at(*degrees):
    """Points on the unit circle."""
    angles = torch.tensor(degrees, dtype=torch.float64).deg2rad()
    return torch.stack([angles.cos(), angles.sin()], dim=1)


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("n", [1, 3, 5, 30])
def test_distinct_rows_and_the_most_typical_first(how, n):
    features = gaussian(n, seed=n)
    rows = select_exemplars(features, 5, how)
    assert len(rows) == len(set(rows)) == min(5, n)
    points = F.normalize(features, dim=-1)
    assert rows[0] == int((points @ points.mean(0)).argmax())
    assert rows == select_exemplars(features, 5, how) == select_exemplars(7 * features, 5, how)


def test_hand_made_clusters():
    # Three groups; the middle of each is its medoid, row 4 is nearest the mean of all.
    features = at(-62, -60, -58, -2, 0, 2, 58, 60, 62)
    assert select_exemplars(features, 3) == [4, 1, 7]
    # The farthest from the middle are the rims.
    assert select_exemplars(features, 3, "farthest_point") == [4, 0, 8]


def test_herding_by_hand():
    # The mean lies at 0 degrees: a point on one side is answered by its mirror image.
    assert select_exemplars(at(-40, -10, 0, 10, 40), 3, "herding") == [2, 1, 3]


def cost(points, chosen):
    return (1 - points @ points[list(chosen)].T).min(1).sum()


@pytest.mark.parametrize("seed", range(12))
def test_medoids_against_brute_force(seed):
    features = gaussian(11, 4, seed)
    points = F.normalize(features.double(), dim=-1).numpy()
    first, *others = select_exemplars(features, 4)
    found = cost(points, [first, *others])
    every = [cost(points, [first, *c]) for c in combinations(set(range(11)) - {first}, 3)]
    # Swaps end in a local optimum: no single one helps; all are within a tenth of the best there is.
    for out in others:
        kept = {first, *others} - {out}
        assert min(cost(points, [*kept, i]) for i in set(range(11)) - kept) >= found - 1e-9
    assert min(every) - 1e-9 <= found <= 1.1 * min(every)


@pytest.mark.parametrize("seed", range(6))
def test_farthest_and_herding_against_brute_force(seed):
    features = gaussian(12, 5, seed)
    points = F.normalize(features.double(), dim=-1).numpy()
    for how in ("farthest_point", "herding"):
        rows = select_exemplars(features, 5, how)
        for k in range(1, 5):
            left = [i for i in range(12) if i not in rows[:k]]
            if how == "farthest_point":
                expected = max(left, key=lambda i: min(1 - points[i] @ points[j] for j in rows[:k]))
            else:
                mean = points.mean(0)
                expected = min(left, key=lambda i: np.linalg.norm(points[[*rows[:k], i]].mean(0) - mean))
            assert rows[k] == expected


@pytest.mark.parametrize("how", ["representative_diverse", "farthest_point"])
def test_diverse_choices_reach_every_cluster(how):
    centres = torch.eye(5, 16)
    features = torch.cat([c + 0.01 * gaussian(20, 16, 1) for c in centres])
    assert {r // 20 for r in select_exemplars(features, 5, how)} == set(range(5))


@pytest.mark.parametrize("how", WAYS[:3])
def test_ties_go_to_the_lowest_row(how):
    assert select_exemplars(torch.ones(6, 4), 5, how) == [0, 1, 2, 3, 4]
    assert select_exemplars(torch.zeros(6, 4), 5, how) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("how", WAYS)
def test_a_very_large_class_is_thinned(how, monkeypatch):
    monkeypatch.setattr(select, "LARGEST", 16)
    features = gaussian(100)
    rows = select_exemplars(features, 5, how)
    points = F.normalize(features, dim=-1)
    assert rows[0] == int((points @ points.mean(0)).argmax())
    assert len(set(rows)) == 5
    assert rows == select_exemplars(features, 5, how)


def test_random_depends_on_its_seed():
    features = gaussian(40)
    assert select_exemplars(features, 5, "random", 1) != select_exemplars(features, 5, "random", 2)


@pytest.mark.parametrize(
    ("features", "count", "message"),
    [
        (torch.zeros(0, 4), 3, r"features: expected \[n, D\]"),
        (torch.zeros(4), 3, r"features: expected \[n, D\]"),
        (torch.ones(3, 2), 0, "count: expected at least 1, got 0"),
        (torch.tensor([[1.0, float("nan")]]), 1, "finite"),
    ],
)
def test_refused(features, count, message):
    with pytest.raises(ValueError, match=message):
        select_exemplars(features, count)
