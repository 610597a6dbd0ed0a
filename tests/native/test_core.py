"""csrc by itself: its tests through cmake and ctest, plain and under the sanitizers."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# cmake and ninja from PyPI lie beside a Python whose environment need not be activated.
PATH = os.pathsep.join([os.environ["PATH"], str(Path(sys.executable).parent)])
CXX = os.environ.get("CXX", "c++").split()[0]


def run(*command: str) -> str:
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**os.environ, "PATH": PATH}
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def sanitizers_work(folder: Path) -> bool:
    source = folder / "empty.cpp"
    source.write_text("int main() {}\n")
    command = [CXX, "-fsanitize=address,undefined", str(source), "-o", str(folder / "empty")]
    return (
        subprocess.run(command, capture_output=True).returncode == 0
        and not subprocess.run([folder / "empty"]).returncode
    )


@pytest.mark.skipif(not shutil.which(CXX), reason="no C++ compiler")
@pytest.mark.skipif(not shutil.which("cmake", path=PATH), reason="no cmake")
@pytest.mark.parametrize("sanitize", [False, True], ids=["release", "sanitize"])
def test_core(tmp_path: Path, sanitize: bool) -> None:
    if sanitize and not sanitizers_work(tmp_path):
        pytest.skip("the compiler has no address and undefined-behaviour sanitizers")
    generator = ["-G", "Ninja"] if shutil.which("ninja", path=PATH) else []
    build = str(tmp_path / "build")
    options = [
        "-DSPA_FAST_TESTS=ON",
        "-DSPA_FAST_CUDA=OFF",
        f"-DSPA_FAST_SANITIZE={'ON' if sanitize else 'OFF'}",
    ]
    run("cmake", "-S", str(ROOT), "-B", build, *generator, *options)
    targets = ("core_test", "patches_test", "gaussian_test")
    compiled = run("cmake", "--build", build, "--target", *targets, "--parallel")
    assert "warning:" not in compiled, compiled
    run("ctest", "--test-dir", build, "--output-on-failure")
