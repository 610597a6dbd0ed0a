"""No image, label or text of a future class may be read: traps are set and must stay shut."""

import dataclasses

import pytest
import torch
from PIL import Image

from spa_fast.cil.config import SpaConfig
from spa_fast.cil.experiment import make_method, prepare
from spa_fast.cil.loop import run_tasks
from spa_fast.cil.run_config import RunConfig


@pytest.fixture
def experiment(colours, backbone, tmp_path):
    config = RunConfig(
        data=colours[0], backbone=backbone.name, descriptions=colours[1], increment=3, order_seed=5
    )
    return prepare(config, tmp_path / "cache", backbone)


@pytest.mark.parametrize("method_name", ["spa", "zero_shot", "simple_cil"])
@pytest.mark.parametrize("tokens", ["sentence_eos", "token_level"])
def test_nothing_of_the_future_is_read(colours, backbone, tmp_path, method_name, tokens, monkeypatch):
    config = RunConfig(
        data=colours[0],
        backbone=backbone.name,
        descriptions=colours[1],
        increment=3,
        order_seed=5,
        spa=SpaConfig(k=4, epochs=1, semantic_tokens=tokens),
    )
    experiment = prepare(config, tmp_path / "cache", backbone)
    stream, data = experiment.stream, experiment.data
    opened, texts = [], []
    real_open, real_tokenizer = Image.open, backbone.tokenizer
    monkeypatch.setattr(Image, "open", lambda path: opened.append(path) or real_open(path))
    monkeypatch.setattr(backbone, "tokenizer", lambda lines: texts.extend(lines) or real_tokenizer(lines))
    stages = []

    def check(outcome):
        stage = len(outcome.matrix.rows) - 1
        arrived = {
            data.folders[experiment.order[label]] for task in stream.tasks[: stage + 1] for label in task
        }
        future = set(data.folders) - arrived
        assert {p.parent.name for p in opened} == arrived
        assert texts
        assert not [t for t in texts for folder in future if folder.replace("_", " ") in t]
        stages.append(stage)

    method = make_method(dataclasses.replace(config, method=method_name), experiment.backbone)
    run_tasks(stream, method, check)
    assert stages == [0, 1, 2]


def test_asking_for_a_future_test_set_is_an_error(experiment):
    tasks = iter(experiment.stream)
    next(tasks)
    experiment.stream.test(0)
    with pytest.raises(RuntimeError, match="future"):
        experiment.stream.test(1)


def test_labels_follow_the_class_order(experiment):
    for task in experiment.stream:
        assert task.targets.unique().tolist() == list(task.labels)
        for label in task.labels:
            own = experiment.cache.load("train", experiment.order[label])
            assert torch.equal(task.features.globals[task.targets == label], own.globals)
        assert task.texts.templates.shape == (len(task.labels), 1, experiment.backbone.width)
        assert task.texts.tokens.shape == (len(task.labels), 3, experiment.backbone.width)


def test_ragged_texts_are_padded_and_masked(experiment):
    tasks = list(experiment.stream)
    short = tasks[0].texts
    cut = type(short)(short.templates, short.tokens[:, :2], short.mask[:, :2])
    joined = cut.joined(tasks[1].texts)
    assert joined.mask.sum(1).tolist() == [2, 2, 2, 3, 3, 3]
    assert not joined.tokens[:3, 2].any()
    assert torch.equal(joined.only(4).tokens[0], tasks[1].texts.tokens[1])
