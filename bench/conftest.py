"""What every benchmark runs under: its folder importable, no TF32, machine and versions in the record."""

from __future__ import annotations

import platform
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

# Benchmarks import `cases` by name.
sys.path.insert(0, str(Path(__file__).parent))

torch.backends.cuda.matmul.allow_tf32 = False


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    machine_info["torch"] = torch.__version__
    machine_info["cpu_capability"] = torch.backends.cpu.get_cpu_capability()
    machine_info["device"] = (
        torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor()
    )


@pytest.fixture
def one_thread() -> Any:
    """One intra-op thread, which is what ratios are taken at."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
