"""Wheels: what they carry, and that pure Python is a choice that is told."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PARTS = (
    "pyproject.toml",
    "setup.py",
    "CMakeLists.txt",
    "README.md",
    "LICENSE",
    "NOTICE",
    "spa_fast",
    "kernels",
    "csrc",
)


def build_wheel(folder: Path, **environment: str) -> tuple[Path, str]:
    """Build a wheel from a copy of the tree; return it unpacked, and what the build printed."""
    tree = folder / "tree"
    tree.mkdir()
    leftovers = shutil.ignore_patterns("*.so", "__pycache__", "_native_build.json")
    for part in PARTS:
        if (ROOT / part).is_dir():
            shutil.copytree(ROOT / part, tree / part, ignore=leftovers)
        else:
            shutil.copy(ROOT / part, tree / part)
    command = [sys.executable, "setup.py", "-q", "bdist_wheel", "-d", str(folder)]
    done = subprocess.run(
        command,
        cwd=tree,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, **environment},
    )
    assert done.returncode == 0, done.stdout
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "unpacked")
    return folder / "unpacked", done.stdout


def native_info(package: Path) -> dict[str, object]:
    code = "import json; from spa_fast._native import native_info; print(json.dumps(native_info()))"
    # -P and -S: neither the folder the tests run in nor an editable installation may lend its extension.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(package), sysconfig.get_path("purelib")])}
    command = [sys.executable, "-P", "-S", "-c", code]
    return json.loads(subprocess.check_output(command, env=environment, text=True, cwd=package))


def tools_without_compiler(folder: Path) -> str:
    """Return a PATH on which cmake is found and no compiler."""
    folder.mkdir()
    for tool in ("cmake", "ninja"):
        found = shutil.which(tool) or str(Path(sys.executable).parent / tool)
        if os.path.exists(found):
            (folder / tool).symlink_to(found)
    return str(folder)


def check_layout(package: Path) -> None:
    assert (package / "spa_fast/kernels/__init__.py").is_file()
    assert (package / "spa_fast/py.typed").is_file()
    assert (package / "spa_fast/cil/demo/tiny_clip/open_clip_model.safetensors").is_file()
    assert (package / "spa_fast/cil/data/templates.json").is_file()
    assert len(list((package / "spa_fast/cil/descriptions").glob("*.json"))) == 10
    assert not (package / "kernels").exists()
    assert sorted(path.name for path in package.iterdir() if not path.name.endswith(".dist-info")) == [
        "spa_fast"
    ]


def test_wheel_switched_off(tmp_path: Path) -> None:
    package, _ = build_wheel(tmp_path, SPA_FAST_NATIVE="off")
    check_layout(package)
    assert not list(package.rglob("*.so"))
    assert native_info(package) == {"available": False, "reason": "switched off by SPA_FAST_NATIVE=off"}


def test_wheel_without_compiler(tmp_path: Path) -> None:
    path = tools_without_compiler(tmp_path / "bin")
    package, printed = build_wheel(tmp_path, SPA_FAST_NATIVE="auto", CXX="", PATH=path)
    check_layout(package)
    assert not list(package.rglob("*.so"))
    assert "no C++ compiler found" in printed
    assert "no C++ compiler found" in str(native_info(package)["reason"])


@pytest.mark.skipif(not shutil.which("false"), reason="no program to stand for a broken compiler")
def test_wheel_with_broken_compiler(tmp_path: Path) -> None:
    package, printed = build_wheel(tmp_path, SPA_FAST_NATIVE="auto", CXX="false")
    check_layout(package)
    assert not list(package.rglob("*.so"))
    assert "pure Python" in printed
    assert "the build failed" in str(native_info(package)["reason"])


@pytest.mark.skipif(not (shutil.which("c++") or os.environ.get("CXX")), reason="no C++ compiler")
def test_wheel_with_compiler(tmp_path: Path) -> None:
    package, _ = build_wheel(tmp_path, SPA_FAST_NATIVE="on")
    check_layout(package)
    info = native_info(package)
    assert info["available"], info
    assert info["version"] == version("spa_fast")
    if shutil.which("nvcc"):
        assert info["cuda_archs"] == ["sm_80", "sm_90", "sm_100"]


@pytest.mark.skipif(not (shutil.which("c++") or os.environ.get("CXX")), reason="no C++ compiler")
def test_no_cuda_compiler_is_told(tmp_path: Path) -> None:
    folder = str(Path(sys.executable).parent)
    environment = {
        **os.environ,
        "CUDACXX": str(tmp_path / "missing"),
        "PATH": os.pathsep.join([os.environ["PATH"], folder]),
    }
    command = ["cmake", "-S", str(ROOT), "-B", str(tmp_path / "build")]
    printed = subprocess.check_output(command, env=environment, text=True)
    assert "Without CUDA: no working CUDA compiler found" in printed


@pytest.mark.skipif(not shutil.which("nvcc"), reason="no CUDA compiler")
def test_wheel_where_cuda_does_not_compile(tmp_path: Path) -> None:
    # The compiler works; what our sources make of this name does not.
    package, printed = build_wheel(tmp_path, SPA_FAST_NATIVE="auto", CUDAFLAGS="-DGaussianArgs=1")
    info = native_info(package)
    assert info["available"], info
    assert info["cuda_archs"] == []
    assert "the CUDA build failed" in str(info["cuda_reason"])
    assert "native code without CUDA" in printed


def test_on_fails_loudly(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "setup.py"), "--version"]
    path = tools_without_compiler(tmp_path / "bin")
    environment = {**os.environ, "SPA_FAST_NATIVE": "on", "CXX": "", "PATH": path}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode != 0
    assert "SPA_FAST_NATIVE=on: no C++ compiler found" in done.stderr
