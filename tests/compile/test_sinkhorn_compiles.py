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
from spa_fast.kernels._tiles import default_config, next_power_of_2
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
IN_REGISTERS = [(1, 1), (4, 4), (16, 8), (32, 16), (32, 32), (64, 64), (196, 20), (256, 16), (16, 256)]
CASES = [
    *((FWD, K, M) for K, M in IN_REGISTERS),
    *((STREAM, K, M) for K, M in [(256, 256), (64, 256)]),
    *((ENVELOPE, K, M) for K, M in [(16, 5), (256, 256)]),
    *((IMPLICIT, K, M) for K, M in [(1, 1), (32, 16), (256, 1), (256, 256)]),
    *((UNROLL, K, M) for K, M in [(1, 1), (32, 16), (64, 64), (256, 256)]),
]


def launch(kernel: Any, K: int, M: int, value: bool = False) -> tuple[dict[str, Any], int]:
    """Constants and warps that the launchers take by default."""
    K2, M2 = next_power_of_2(K), next_power_of_2(M)
    if kernel is FWD:
        c = default_config(K, M)
        sizes = {"BLOCK_P": c.block_p, "K2": K2, "M2": M2, "LANES_K": c.lanes_k, "LANES_M": c.lanes_m}
        return {"VALUE": value} | sizes, c.num_warps
    if kernel is ENVELOPE:
        return {"ROWS": sinkhorn_grad.envelope_rows(M2), "M2": M2}, 4
    c = sinkhorn_grad.implicit_blocks(K, M) if kernel is IMPLICIT else sinkhorn_stream.stream_blocks(K, M)
    sizes = {"K2": K2, "BLOCK_M": max(1, min(M2, c.entries // K2))}
    more = {STREAM: {"VALUE": value}, UNROLL: {"VALUE": value, "SLOTS": sinkhorn_unroll.SLOTS}}
    return more.get(kernel, {}) | sizes, c.num_warps


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
    """The program id goes nowhere but into a widening to i64, so no product with it can wrap at 2^31."""
    ir = compiled(kernel, *launch(kernel, 32, 16)).asm["ttir"]
    ids = re.findall(r"(%\S+) = tt\.get_program_id", ir)
    assert ids
    for name in ids:
        uses = [line for line in ir.splitlines() if re.search(rf"{re.escape(name)}\b(?! = )", line)]
        assert uses
        assert all("arith.extsi" in line and "to i64" in line for line in uses), uses


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
    """P from 1 to 4096, shared and own weights, K and M within their powers of two, any max_iter and eps."""
    place = {"fwd": sinkhorn, "stream": sinkhorn, "envelope": sinkhorn_grad, "implicit": sinkhorn_grad}
    name = f"_sinkhorn_{mode}_kernel"
    module = place.get(mode, sinkhorn_grad)
    recorder = Recorder(getattr(module, name))
    monkeypatch.setattr(module, name, recorder)
    sizes = [(129, 65), (256, 128)] if mode == "stream" else [(17, 9), (32, 16)]
    for P in (1, 2, 15, 16, 17) + (() if mode == "stream" else (4096,)):
        for K, M in sizes:
            for own in (1, P):
                cost, a, b = torch.ones(P, K, M), torch.ones(own, K), torch.ones(1, M)
                if mode in ("fwd", "stream"):
                    sinkhorn.sinkhorn_fwd(cost, a, b, 1.0 / P, P, 0.0, False)
                    continue
                f, g, n = torch.zeros(P, K), torch.zeros(P, M), torch.ones(P, dtype=torch.int32)
                sinkhorn_grad.sinkhorn_bwd(torch.ones(P), cost, a, b, f, g, n, 1.0 / P, False, mode)
    assert len(recorder.seen) >= 20
    assert len(set(recorder.seen)) == 1, set(recorder.seen)


def test_every_kernel_is_compiled_here() -> None:
    files = Path(sinkhorn.__file__).parent.glob("sinkhorn*.py")
    kernels = [n for path in files for n in re.findall(r"^def (_\w+_kernel)\(", path.read_text(), re.M)]
    assert sorted(kernels) == sorted(kernel.__name__ for kernel in KERNELS)
