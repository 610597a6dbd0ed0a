"""Every transport kernel for sm_80, sm_90 and sm_100: no spills, 64-bit offsets, one binary for all P."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from spa_fast.kernels import sinkhorn, sinkhorn_grad, sinkhorn_stream, sinkhorn_unroll
from spa_fast.kernels._tiles import (
    MAX_REGISTERS,
    BlockConfig,
    TileConfig,
    default_blocks,
    default_tile,
    next_power_of_2,
)
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import create_function_from_signature

FWD = sinkhorn._sinkhorn_fwd_kernel
STREAM = sinkhorn_stream._sinkhorn_stream_kernel
ENVELOPE = sinkhorn_grad._sinkhorn_envelope_kernel
IMPLICIT = sinkhorn_grad._sinkhorn_implicit_kernel
UNROLL = sinkhorn_unroll._sinkhorn_unroll_kernel
KERNELS = (FWD, STREAM, ENVELOPE, IMPLICIT, UNROLL)

pytestmark = pytest.mark.skipif(
    not isinstance(FWD, triton.JITFunction), reason="TRITON_INTERPRET is set: nothing to compile here"
)
ARCHS = [80, 90, 100]
# Corners of 1 to 256 and what users have; past 8192 padded entries the forward passes over blocks.
IN_REGISTERS = [
    *[(1, 1), (1, 256), (256, 1), (2, 256), (256, 2), (256, 32), (32, 256), (128, 64)],
    *[(4, 4), (16, 5), (16, 16), (32, 16), (64, 8), (32, 32), (64, 64), (196, 20)],
]
CORNERS = [(1, 1), (1, 256), (256, 1), (256, 256)]
CASES = [
    *((FWD, K, M) for K, M in IN_REGISTERS),
    *((STREAM, K, M) for K, M in [(256, 256), (64, 256), (256, 33)]),
    *((ENVELOPE, K, M) for K, M in [*CORNERS, (16, 5)]),
    *((IMPLICIT, K, M) for K, M in [*CORNERS, (32, 16)]),
    *((UNROLL, K, M) for K, M in [*CORNERS, (32, 16), (64, 64)]),
]
OPS = {
    STREAM: "sinkhorn_fwd",
    ENVELOPE: "sinkhorn_envelope",
    IMPLICIT: "sinkhorn_implicit",
    UNROLL: "sinkhorn_unroll",
}


def launch(
    kernel: Any, K: int, M: int, value: bool = False, config: TileConfig | BlockConfig | None = None
) -> tuple[dict[str, Any], dict[str, int]]:
    """Constants and options as the launchers pass them, by default for the default geometry."""
    K2, M2 = next_power_of_2(K), next_power_of_2(M)
    c = config or (default_tile(K, M) if kernel is FWD else default_blocks(OPS[kernel], K, M))
    registers = MAX_REGISTERS if value and kernel in (FWD, STREAM) else c.registers
    if isinstance(c, TileConfig):
        sizes = {"BLOCK_P": c.block_p, "LANES_K": c.lanes_k, "LANES_M": c.lanes_m, "K2": K2, "M2": M2}
    elif kernel is ENVELOPE:
        sizes = {"ROWS": c.entries // M2, "M2": M2}
    else:
        sizes = {"K2": K2, "BLOCK_M": c.columns(K2, M2)}
    more = {FWD: {"VALUE": value}, STREAM: {"VALUE": value}}
    more |= {UNROLL: {"VALUE": value, "SLOTS": sinkhorn_unroll.SLOTS}}
    return more.get(kernel, {}) | sizes, {"num_warps": c.num_warps, "maxnreg": registers}


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize(("kernel", "K", "M"), CASES, ids=lambda x: getattr(x, "__name__", str(x)))
def test_sinkhorn_compiles_without_spills(
    registers: Callable[..., int], kernel: Any, K: int, M: int, arch: int
) -> None:
    registers(kernel, *launch(kernel, K, M), arch)


@pytest.mark.parametrize(("dtype", "value", "arch"), [("fp16", False, 80), ("bf16", True, 90)])
@pytest.mark.parametrize("kernel", KERNELS, ids=lambda k: k.__name__)
def test_sinkhorn_dtypes_compile_without_spills(
    registers: Callable[..., int], kernel: Any, dtype: str, value: bool, arch: int
) -> None:
    K, M = (256, 64) if kernel is STREAM else (32, 16)
    registers(kernel, *launch(kernel, K, M, value), arch, dtype)


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda k: k.__name__)
def test_sinkhorn_offsets_are_64_bit(compiled: Callable[..., Any], kernel: Any) -> None:
    """In 32 bits the program id is multiplied by BLOCK_P only, which the number of problems bounds; whatever
    else comes from it is widened to i64 first, so that no product wraps at 2^31.
    """
    constants, options = launch(kernel, 16, 5)
    ir = compiled(kernel, constants, options).asm["ttir"]
    narrow = set(re.findall(r"(%\S+) = tt\.get_program_id", ir))
    assert narrow
    sizes = [f"%c{constants.get('BLOCK_P')}_i32"]
    widened = 0
    for name, op, rest in re.findall(r"(%\S+) = (arith\.\w+|tt\.\w+) (.*)", ir):
        operands = re.findall(r"%[\w#]+", rest.split(" loc(")[0])
        from_id = narrow & set(operands)
        if not from_id:
            continue
        if op == "arith.muli":
            assert kernel is FWD, f"{name} = {op} {rest}"
            assert len(from_id) == 1, f"{name} = {op} {rest}"
            assert set(operands) - from_id <= set(sizes), f"{name} = {op} {rest}"
        widened += op == "arith.extsi"
        if "i64" not in rest.split(" loc(")[0].rpartition(":")[2]:
            narrow.add(name)
    assert widened


class Recorder:
    """Stands in for a kernel: what a launch of it would be specialised on."""

    def __init__(self, kernel: Any) -> None:
        backend = make_backend(GPUTarget("cuda", 90, 32))
        self.bind = create_function_from_signature(kernel.signature, kernel.params, backend)
        self.seen: list[str] = []

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        def launch(*args: Any, **options: Any) -> None:
            _, specialization, rest = self.bind(*args, **options)
            self.seen.append(str((specialization, sorted(rest.items()))))

        return launch


@pytest.mark.parametrize("mode", ["fwd", "stream", "envelope", "implicit", "unroll"])
def test_sinkhorn_new_sizes_and_strides_do_not_recompile(monkeypatch: pytest.MonkeyPatch, mode: str) -> None:
    """Any P, layout, sign, max_iter and eps, shared and own weights, K and M within their powers of two."""
    place = {"fwd": sinkhorn, "stream": sinkhorn, "envelope": sinkhorn_grad, "implicit": sinkhorn_grad}
    name = f"_sinkhorn_{mode}_kernel"
    module = place.get(mode, sinkhorn_grad)
    recorder = Recorder(getattr(module, name))
    monkeypatch.setattr(module, name, recorder)
    sizes = [(129, 65), (256, 128)] if mode == "stream" else [(17, 9), (32, 16)]
    for P in (1, 2, 15, 16, 17) + (() if mode == "stream" else (4096,)):
        for K, M in sizes:
            for own, pairs in ((1, False), (P, False), (P, True)):
                cost, a, b = torch.ones(P, K, M), torch.ones(own, K), torch.ones(1, M)
                cost = cost.view(1, K, P, M) if pairs else cost
                if mode in ("fwd", "stream"):
                    sinkhorn.sinkhorn_fwd(cost, a, b, 1.0 / P, P, 0.0, False, pairs)
                    continue
                f, g, n = torch.zeros(P, K), torch.zeros(P, M), torch.ones(P, dtype=torch.int32)
                sinkhorn_grad.sinkhorn_bwd(torch.ones(P), cost, a, b, f, g, n, 1.0 / P, False, mode, pairs)
    assert len(recorder.seen) >= 20
    assert len(set(recorder.seen)) == 1, set(recorder.seen)


def test_every_kernel_is_compiled_here() -> None:
    files = Path(sinkhorn.__file__).parent.glob("sinkhorn*.py")
    kernels = [n for path in files for n in re.findall(r"^def (_\w+_kernel)\(", path.read_text(), re.M)]
    assert sorted(kernels) == sorted(kernel.__name__ for kernel in KERNELS)
