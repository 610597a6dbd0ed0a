"""What every test runs under: fixed seeds, no TF32; `gpu` tests need a device, `slow` ones are opt-in."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import settings

# Tests import `tolerance` by name.
sys.path.insert(0, str(Path(__file__).parent))

torch.backends.cuda.matmul.allow_tf32 = False
torch.backends.cudnn.allow_tf32 = False

settings.register_profile("spa_fast", deadline=None, derandomize=True, max_examples=30)
settings.load_profile("spa_fast")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if (slow := item.get_closest_marker("slow")) and "slow" not in config.option.markexpr:
            item.add_marker(pytest.mark.skip(reason=slow.args[0]))
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="no CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)
