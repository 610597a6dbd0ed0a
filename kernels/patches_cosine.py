"""Cosines of patches and tokens inside a program, and what selection makes of them."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from ._tiles import next_power_of_2

# T = 0.1 of reduce="softmax", in base 2.
_SHARPNESS = tl.constexpr(10 * math.log2(math.e))
# Stands for the relevance to a class without tokens in a choice over all classes.
_LOWEST = tl.constexpr(float(torch.finfo(torch.float32).min))
_NORM_ROWS, _NORM_BLOCK = 8, 256


@triton.jit(do_not_specialize=["slots", "sets", "S"])
def _inverse_norm_kernel(
    x_ptr, mask_ptr, out_ptr, slots, sets, S, D,
    MASKED: tl.constexpr, S2: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """out[c, j] = 1 / |x_cj|, 0 where that norm is 0 or subnormal, -1 where x_cj is masked or no row at all.

    A program owns ROWS of the slots [..., S2]. In fp64, as the squares of 1e-30 or 1e30 do not fit fp32.
    """
    slot = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    row = slot // S2 * S + slot % S2
    inside = (slot // S2 < sets) & (slot % S2 < S)
    if MASKED:
        inside = inside & (tl.load(mask_ptr + row, mask=inside, other=0) != 0)
    d = tl.arange(0, BLOCK_D)[None, :]
    square = tl.zeros([ROWS, 1], tl.float64)
    for start in range(0, D, BLOCK_D):
        x = tl.load(x_ptr + row * D + (start + d), mask=inside & (start + d < D), other=0.0).to(tl.float64)
        square += tl.sum(x * x, 1, keep_dims=True)
    norm = tl.sqrt(square)
    # The smallest normal number of fp32.
    inverse = (1.0 / tl.where(norm < 1.1754943508222875e-38, float("inf"), norm)).to(tl.float32)
    inverse = tl.where(norm == float("inf"), float("nan"), inverse)
    tl.store(out_ptr + slot, tl.where(inside, inverse, -1.0), mask=slot < slots)


def inverse_norms(x: torch.Tensor, mask: torch.Tensor | None, sets: int, size: int) -> torch.Tensor:
    """1 / |x| of x [n, S, D] in fp32 as [sets, size], size a power of two: 0 for a zero vector, NaN for NaN
    or Inf, -1 for what is masked or padding and takes no part."""
    out = torch.empty(sets, size, dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        _inverse_norm_kernel[(triton.cdiv(sets * size, _NORM_ROWS),)](
            x, x if mask is None else mask.view(torch.uint8), out, sets * size, *x.shape,
            MASKED=mask is not None, S2=size, ROWS=_NORM_ROWS, BLOCK_D=_NORM_BLOCK, num_warps=4,
        )  # fmt: skip
    return out


@triton.jit
def cosines(
    patches_ptr, inv_patches_ptr, n, tokens_ptr, inv_tokens_ptr, M, D,
    COLUMNS: tl.constexpr, M2: tl.constexpr, BLOCK_D: tl.constexpr, SCALE: tl.constexpr,
):  # fmt: skip
    """[n, COLUMNS], -inf for a token that takes no part, else 0 for a zero vector or masked patch: these are
    not even read. Columns are the tokens of classes padded to M2.

    With SCALE (fp32) vectors reach norm 1 before the product; the squares of fp16 fit fp32 as they are, those
    of bf16 for norms from 1e-19 to 1e19.
    """
    column = tl.arange(0, COLUMNS)
    row = column // M2 * M + column % M2
    inv_n = tl.load(inv_patches_ptr + n)[:, None]
    inv_row = tl.load(inv_tokens_ptr + column)[:, None]
    use_n = (inv_n != 0) & (inv_n != -1)
    use_row = (inv_row != 0) & (inv_row != -1)
    acc = tl.zeros([n.shape[0], COLUMNS], tl.float32)
    d = tl.arange(0, BLOCK_D)[None, :]
    for start in range(0, D, BLOCK_D):
        p = tl.load(patches_ptr + (n[:, None] * D + start + d), mask=use_n & (start + d < D), other=0.0)
        t = tl.load(tokens_ptr + (row[:, None] * D + start + d), mask=use_row & (start + d < D), other=0.0)
        if SCALE:
            p *= inv_n
            t *= inv_row
        acc = tl.dot(p, tl.trans(t), acc, input_precision="ieee")
    # Volatile: read again is cheaper than held in registers over the loop.
    inv_row = tl.load(inv_tokens_ptr + column, volatile=True)[None, :]
    if not SCALE:
        acc *= tl.load(inv_patches_ptr + n, volatile=True)[:, None]
        acc *= inv_row
    return tl.where(inv_row == -1, float("-inf"), acc)


@triton.jit
def relevance(sim, REDUCE: tl.constexpr, CLASSES: tl.constexpr, M2: tl.constexpr):
    """r [rows, CLASSES] of sim [rows, CLASSES * M2], +inf for NaN and -inf for a class without tokens; the
    first token that attains a maximum, else 0."""
    sim = tl.where(sim != sim, float("inf"), sim)
    if REDUCE == "max":
        sim = tl.reshape(sim, [sim.shape[0], CLASSES, M2])
        r = tl.max(sim, 2)
        j = tl.arange(0, M2)[None, None, :]
        first = tl.min(tl.where(sim == tl.expand_dims(r, 2), j, M2 - 1), 2)
    else:
        weight = tl.where(sim == float("-inf"), 0.0, 1.0)
        if REDUCE == "softmax":
            # Cosines end at 1, so the largest weight need not be looked for; at +inf it would be inf / inf.
            weight = tl.exp2((tl.minimum(sim, 1.0) - 1) * _SHARPNESS)
        total = tl.sum(tl.reshape(weight, [sim.shape[0], CLASSES, M2]), 2)
        weight *= tl.where(sim == float("-inf"), 0.0, sim)
        r = tl.sum(tl.reshape(weight, [sim.shape[0], CLASSES, M2]), 2)
        r = tl.where(total > 0, r / tl.where(total > 0, total, 1.0), float("-inf"))
        first = tl.where(r > 0, 0, 0)
    return r, first


@triton.jit
def ordered(r):
    """int32 that orders as fp32 r does, -0 equal to +0."""
    bits = tl.where(r == 0, 0.0, r).to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def selection_keys(order, n, first, N2: tl.constexpr):
    """Distinct int64: by order, then lowest patch n; the token `first` rides along."""
    return (order.to(tl.int64) << 32) | ((N2 - 1 - n) << 16) | first


@triton.jit
def unpack(key, N2: tl.constexpr):
    """r (0 where -inf, NaN where +inf), patch and token of a key."""
    order = (key >> 32).to(tl.int32)
    r = tl.where(order < 0, order ^ 0x7FFFFFFF, order).to(tl.float32, bitcast=True)
    r = tl.where(r == float("-inf"), 0.0, tl.where(r == float("inf"), float("nan"), r))
    low = (key & 0xFFFFFFFF).to(tl.int32)
    return r, N2 - 1 - (low >> 16), low & 0xFFFF


def kept_places(k: int, N: int) -> int:
    """K2 of `tl.topk`, which cannot leave one of several keys in all."""
    return min(max(2, next_power_of_2(k)), next_power_of_2(N))
