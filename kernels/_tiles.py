"""How problems are spread over programs, warps and lanes: an analytic choice by tile size alone.

One choice serves sm_80, sm_90 and sm_100: all have 65536 registers an SM, at most 255 a thread and warps of
32, and those limits, not the arithmetic, decide. Compiled for each, no default spills. What a GPU prefers
beyond that is measured by bench/tune.py and read back by `_configs`.
"""

from __future__ import annotations

from dataclasses import dataclass

# Entries of a padded tile. 32 a lane take about 225 registers; 16384 entries would need 16 warps, where a
# thread has 128 registers, and spill.
MAX_TILE = 8192
# Longest side of a problem.
MAX_SIDE = 256
# Named to ptxas, which otherwise aims at 128 by itself for some tiles and spills to get there.
MAX_REGISTERS = 255


@dataclass(frozen=True)
class TileConfig:
    """Launch geometry of one kernel, powers of two all: block_p * lanes_k * lanes_m = 32 * num_warps.

    A program owns block_p problems; each is spread over lanes_k x lanes_m lanes and their registers.
    """

    num_warps: int
    block_p: int
    lanes_k: int
    lanes_m: int


@dataclass(frozen=True)
class BlockConfig:
    """Launch geometry of a kernel that passes over a problem in blocks of `entries`, a power of two."""

    num_warps: int
    entries: int


def next_power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()


def in_registers(K: int, M: int) -> bool:
    """Whether a K x M problem, padded to powers of two, fits the registers of one program."""
    return next_power_of_2(K) * next_power_of_2(M) <= MAX_TILE


def default_config(K: int, M: int) -> TileConfig:
    """16 entries a lane up to one warp, 32 beyond; lanes shaped for the fewest shuffles per iteration.

    A thread's rows are summed over lanes_m and its columns over lanes_k.
    """
    if not in_registers(K, M):
        raise ValueError(f"K x M padded to powers of two must have at most {MAX_TILE} entries, got {K} x {M}")
    K2, M2 = next_power_of_2(K), next_power_of_2(M)
    lanes = max(1, K2 * M2 // (16 if K2 * M2 <= 512 else 32))
    return min(tile_configs(K2, M2, lanes), key=lambda c: _shuffles(c, K2, M2))


def tile_configs(K2: int, M2: int, lanes: int) -> list[TileConfig]:
    """Every way to shape `lanes` lanes a problem, the fewest along M first."""
    choices = [1 << s for s in range(9) if lanes % (1 << s) == 0 and 1 << s <= M2 and lanes >> s <= K2]
    return [TileConfig(max(1, lanes // 32), max(1, 32 // lanes), lanes // m, m) for m in choices]


def _shuffles(c: TileConfig, K2: int, M2: int) -> int:
    rows = K2 // c.lanes_k * (c.lanes_m.bit_length() - 1)
    return rows + M2 // c.lanes_m * (c.lanes_k.bit_length() - 1)


def default_blocks(K: int, M: int, limit: int, per_warp: int) -> BlockConfig:
    """The whole problem, or `limit` entries of it at a time; at most 8 warps, where a thread has 255
    registers."""
    entries = min(next_power_of_2(K) * next_power_of_2(M), limit)
    return BlockConfig(min(8, max(1, entries // per_warp)), entries)
