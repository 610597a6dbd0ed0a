"""bench/stages.py and bench/photographs.py: time told apart by stage; images where there are no real ones."""

from __future__ import annotations

import time
from importlib import import_module
from pathlib import Path

import pytest

from spa_fast.cil.data.datasets import read_image_folders
from spa_fast.cil.data.images import read_image
from spa_fast.cil.descriptions.lint import read_descriptions

BENCH = Path(__file__).parents[1] / "bench"


@pytest.fixture(autouse=True)
def bench_importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCH)


def test_a_stage_counts_without_those_inside_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    stages = import_module("stages")
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    class Work:
        def read(self) -> None:
            now[0] += 3

        def train(self) -> None:
            now[0] += 5
            self.read()

    def run(_stages: object) -> None:
        now[0] += 2
        Work().train()

    places = [(Work, "read", "reading"), (Work, "train", "training")]
    assert stages.shares(run, places, monkeypatch) == {"training": 50, "reading": 30, "rest": 20}
    Work().train()
    assert now[0] == 18


def test_tasks_of_a_pool_are_done_in_turn() -> None:
    done: list[int] = []
    with import_module("stages").InTurn(2, "decode") as pool:
        first, *_ = [pool.submit(done.append, i) for i in range(3)]
        assert done == [0, 1, 2]
        assert first.result() is None
        assert list(pool.map(abs, [-1, 2])) == [1, 2]


def test_images_are_generated_where_there_are_no_photographs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    photographs = import_module("photographs")
    monkeypatch.setattr(photographs, "DATA", tmp_path / "nowhere")
    found = photographs.photographs(tmp_path)
    assert "generated images" in found.about
    assert "random weights" in found.about
    data = read_image_folders(found.data)
    images = [image for split in data.images.values() for own in split for image in own]
    assert len(images) == found.n
    assert read_image(images[0]).size == photographs.SIZE
    assert all(read_descriptions(found.descriptions, data.names))
    assert found.backbone.n_patches == 196
