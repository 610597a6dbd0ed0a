"""The scripts under examples/ run as they stand."""

import re
import subprocess
import sys
from pathlib import Path

from spa_fast.cil.demo.ladder import CHECKPOINT
from spa_fast.cil.demo.world import write_dataset

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(name, *args, cwd):
    command = [sys.executable, str(EXAMPLES / name), *map(str, args)]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_method_on_one_page(tmp_path):
    world = tmp_path / "world"
    write_dataset(world, 0, train_per_class=6, test_per_class=4)
    files = (world / "descriptions.json", world / "names.json")
    said = run("train_spa.py", world, f"local-dir:{CHECKPOINT}", *files, cwd=tmp_path)
    average = re.search(r"average ([\d.]+) %, last ([\d.]+) %", said)
    assert float(average[1]) > 20, "chance is 4 to 10 %"


def test_sinkhorn_align(tmp_path):
    assert "all converged: True" in run("sinkhorn_align.py", cwd=tmp_path)
