"""Measures launch geometries on the present GPU and writes kernels/configs/<GPU>.json: python bench/tune.py

Every candidate must first match the fp64 oracle; the fastest of a tile is kept. Exit 2 without a GPU.
"""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
import sys
import tempfile
from itertools import pairwise
from pathlib import Path

import torch
import triton
from spa_fast.kernels import BlockConfig, TileConfig, sinkhorn_fwd
from spa_fast.kernels._configs import FORMAT, path_of, read, tile_key
from spa_fast.kernels._tiles import in_registers, next_power_of_2, tile_configs

from spa_fast.reference import sinkhorn as reference

SIZES = [(4, 4), (16, 5), (16, 16), (32, 16), (32, 32), (64, 32), (196, 20), (256, 64), (256, 256)]
EPS, ITERATIONS = 0.1, 50

Config = TileConfig | BlockConfig


def candidates(K: int, M: int) -> list[Config]:
    """4 to 32 entries a lane in every shape of at most 8 warps, and blocks where a tile is large."""
    K2, M2 = next_power_of_2(K), next_power_of_2(M)
    found: list[Config] = []
    if in_registers(K, M):
        lanes = sorted({min(256, max(1, K2 * M2 // entries)) for entries in (4, 8, 16, 32)})
        found += [c for n in lanes if K2 * M2 // n <= 32 for c in tile_configs(K2, M2, n)]
    if K2 * M2 >= 4096:
        sizes = [n for n in (1024, 2048, 4096) if K2 <= n <= K2 * M2]
        found += [BlockConfig(warps, n) for n in sizes for warps in (4, 8) if n // (32 * warps) <= 16]
    return found


def write(path: Path, gpu: str, table: dict[str, Config], notes: dict[str, object]) -> None:
    """Checked by the reader before it takes the place of what was there."""
    content = {"format": FORMAT, "gpu": gpu, **notes}
    content["sinkhorn_fwd"] = {key: dataclasses.asdict(c) for key, c in table.items()}
    path.parent.mkdir(exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
    try:
        with os.fdopen(handle, "w") as file:
            file.write(json.dumps(content, indent=1) + "\n")
            file.flush()
            os.fsync(file.fileno())
        read(Path(name), gpu)
        os.replace(name, path)
    finally:
        Path(name).unlink(missing_ok=True)


def best(K: int, M: int) -> tuple[Config, float]:
    """The fastest candidate and its time in us, on 16 MiB of random costs."""
    P = max(64, (1 << 22) // (K * M))
    cost = 2 * torch.rand(P, K, M, device="cuda")
    a, b = torch.full((1, K), 1 / K, device="cuda"), torch.full((1, M), 1 / M, device="cuda")
    exact = [x.double() for x in (cost[:8], a, b)]
    want = reference.sinkhorn_fwd(*exact, EPS, ITERATIONS, 0.0, False)[0]
    times: dict[Config, float] = {}
    for config in candidates(K, M):
        try:
            got = sinkhorn_fwd(cost, a, b, EPS, ITERATIONS, 0.0, False, config)[0][:8]
        except triton.runtime.errors.OutOfResources as error:
            sys.stdout.write(f"  {config}: {error}\n")
            continue
        torch.testing.assert_close(
            got.double(), want, rtol=1e-5, atol=1e-5, msg=lambda m, c=config: f"{c}: {m}"
        )
        times[config] = measure(cost, a, b, config)
    winner = min(times, key=lambda c: times[c])
    return winner, times[winner]


def measure(cost: torch.Tensor, a: torch.Tensor, b: torch.Tensor, config: Config) -> float:
    """Median of 20 launches in us, by events."""
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(21)]
    for mark in marks:
        sinkhorn_fwd(cost, a, b, EPS, ITERATIONS, 0.0, False, config)
        mark.record()
    torch.cuda.synchronize()
    return 1e3 * statistics.median(x.elapsed_time(y) for x, y in pairwise(marks))


def main() -> int:
    if not torch.cuda.is_available():
        sys.stderr.write("bench/tune.py: no CUDA device, nothing to tune\n")
        return 2
    gpu = torch.cuda.get_device_name()
    table: dict[str, Config] = {}
    times: dict[str, float] = {}
    for K, M in SIZES:
        key = tile_key(K, M)
        table[key], times[key] = best(K, M)
        sys.stdout.write(f"{key}: {times[key]:.1f} us, {table[key]}\n")
    notes = {"torch": torch.__version__, "triton": triton.__version__, "microseconds": times}
    write(path_of(gpu), gpu, table, notes)
    sys.stdout.write(f"wrote {path_of(gpu)}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
