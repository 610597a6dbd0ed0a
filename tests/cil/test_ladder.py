import json
import shlex

import pytest
from PIL import Image

from spa_fast.cil.checkpoint import new_run_folder
from spa_fast.cil.demo.ladder import FILES, keep_run, ladder, run_demo
from spa_fast.cil.errors import RunError
from spa_fast.cli import main


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    out, lines = tmp_path_factory.mktemp("runs") / "demo", []
    return out, run_demo(out, range(900, 901), lines.append), lines


def test_every_step_is_reported(demo):
    out, results, lines = demo
    assert json.loads((out / "results.json").read_text()) == results
    assert [row["method"] for row in results["rows"]] == list(ladder())
    for row in results["rows"]:
        assert row["seeds"] == [900]
        assert row["average_spread"] == row["last_spread"] == 0.0
        assert len(row["accuracies"]) == len(row["matrix"]) == 5
        assert row["method"] in lines[0]
    files = {p.name for p in out.iterdir()}
    assert files == {
        *("results.json", "metrics.jsonl", "results.csv", "curve.png"),
        *("overlay_0.png", "overlay_1.png", "world.png"),
    }
    assert len((out / "metrics.jsonl").read_text().splitlines()) == 5 * len(ladder())


def test_no_step_saturates_and_pseudo_features_matter(demo):
    rows = {row["method"]: row for row in demo[1]["rows"]}
    assert all(row["average"] < 92 for row in rows.values())
    full, forgetful = rows["SPA + selection, OT"], rows["SPA without pseudo-features"]
    assert full["forgetting"] < forgetful["forgetting"] - 30
    assert full["average"] > rows["zero-shot by name"]["average"] + 30


@pytest.mark.parametrize("name", ["notes.txt", "model.safetensors"])
def test_only_an_earlier_demo_is_replaced(tmp_path, name):
    (tmp_path / "results.json").write_text("{}")
    with new_run_folder(tmp_path, replaceable=FILES) as folder:
        (folder / "curve.png").write_text("new")
    assert [p.name for p in tmp_path.iterdir()] == ["curve.png"]
    (tmp_path / name).write_text("keep")
    with pytest.raises(RunError, match="not an empty folder"):
        run_demo(tmp_path, range(1), lambda line: None)
    assert (tmp_path / name).read_text() == "keep"


def test_an_earlier_demo_survives_a_failing_one(tmp_path):
    (tmp_path / "results.json").write_text("old")
    with pytest.raises(KeyboardInterrupt), new_run_folder(tmp_path, replaceable=FILES):
        raise KeyboardInterrupt
    assert (tmp_path / "results.json").read_text() == "old"
    assert not list(tmp_path.parent.glob(".*.partial"))


def test_a_kept_run_can_be_used_by_who_has_no_images(tmp_path, capsys):
    folder, lines = tmp_path / "my demo", []
    keep_run(folder, 900, lines.append)
    command, picture = lines[-1].partition("spa-fast ")[2], folder / "why.png"
    assert main(shlex.split(command)) == 0
    with Image.open(picture) as image:
        assert image.width > 2 * image.height
    assert "rank " in capsys.readouterr().out
    row = json.loads((folder / "run" / "results.json").read_text())
    assert main(["eval", str(folder / "run")]) == 0
    assert f"{row['last']:.2f} % of 500 images (stored: {row['last']:.2f} %)" in capsys.readouterr().out


def test_what_is_kept_overwrites_nothing(tmp_path, capsys):
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "notes.txt").write_text("mine")
    assert main(["demo", "--out", str(tmp_path / "demo"), "--keep", str(tmp_path / "kept")]) == 2
    assert f"--keep: {tmp_path / 'kept'} exists" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
