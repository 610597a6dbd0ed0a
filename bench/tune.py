"""Measures launch geometries on the present GPU and writes kernels/configs/<GPU>.json: python bench/tune.py

Every candidate must first match the fp64 oracle; of each operator and tile the fastest is kept. Exit 2
without a GPU.
"""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch
import triton
from spa_fast.kernels import BlockConfig, TileConfig, sinkhorn_bwd, sinkhorn_fwd
from spa_fast.kernels._configs import FORMAT, OPS, path_of, read, tile_key
from spa_fast.kernels._tiles import default_blocks, default_tile, in_registers, next_power_of_2, tile_configs

from spa_fast.reference import sinkhorn as reference

SIZES = [(4, 4), (16, 5), (16, 16), (32, 16), (32, 32), (64, 32), (196, 20), (256, 64), (256, 256)]
EPS, ITERATIONS = 0.1, 50

Config = TileConfig | BlockConfig


def candidates(op: str, K: int, M: int) -> list[Config]:
    """Forward: 4 to 32 entries a lane in every shape of at most 8 warps, with and without a bound on
    registers, and blocks where a tile is large. Backward: blocks of 2 to 16 entries a lane.
    """
    K2, M2 = next_power_of_2(K), next_power_of_2(M)
    found: list[Config] = []
    if op == "sinkhorn_fwd":
        if in_registers(K, M):
            lanes = sorted({min(256, max(1, K2 * M2 // entries)) for entries in (4, 8, 16, 32)})
            found += [c for n in lanes if K2 * M2 // n <= 32 for c in tile_configs(K2, M2, n)]
            found += [default_tile(K, M)] if default_tile(K, M) not in found else []
        if K2 * M2 >= 4096:
            sizes = [n for n in (1024, 2048, 4096) if K2 <= n <= K2 * M2]
            found += [BlockConfig(warps, n) for n in sizes for warps in (4, 8) if n // (32 * warps) <= 16]
        return found
    whole = 8192 if op == "sinkhorn_envelope" else K2 * M2
    sizes = [n for n in (256, 512, 1024, 2048, 4096) if max(K2, M2) <= n <= whole] or [K2 * M2]
    most = 8 if op == "sinkhorn_implicit" else 16
    found = [BlockConfig(w, n) for n in sizes for w in (1, 2, 4, 8) if 2 <= n // (32 * w) <= most]
    default = default_blocks(op, K, M)
    return found if default in found else [*found, default]


def write(path: Path, gpu: str, tables: dict[str, dict[str, Config]], notes: dict[str, object]) -> None:
    """Checked by the reader before it takes the place of what was there."""
    content = {"format": FORMAT, "gpu": gpu, **notes}
    content |= {op: {key: dataclasses.asdict(c) for key, c in table.items()} for op, table in tables.items()}
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


def best(op: str, K: int, M: int) -> tuple[Config, float]:
    """The fastest candidate and its time in us, on 16 MiB of random costs."""
    P = max(64, (1 << 22) // (K * M))
    cost = 2 * torch.rand(P, K, M, device="cuda")
    a, b = torch.full((1, K), 1 / K, device="cuda"), torch.full((1, M), 1 / M, device="cuda")
    mode = op.removeprefix("sinkhorn_")
    solved = sinkhorn_fwd(cost, a, b, EPS, ITERATIONS, 0.0, False)
    grad = torch.ones(P, device="cuda")

    def run(config: Config) -> torch.Tensor:
        if mode == "fwd":
            return sinkhorn_fwd(cost, a, b, EPS, ITERATIONS, 0.0, False, config=config)[0]
        return sinkhorn_bwd(grad, cost, a, b, *solved[1:4], EPS, False, mode, config=config)

    exact = [x.double() for x in (cost[:8], a, b)]
    want = reference.sinkhorn_fwd(*exact, EPS, ITERATIONS, 0.0, False)
    target, scale = want[0], 1.0
    if mode != "fwd":
        target = reference.sinkhorn_bwd(grad[:8].double(), *exact, *want[1:4], EPS, False, mode)
        scale = float(target.abs().max())
    times: dict[Config, float] = {}
    for config in candidates(op, K, M):
        try:
            got = run(config)[:8]
        except triton.runtime.errors.OutOfResources as error:
            sys.stdout.write(f"  {config}: {error}\n")
            continue
        torch.testing.assert_close(
            got.double(), target, rtol=1e-5, atol=1e-5 * scale, msg=lambda m, c=config: f"{c}: {m}"
        )
        times[config] = measure(partial(run, config))
    winner = min(times, key=lambda c: times[c])
    return winner, times[winner]


def measure(run: Callable[[], torch.Tensor]) -> float:
    """Median of 20 calls in us, by events."""
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(21)]
    for mark in marks:
        run()
        mark.record()
    torch.cuda.synchronize()
    return 1e3 * statistics.median(x.elapsed_time(y) for x, y in pairwise(marks))


def main() -> int:
    if not torch.cuda.is_available():
        sys.stderr.write("bench/tune.py: no CUDA device, nothing to tune\n")
        return 2
    gpu = torch.cuda.get_device_name()
    tables: dict[str, dict[str, Config]] = {op: {} for op in OPS}
    times: dict[str, dict[str, float]] = {op: {} for op in OPS}
    for op in OPS:
        for K, M in SIZES:
            key = tile_key(K, M)
            tables[op][key], times[op][key] = best(op, K, M)
            sys.stdout.write(f"{op} {key}: {times[op][key]:.1f} us, {tables[op][key]}\n")
    notes = {"torch": torch.__version__, "triton": triton.__version__, "microseconds": times}
    write(path_of(gpu), gpu, tables, notes)
    sys.stdout.write(f"wrote {path_of(gpu)}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
