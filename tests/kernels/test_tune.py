"""bench/tune.py and what reads its outcome, without a GPU."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from spa_fast.kernels import BlockConfig, TileConfig, _configs, sinkhorn_bwd, sinkhorn_fwd

SCRIPT = Path(__file__).parents[2] / "bench" / "tune.py"
GPU = "NVIDIA Test 80GB/PCIe"


@pytest.fixture(scope="module")
def tune() -> ModuleType:
    spec = importlib.util.spec_from_file_location("tune", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def table(tune: ModuleType) -> dict[str, Any]:
    """For every operator one candidate a tile."""
    return {
        op: {_configs.tile_key(K, M): tune.candidates(op, K, M)[-1] for K, M in tune.SIZES}
        for op in _configs.OPS
    }


@pytest.mark.parametrize("op", _configs.OPS)
def test_candidates_are_what_a_kernel_can_have(tune: ModuleType, op: str) -> None:
    for K, M in tune.SIZES:
        found = tune.candidates(op, K, M)
        assert 1 <= len(found) == len(set(found)) <= 40
        for config in found:
            assert _configs._entry(op, _configs.tile_key(K, M), vars(config)) == config
            assert config.num_warps <= 8
    of_tile = TileConfig if op == "sinkhorn_fwd" else BlockConfig
    assert {type(c) for c in tune.candidates(op, 32, 16)} == {of_tile}
    assert {type(c) for c in tune.candidates(op, 256, 256)} == {BlockConfig}


def test_what_is_written_is_read_back(tune: ModuleType, table: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "configs" / "x.json"
    for _ in range(2):
        tune.write(path, GPU, table, {"microseconds": {}})
    assert _configs.read(path, GPU) == table
    assert [p.name for p in path.parent.iterdir()] == ["x.json"]
    assert _configs.path_of(GPU).name == "NVIDIA_Test_80GB_PCIe.json"


def test_a_failed_write_leaves_the_old_table_whole(
    tune: ModuleType, table: dict[str, Any], tmp_path: Path
) -> None:
    path = tmp_path / "x.json"
    tune.write(path, GPU, table, {})
    before = path.read_bytes()
    with pytest.raises(ValueError, match="32 \\* num_warps"):
        tune.write(path, GPU, table | {"sinkhorn_fwd": {"32x16": TileConfig(4, 1, 4, 4)}}, {})
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"gpu": "another"}, "for 'NVIDIA Test"),
        ({"format": 0}, "format 1"),
        ({"sinkhorn_fwd": {"32x16": {"num_warps": 1, "block_p": 1, "lanes_k": 64, "lanes_m": 1}}}, "lanes"),
        ({"sinkhorn_fwd": {"32x16": {"num_warps": 3, "entries": 512}}}, "powers of two"),
        ({"sinkhorn_fwd": {"32x16": {"num_warps": "1", "entries": 512}}}, "powers of two"),
        ({"sinkhorn_fwd": {"32x16": {"num_warps": 1, "entries": 1024}}}, "expected 32 to 512"),
        ({"sinkhorn_fwd": {"33x16": {"num_warps": 1, "entries": 512}}}, "no padded tile"),
        ({"sinkhorn_fwd": {"32x16": {"num_warps": 1, "entries": 512, "extra": 1}}}, "extra"),
        ({"sinkhorn_fwd": {"32x16": {"num_warps": 1, "entries": 512, "registers": 256}}}, "32 to 255"),
        ({"sinkhorn_fwd": {"32x16": {"num_warps": 16, "entries": 512, "registers": 160}}}, "2048"),
        (
            {"sinkhorn_unroll": {"32x16": {"num_warps": 1, "block_p": 1, "lanes_k": 8, "lanes_m": 4}}},
            "blocks",
        ),
        ({"sinkhorn_envelope": {"32x16": {"num_warps": 1, "entries": 8}}}, "16 to 8192"),
        ({"sinkhorn_fwd": {"32x16": 7}}, "TypeError"),
        ({"sinkhorn_fwd": []}, "AttributeError"),
    ],
)
def test_a_broken_table_is_refused_by_name(tmp_path: Path, change: dict[str, Any], why: str) -> None:
    path = tmp_path / "x.json"
    path.write_text(json.dumps({"format": 1, "gpu": GPU} | {op: {} for op in _configs.OPS} | change))
    with pytest.raises(ValueError, match=why) as error:
        _configs.read(path, GPU)
    assert str(path) in str(error.value)
    path.write_text("{")
    with pytest.raises(ValueError, match=r"bench/tune\.py"):
        _configs.read(path, GPU)


def test_a_tensor_off_the_gpu_takes_the_default() -> None:
    assert _configs.tuned(torch.empty(1, 32, 16), "sinkhorn_fwd") is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a CUDA device")
def test_tune_without_a_gpu_exits_2_with_one_line() -> None:
    run = subprocess.run([sys.executable, SCRIPT], capture_output=True, text=True)
    assert run.returncode == 2
    assert run.stderr == "bench/tune.py: no CUDA device, nothing to tune\n"
    assert run.stdout == ""


@pytest.mark.gpu
def test_every_candidate_matches_on_a_device(tune: ModuleType) -> None:
    cost = torch.rand(9, 32, 16, device="cuda")
    a, b = torch.full((1, 32), 1 / 32, device="cuda"), torch.full((1, 16), 1 / 16, device="cuda")
    want = sinkhorn_fwd(cost, a, b, 0.1, 20, 0.0, False)
    for config in tune.candidates("sinkhorn_fwd", 32, 16):
        for x, y in zip(sinkhorn_fwd(cost, a, b, 0.1, 20, 0.0, False, config=config), want, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)
    grad = torch.ones(9, device="cuda")
    for mode in ("envelope", "implicit", "unroll"):
        run = (grad, cost, a, b, *want[1:4], 0.1, False, mode)
        for config in tune.candidates(f"sinkhorn_{mode}", 32, 16):
            torch.testing.assert_close(
                sinkhorn_bwd(*run, config=config), sinkhorn_bwd(*run), rtol=1e-4, atol=1e-6
            )
