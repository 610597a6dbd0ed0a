"""Packages, the CMake extension, and the policy of when to build it: SPA_FAST_NATIVE=auto|on|off.

auto builds where a compiler is found and goes on in pure Python otherwise, on fails loudly, off skips. CUDA
sources are compiled too where nvcc is found; under auto their failure costs the CUDA part only. What is left
out is printed with the reason, which spa_fast/_native_build.json keeps for native_info().
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
RECORD = "_native_build.json"
POLICY = os.environ.get("SPA_FAST_NATIVE", "auto")
if POLICY not in ("auto", "on", "off"):
    sys.exit(f"SPA_FAST_NATIVE: expected auto, on or off, got {POLICY!r}")
# cmake and ninja from PyPI lie beside a Python whose environment need not be activated.
os.environ["PATH"] = os.pathsep.join([os.environ.get("PATH", os.defpath), os.path.dirname(sys.executable)])


def missing_tool() -> str | None:
    """Return why native code cannot be built here, None where nothing is known to be missing."""
    if POLICY == "off":
        return "switched off by SPA_FAST_NATIVE=off"
    compilers = os.environ["CXX"].split()[:1] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    if not any(map(shutil.which, compilers)):
        return f"no C++ compiler found ({', '.join(compilers)})"
    if not shutil.which("cmake"):
        return "cmake not found"
    try:
        import pybind11  # noqa: F401
    except ImportError:
        return "pybind11 is not installed"
    return None


class BuildPython(build_py):
    def run(self) -> None:
        super().run()
        if MISSING:
            record(ROOT if self.editable_mode else Path(self.build_lib), MISSING)


class BuildNative(build_ext):
    def run(self) -> None:
        target = ROOT if self.inplace else Path(self.build_lib)
        try:
            try:
                cuda_reason = self.cmake(cuda=True)
            except subprocess.CalledProcessError as error:
                if POLICY == "on":
                    raise
                self.cmake(cuda=False)
                cuda_reason = f"the CUDA build failed: {cause(error)}"
        except (OSError, subprocess.CalledProcessError) as error:
            if POLICY == "on":
                raise
            record(target, f"the build failed: {cause(error)}")
        else:
            record(target, None, cuda_reason)

    def cmake(self, cuda: bool) -> str | None:
        """Build and install the extension; return why it is without CUDA."""
        import pybind11

        # --fresh: a cache from another build environment remembers tools that are gone.
        build = Path(self.build_temp).resolve() / "cmake"
        configure = [
            *("cmake", "--fresh", "-S", str(ROOT), "-B", str(build)),
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DSPA_FAST_VERSION={self.distribution.get_version()}",
            f"-DSPA_FAST_CUDA={'ON' if cuda else 'OFF'}",
            *(["-G", "Ninja"] if shutil.which("ninja") else []),
        ]
        printed = run(configure)
        run(["cmake", "--build", str(build), "--target", "_C", "--parallel"])
        destination = Path(self.get_ext_fullpath("spa_fast._C"))
        destination.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(build / destination.name, destination)
        return next((line.partition("Without CUDA: ")[2] for line in printed if "Without CUDA" in line), None)


def run(command: list[str]) -> list[str]:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    sys.stdout.write(done.stdout)
    done.check_returncode()
    return done.stdout.splitlines()


def cause(error: OSError | subprocess.CalledProcessError) -> str:
    output = (getattr(error, "output", None) or "").strip().splitlines()
    return next((line for line in output if "error" in line.lower()), str(error)).strip()


def record(root: Path, reason: str | None, cuda_reason: str | None = None) -> None:
    package = root / "spa_fast"
    package.mkdir(parents=True, exist_ok=True)
    kept = {"built": reason is None, "reason": reason, "cuda_reason": cuda_reason}
    (package / RECORD).write_text(json.dumps(kept) + "\n")
    if reason:
        for stale in package.glob("_C.*"):
            stale.unlink()
        sys.stderr.write(f"spa_fast: pure Python, without native code: {reason}\n")
    elif cuda_reason:
        sys.stderr.write(f"spa_fast: native code without CUDA: {cuda_reason}\n")


def files(pattern: str) -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for path in ROOT.glob(pattern))


MISSING = missing_tool()
if MISSING and POLICY == "on":
    sys.exit(f"SPA_FAST_NATIVE=on: {MISSING}")

# The lists only tell an sdist what to carry: CMake knows what to compile.
native = Extension(
    "spa_fast._C",
    sources=files("csrc/**/*.cpp"),
    depends=["CMakeLists.txt", *files("csrc/**/*.h"), *files("csrc/**/*.cu")],
)
setup(
    packages=[*find_packages(include=["spa_fast", "spa_fast.*"]), "spa_fast.kernels"],
    package_dir={"spa_fast.kernels": "kernels"},
    package_data={
        "spa_fast": ["py.typed", "cil/demo/tiny_clip/*", "cil/data/*.json", "cil/descriptions/*.json"],
        "spa_fast.kernels": ["configs/*.json"],
    },
    ext_modules=[] if MISSING else [native],
    cmdclass={"build_py": BuildPython, "build_ext": BuildNative},
)
