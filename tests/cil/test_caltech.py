"""Real photographs end to end; the data lies beside a development checkout and is not shipped."""

import json
import os
import zipfile
from pathlib import Path

import pytest

from spa_fast.cli import main

SHARED = Path(__file__).parents[2] / ".." / "shared"
DATA = SHARED / "data"

pytestmark = pytest.mark.skipif(
    not (DATA / "caltech101.zip").is_file(), reason="needs ../shared/data, which users do not have"
)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """One run per method over ten tasks of ten classes; features are extracted by the first."""
    root = tmp_path_factory.mktemp("caltech")
    with zipfile.ZipFile(DATA / "caltech101.zip") as archive:
        archive.extractall(root / "caltech101")
    rows = {}
    for method, extra in {
        "zero_shot": (),
        "simple_cil": (),
        "spa": (),
        "forgetful": ("--fusion-weight", "0", "--local-loss-weight", "0", "--pseudo-per-class", "0"),
    }.items():
        args = [
            "train",
            *("--method", "spa" if method == "forgetful" else method),
            *("--data", str(root / "caltech101"), "--backbone", f"local-dir:{DATA / 'deit_tiny_clip'}"),
            *("--descriptions", str(SHARED / "descriptions" / "caltech101.json")),
            *("--classnames", str(DATA / "caltech101_names.json")),
            *("--init-classes", "10", "--increment", "10", "--out", str(root / "runs" / method)),
        ]
        assert main([*args, *extra]) == 0
        rows[method] = json.loads((root / "runs" / method / "results.json").read_text())
    return root, rows


def test_anchors_match_known_figures(runs):
    """A deterministic pair: figures of an independent prototype on the same images and weights."""
    _, rows = runs
    for method, average, last in (("zero_shot", 48.6, 34.6), ("simple_cil", 93.8, 90.6)):
        assert abs(rows[method]["average"] - average) < 0.3, method
        assert abs(rows[method]["last"] - last) < 0.3, method


def test_spa_reaches_its_range_and_needs_its_pseudo_features(runs):
    _, rows = runs
    assert rows["spa"]["average"] >= 91
    assert rows["spa"]["last"] >= 86
    assert rows["forgetful"]["last"] < 50


def test_predict_names_a_photograph(runs, capsys):
    root, _ = runs
    image = root / "caltech101" / "test" / "accordion" / os.listdir(root / "caltech101/test/accordion")[0]
    assert main(["predict", str(root / "runs" / "spa"), str(image)]) == 0
    assert "accordion" in capsys.readouterr().out.splitlines()[1]
