"""How problems are spread over programs, warps and lanes: an analytic choice by tile size alone."""

from __future__ import annotations

from dataclasses import dataclass

# Entries of a padded tile. 32 a lane take about 225 registers; 16384 entries would need 16 warps, where a
# thread has 128 registers, and spill.
MAX_TILE = 8192
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


def next_power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()


def fits(K: int, M: int) -> bool:
    """Whether a K x M problem, padded to powers of two, fits the registers of one program."""
    return next_power_of_2(K) * next_power_of_2(M) <= MAX_TILE


def default_config(K: int, M: int) -> TileConfig:
    """16 entries a lane up to one warp, 32 beyond; lanes shaped for the fewest shuffles per iteration.

    A thread's rows are summed over lanes_m and its columns over lanes_k.
    """
    if not fits(K, M):
        raise ValueError(f"K x M padded to powers of two must have at most {MAX_TILE} entries, got {K} x {M}")
    K2, M2 = next_power_of_2(K), next_power_of_2(M)
    lanes = max(1, K2 * M2 // (16 if K2 * M2 <= 512 else 32))

    def shuffles(lanes_m: int) -> int:
        lanes_k = lanes // lanes_m
        return K2 // lanes_k * (lanes_m.bit_length() - 1) + M2 // lanes_m * (lanes_k.bit_length() - 1)

    choices = [1 << s for s in range(9) if lanes % (1 << s) == 0 and 1 << s <= M2 and lanes >> s <= K2]
    lanes_m = min(choices, key=shuffles)
    return TileConfig(max(1, lanes // 32), max(1, 32 // lanes), lanes // lanes_m, lanes_m)
