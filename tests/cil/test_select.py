import pytest
import torch
import torch.nn.functional as F

from spa_fast.cil.descriptions.select import select_exemplars

WAYS = ["kmeans_medoid", "farthest_point", "herding", "random"]


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("n", [1, 3, 5, 30])
def test_distinct_rows_and_the_most_typical_first(how, n):
    features = torch.randn(n, 8, generator=torch.Generator().manual_seed(n))
    rows = select_exemplars(features, 5, how)
    assert len(rows) == len(set(rows)) == min(5, n)
    points = F.normalize(features, dim=-1)
    assert rows[0] == int((points @ points.mean(0)).argmax())
    assert rows == select_exemplars(features, 5, how)


@pytest.mark.parametrize("how", ["kmeans_medoid", "farthest_point"])
def test_diverse_choices_reach_every_cluster(how):
    centres = F.normalize(torch.eye(5, 16), dim=-1)
    features = torch.cat(
        [c + 0.01 * torch.randn(20, 16, generator=torch.Generator().manual_seed(1)) for c in centres]
    )
    rows = select_exemplars(features, 5, how)
    assert len({r // 20 for r in rows}) >= 4


def test_duplicates_of_one_image_do_not_break_k_means():
    assert len(select_exemplars(torch.ones(6, 4), 5)) == 5
