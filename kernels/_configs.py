"""Launch geometries measured on a GPU: configs/<GPU>.json, written by bench/tune.py, read where present."""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import torch

from ._tiles import (
    MAX_REGISTERS,
    MAX_SIDE,
    BlockConfig,
    TileConfig,
    in_registers,
    next_power_of_2,
    sizes,
)

FOLDER = Path(__file__).parent / "configs"
FORMAT = 1
OPS = ("sinkhorn_fwd", "sinkhorn_envelope", "sinkhorn_implicit", "sinkhorn_unroll")

Table = dict[str, TileConfig | BlockConfig]


def tuned(cost: torch.Tensor, op: str) -> Any:
    """The geometry measured for this operator, tile and GPU: a `TileConfig` or `BlockConfig`, or None."""
    if not cost.is_cuda:
        return None
    _, K, _, M = sizes(cost)
    return _tables(cost.device.index).get(op, {}).get(tile_key(K, M))


def tile_key(K: int, M: int) -> str:
    """Padded sizes, so that a new K or M within them is the same entry."""
    return f"{next_power_of_2(K)}x{next_power_of_2(M)}"


def path_of(gpu: str) -> Path:
    return FOLDER / f"{re.sub(r'[^A-Za-z0-9]+', '_', gpu).strip('_')}.json"


@cache
def _tables(device: int) -> dict[str, Table]:
    gpu = torch.cuda.get_device_name(device)
    path = path_of(gpu)
    return read(path, gpu) if path.is_file() else {}


def read(path: Path, gpu: str) -> dict[str, Table]:
    """Tables by operator and tile.

    Raises:
        ValueError: not written for this GPU in this format, or a geometry that no kernel can have.
    """
    try:
        content = json.loads(path.read_text())
        if content["format"] != FORMAT or content["gpu"] != gpu:
            raise ValueError(f"expected format {FORMAT} for {gpu!r}")
        return {op: {key: _entry(op, key, c) for key, c in content[op].items()} for op in OPS}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: {error!r}; remove it or run bench/tune.py again") from error


def _entry(op: str, key: str, fields: dict[str, Any]) -> TileConfig | BlockConfig:
    match = re.fullmatch(r"(\d+)x(\d+)", key)
    K2, M2 = (int(n) for n in match.groups()) if match else (0, 0)
    if not all(1 <= n <= MAX_SIDE and n & (n - 1) == 0 for n in (K2, M2)):
        raise ValueError(f"{key!r} is no padded tile")
    config = BlockConfig(**fields) if "entries" in fields else TileConfig(**fields)
    numbers = [n for name, n in fields.items() if name != "registers"]
    if not all(type(n) is int and n >= 1 and n & (n - 1) == 0 for n in numbers) or config.num_warps > 16:
        raise ValueError(f"{key}: expected powers of two and at most 16 warps, got {fields}")
    registers = config.registers
    if type(registers) is not int or not 32 <= registers <= min(MAX_REGISTERS, 2048 // config.num_warps):
        raise ValueError(f"{key}: expected 32 to {MAX_REGISTERS} registers, 2048 by all warps, got {fields}")
    if isinstance(config, TileConfig):
        lanes = config.lanes_k * config.lanes_m
        if op != "sinkhorn_fwd":
            raise ValueError(f"{key}: {op} passes over blocks of entries, got {fields}")
        if not in_registers(K2, M2) or config.lanes_k > K2 or config.lanes_m > M2:
            raise ValueError(f"{key}: {fields} has more lanes than the tile, or the tile is too large for it")
        if config.block_p * lanes != 32 * config.num_warps:
            raise ValueError(f"{key}: expected block_p * lanes_k * lanes_m = 32 * num_warps, got {fields}")
    elif op == "sinkhorn_envelope":
        if not M2 <= config.entries <= 8192:
            raise ValueError(f"{key}: expected {M2} to 8192 entries, got {fields}")
    elif not K2 <= config.entries <= K2 * M2:
        raise ValueError(f"{key}: expected {K2} to {K2 * M2} entries, got {fields}")
    return config
