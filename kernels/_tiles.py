"""How problems are spread over programs, warps and lanes: an analytic choice by tile size alone.

One choice serves sm_80, sm_90 and sm_100: all have 65536 registers an SM, at most 255 a thread and warps of
32, and those limits, not the arithmetic, decide. Compiled for each, no default spills. What a GPU prefers
beyond that is measured by bench/tune.py and read back by `_configs`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

# Entries of a padded tile. 32 a lane take about 225 registers; 16384 entries would need 16 warps, where a
# thread has 128 registers, and spill.
MAX_TILE = 8192
# Longest side of a problem.
MAX_SIDE = 256
# A program's first problem and all of its own are numbered in 32 bits; offsets are computed in 64.
MAX_PROBLEMS = (1 << 31) - 1024
# Named to ptxas, which otherwise aims at 128 by itself for some tiles and spills to get there.
MAX_REGISTERS = 255

# Entries of a block and of a lane. Twice as many a lane spill, but for the envelope: there 8 take at most 90
# registers, so that five programs an SM hide the latency of memory. implicit computes in fp64.
_BLOCKS = {
    "sinkhorn_fwd": (4096, 16),
    "sinkhorn_envelope": (1024, 8),
    "sinkhorn_implicit": (2048, 8),
    "sinkhorn_unroll": (2048, 8),
}


@dataclass(frozen=True)
class TileConfig:
    """Launch geometry of one kernel, powers of two all: block_p * lanes_k * lanes_m = 32 * num_warps.

    A program owns block_p problems; each is spread over lanes_k x lanes_m lanes and their registers, of which
    a thread has at most `registers` (the kernel of the value: any number).
    """

    num_warps: int
    block_p: int
    lanes_k: int
    lanes_m: int
    registers: int = MAX_REGISTERS


@dataclass(frozen=True)
class BlockConfig:
    """Launch geometry of a kernel that passes over a problem in blocks of `entries`, a power of two."""

    num_warps: int
    entries: int
    registers: int = MAX_REGISTERS

    def columns(self, K2: int, M2: int) -> int:
        """Of a block that holds all K2 rows."""
        return max(1, min(M2, self.entries // K2))


def sizes(cost: torch.Tensor) -> tuple[int, int, int, int]:
    """P, K, C, M of [B, K, C, M], with P = B * C, or of [P, K, M], which has C = 1."""
    if cost.dim() == 4:
        B, K, C, M = cost.shape
        P = B * C
    else:
        P, K, M = cost.shape
        C = 1
    if P > MAX_PROBLEMS:
        raise ValueError(f"cost: expected at most {MAX_PROBLEMS} problems, got {P}")
    return P, K, C, M


def next_power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()


def in_registers(K: int, M: int) -> bool:
    """Whether a K x M problem, padded to powers of two, fits the registers of one program."""
    return next_power_of_2(K) * next_power_of_2(M) <= MAX_TILE


def default_fwd(K: int, M: int) -> TileConfig | BlockConfig:
    return default_tile(K, M) if in_registers(K, M) else default_blocks("sinkhorn_fwd", K, M)


def default_tile(K: int, M: int) -> TileConfig:
    """16 entries a lane up to one warp, 32 beyond; lanes shaped for the fewest shuffles per iteration.

    A thread's rows are summed over lanes_m and its columns over lanes_k. 4 x 4 entries a lane fit 128
    registers, with which 16 warps share an SM and hide each other's shuffles; left alone they take up to 167.
    """
    K2, M2 = next_power_of_2(K), next_power_of_2(M)
    lanes = max(1, K2 * M2 // (16 if K2 * M2 <= 512 else 32))
    config = min(tile_configs(K2, M2, lanes), key=lambda c: _shuffles(c, K2, M2))
    small = max(K2 // config.lanes_k, M2 // config.lanes_m) <= 4
    return replace(config, registers=128) if small else config


def tile_configs(K2: int, M2: int, lanes: int) -> list[TileConfig]:
    """Every way to shape `lanes` lanes a problem, the fewest along M first."""
    choices = [1 << s for s in range(9) if lanes % (1 << s) == 0 and 1 << s <= M2 and lanes >> s <= K2]
    return [TileConfig(max(1, lanes // 32), max(1, 32 // lanes), lanes // m, m) for m in choices]


def _shuffles(c: TileConfig, K2: int, M2: int) -> int:
    rows = K2 // c.lanes_k * (c.lanes_m.bit_length() - 1)
    return rows + M2 // c.lanes_m * (c.lanes_k.bit_length() - 1)


def default_blocks(op: str, K: int, M: int) -> BlockConfig:
    """The whole problem or as many entries of it as do not spill; at most 8 warps, where a thread has 255
    registers.
    """
    limit, lane = _BLOCKS[op]
    entries = limit if op == "sinkhorn_envelope" else min(next_power_of_2(K) * next_power_of_2(M), limit)
    return BlockConfig(min(8, max(1, entries // (32 * lane))), entries)


@dataclass(frozen=True)
class PatchConfig:
    """Launch geometry of a kernel of one image's patches and some classes' tokens, powers of two all.

    A block of block_n patches and `columns` tokens, those of `classes` classes padded to a power of two, is
    summed over block_d features at a time. aligned: classes whose transport the selecting kernel then solves
    at once, 0 where launches of their own do.
    """

    num_warps: int
    num_stages: int
    block_n: int
    columns: int
    block_d: int
    classes: int
    aligned: int = 0


def default_patches(N: int, K: int, M: int, itemsize: int) -> PatchConfig:
    """128 x 128 similarities for the tensor cores, which take 16-bit features, 32 x 64 for fp32; at most 32
    keys a lane, one of each patch and class, are sorted in registers, 16 where more than 256 are kept."""
    return _patches(N, K, M, itemsize, 1)


def default_scores(N: int, K: int, M: int, by_M: int, itemsize: int) -> PatchConfig:
    """As `default_patches` for selection by by_M tokens, with the transport of K x M in the same kernel where
    a warp holds a problem, 32 entries a lane (16 in fp32 and past 16 columns), and selects by 128 columns.
    """
    warps = 4 if itemsize == 4 or next_power_of_2(by_M) > 16 else 8
    entries = next_power_of_2(K) * next_power_of_2(M)
    fits = entries <= (512 if itemsize == 4 or M > 16 else 1024) and warps * next_power_of_2(by_M) <= 128
    if not fits:
        return default_patches(N, K, by_M, itemsize)
    config = _patches(N, K, by_M, itemsize, warps)
    return replace(config, num_warps=warps, block_n=min(config.block_n, 16 * warps), aligned=warps)


def default_kept(K: int, M: int, itemsize: int) -> PatchConfig:
    """Batched products put one class on each warp: 32 similarities a lane, 16 in fp32."""
    columns = min(next_power_of_2(M), 64)
    rows = min(next_power_of_2(K), (512 if itemsize == 4 else 1024) // columns)
    return PatchConfig(4, 2, rows, columns, 64 // itemsize, 4)


def default_grad(M: int, itemsize: int) -> PatchConfig:
    """Products of gradients, gathered in fp32, with 64 features of patches or tokens; 32 columns spill."""
    rows = 32 if itemsize == 4 else 64
    return PatchConfig(4, 2, rows, 16, 64, max(1, 16 // next_power_of_2(M)))


def _patches(N: int, K: int, M: int, itemsize: int, least: int) -> PatchConfig:
    rows, side, warps, block_d = (32, 64, 4, 16) if itemsize == 4 else (128, 128, 8, 64)
    M2, keys = next_power_of_2(M), 32 * warps * (16 if K > 256 else 32)
    classes = max(least, min(side // M2, keys // next_power_of_2(N), 32))
    return PatchConfig(warps, 3, min(rows, rows * side // (classes * M2)), classes * M2, block_d, classes)
