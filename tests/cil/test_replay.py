"""What training keeps of old classes: bounded, and drawn alike after a checkpoint."""

import itertools

import pytest
import torch

from spa_fast.cil.config import SpaConfig
from spa_fast.cil.methods.replay import Replay


def filled(config):
    replay = Replay(config, torch.Generator().manual_seed(0))
    g = torch.Generator().manual_seed(1)
    for task in range(3):
        replay.fit(torch.randn(40, 16, generator=g), torch.arange(40) % 2 + 2 * task)
        replay.freeze()
    return replay


def test_a_finished_task_leaves_its_factors_only():
    state = filled(SpaConfig()).state_dict()
    assert state["scatter"].numel() == 0
    assert state["factor_0"].shape == (6, 16 * 17 // 2)
    assert state["factor_0"].dtype == torch.float32


@pytest.mark.parametrize(
    ("covariance", "shrink"),
    [
        *itertools.product(["full", "diag", "lowrank", "shared"], ["none", "average"]),
        ("full", "ledoit_wolf"),
        ("shared", "oas"),
    ],
)
def test_a_restored_replay_draws_the_same_bits_and_goes_on(covariance, shrink):
    config = SpaConfig(covariance=covariance, shrink=shrink)
    replay = filled(config)
    restored = Replay(config, torch.Generator().manual_seed(0))
    restored.load_state_dict(replay.state_dict())
    for old, per_class in ((6, 3), (2, 5)):
        for ours, theirs in zip(
            replay.draw(old, per_class, 16), restored.draw(old, per_class, 16), strict=True
        ):
            assert torch.equal(ours, theirs)
    for either in (replay, restored):
        either.fit(torch.ones(3, 16) * torch.arange(3)[:, None], torch.full((3,), 6))
    assert torch.equal(replay.draw(7, 2, 16)[0], restored.draw(7, 2, 16)[0])
