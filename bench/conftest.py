"""What every benchmark runs under: its folder importable, no TF32, machine and versions in the record."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch

# Benchmarks import `cases`, `measure` and `peers` by name.
sys.path.insert(0, str(Path(__file__).parent))

torch.backends.cuda.matmul.allow_tf32 = False

NOT_MEASURED = pytest.StashKey[list[dict[str, str]]]()
PACKAGES = ("spa_fast", "torch", "triton", "numpy", "POT", "geomloss", "ott-jax", "jax")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[NOT_MEASURED] = []


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    for private in ("node", "release", "python_build"):
        machine_info.pop(private, None)
    machine_info.get("cpu", {}).pop("flags", None)
    cpu = machine_info.get("cpu", {}).get("brand_raw") or machine_info.get("machine", "CPU")
    machine_info["torch"] = torch.__version__
    machine_info["cpu_capability"] = torch.backends.cpu.get_cpu_capability()
    machine_info["cuda"] = torch.cuda.is_available()
    machine_info["device"] = (
        torch.cuda.get_device_name() if torch.cuda.is_available() else f"{cpu}, {os.cpu_count()} cores"
    )
    machine_info["versions"] = {name: found for name in PACKAGES if (found := _version(name))}


def pytest_benchmark_update_json(config: pytest.Config, output_json: dict[str, Any]) -> None:
    output_json["not_measured"] = config.stash[NOT_MEASURED]
    output_json["load_average"] = os.getloadavg()[0]
    for row in output_json["benchmarks"]:
        row["stats"].pop("data", None)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


@pytest.fixture
def not_measured(request: pytest.FixtureRequest) -> Callable[[str, str, str], NoReturn]:
    """Skips, and leaves (group, backend, reason, file) in the record."""

    def skip(group: str, backend: str, reason: str) -> NoReturn:
        row = {"group": group, "backend": backend, "reason": reason, "file": request.path.name}
        request.config.stash[NOT_MEASURED].append(row)
        pytest.skip(f"not measured: {reason}")

    return skip


@pytest.fixture
def one_thread() -> Iterator[None]:
    """One intra-op thread, which is what ratios are taken at."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
