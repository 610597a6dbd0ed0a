"""Runs the cases of this folder in a process of their own under Triton's interpreter, on CPU tensors."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="this process is the interpreter's")
def test_kernels_under_the_interpreter(capsys: pytest.CaptureFixture[str]) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", str(HERE)]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, cwd=HERE.parents[1], env=environment, capture_output=True, text=True)
    with capsys.disabled():
        sys.stdout.write(f"\n  under TRITON_INTERPRET=1: {run.stdout.strip().splitlines()[-1]}\n  ")
    assert run.returncode == 0, run.stdout + run.stderr
    assert int(re.search(r"(\d+) passed", run.stdout).group(1)) > 0
