"""Every backend learns the same on the embedded world: loss of every step, accuracy after every task."""

import dataclasses

import pytest
import torch

from spa_fast._backends import available
from spa_fast.cil.demo.ladder import CHECKPOINT, SPA
from spa_fast.cil.demo.world import write_dataset
from spa_fast.cil.experiment import make_method, prepare
from spa_fast.cil.loading import load_backbone
from spa_fast.cil.loop import run_tasks
from spa_fast.cil.methods import spa as module
from spa_fast.cil.run_config import RunConfig


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    write_dataset(folder, 5, 8, 8)
    return folder, load_backbone(f"local-dir:{CHECKPOINT}")


def learnt(world, monkeypatch, **changes):
    """Losses of all steps and the matrix of accuracies."""
    folder, backbone = world
    config = RunConfig(
        data=folder,
        backbone=backbone.name,
        descriptions=folder / "descriptions.json",
        classnames=folder / "names.json",
        increment=5,
        spa=dataclasses.replace(SPA, epochs=4, batch_size=20, **changes),
    )
    losses, finite = [], module.finite
    monkeypatch.setattr(module, "finite", lambda loss: losses.append(finite(loss)) or losses[-1])
    torch.manual_seed(0)
    experiment = prepare(config, folder / "features", backbone)
    outcome = run_tasks(experiment.stream, make_method(config, backbone))
    monkeypatch.undo()
    return torch.tensor(losses), outcome.matrix


@pytest.mark.skipif(available()["native"] is not None, reason="native is not built")
@pytest.mark.parametrize("space", ["frozen", "projected"])
def test_loss_curves_and_accuracy_do_not_depend_on_the_backend(world, monkeypatch, space):
    losses, matrix = learnt(world, monkeypatch, backend="native", selection_space=space)
    want, expected = learnt(world, monkeypatch, backend="reference", selection_space=space)
    assert len(losses) == 5 * 4 * 2
    assert losses.std() > 0.1
    assert float((losses - want).abs().max()) <= 1e-3
    assert abs(matrix.last - expected.last) <= 0.1
    assert abs(matrix.average - expected.average) <= 0.1
