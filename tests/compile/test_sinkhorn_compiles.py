"""Ahead-of-time compilation for sm_80, sm_90 and sm_100, without a GPU: registers, spills, offsets."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
import triton
from spa_fast.kernels import sinkhorn
from spa_fast.kernels._tiles import MAX_REGISTERS, default_config, next_power_of_2
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

pytestmark = pytest.mark.skipif(
    not isinstance(sinkhorn._sinkhorn_fwd_kernel, triton.JITFunction),
    reason="TRITON_INTERPRET is set: nothing to compile in this process",
)
TILES = [(1, 1), (4, 4), (16, 8), (32, 16), (32, 32), (64, 64), (196, 20), (256, 16), (16, 256)]


@pytest.fixture(autouse=True)
def fresh_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def compiled(K: int, M: int, arch: int, dtype: str = "fp32", value: bool = False) -> CompiledKernel:
    kernel = sinkhorn._sinkhorn_fwd_kernel
    config = default_config(K, M)
    constants = {
        "VALUE": value,
        "BLOCK_P": config.block_p,
        "K2": next_power_of_2(K),
        "M2": next_power_of_2(M),
        "LANES_K": config.lanes_k,
        "LANES_M": config.lanes_m,
    }
    types = {
        "cost_ptr": f"*{dtype}",
        "n_iter_ptr": "*i32",
        "to_log2": "fp32",
        "from_log2": "fp32",
        "tol": "fp32",
    }
    signature = {
        name: "constexpr"
        if name in constants
        else types.get(name, "*fp32" if name.endswith("_ptr") else "i32")
        for name in kernel.arg_names
    }
    options = {"num_warps": config.num_warps, "maxnreg": MAX_REGISTERS}
    return triton.compile(ASTSource(kernel, signature, constants), GPUTarget("cuda", arch, 32), options)


def resources(kernel: CompiledKernel, folder: Path) -> dict[str, int]:
    """REG, STACK (where spills go), LOCAL and SHARED of the binary that would run."""
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(kernel.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    text = subprocess.run(
        [tool, "--dump-resource-usage", cubin], capture_output=True, text=True, check=True
    ).stdout
    return {name: int(n) for name, n in re.findall(r"(REG|STACK|LOCAL|SHARED):(\d+)", text)}


@pytest.mark.parametrize("arch", [80, 90, 100])
@pytest.mark.parametrize(("K", "M"), TILES, ids=lambda n: str(n))
def test_sinkhorn_fwd_compiles_without_spills(K: int, M: int, arch: int, tmp_path: Path) -> None:
    used = resources(compiled(K, M, arch), tmp_path)
    assert used["STACK"] == used["LOCAL"] == 0, used
    assert used["REG"] <= MAX_REGISTERS


@pytest.mark.parametrize("arch", [80, 90, 100])
@pytest.mark.parametrize(("dtype", "value"), [("fp16", False), ("bf16", True)])
def test_sinkhorn_fwd_dtypes_compile_without_spills(
    dtype: str, value: bool, arch: int, tmp_path: Path
) -> None:
    used = resources(compiled(32, 16, arch, dtype, value), tmp_path)
    assert used["STACK"] == used["LOCAL"] == 0, used


def test_sinkhorn_fwd_offsets_are_64_bit() -> None:
    """The program id goes nowhere but into a widening to i64, so no product with it can wrap at 2^31."""
    ir = compiled(32, 16, 90).asm["ttir"]
    ids = re.findall(r"(%\S+) = tt\.get_program_id", ir)
    assert ids
    for name in ids:
        uses = [line for line in ir.splitlines() if re.search(rf"{re.escape(name)}\b(?! = )", line)]
        assert uses
        assert all("arith.extsi" in line and "to i64" in line for line in uses), uses


def test_every_kernel_is_compiled_here() -> None:
    folder = Path(sinkhorn.__file__).parent
    kernels = [
        n for path in folder.glob("*.py") for n in re.findall(r"^def (_\w+_kernel)\(", path.read_text(), re.M)
    ]
    assert sorted(kernels) == ["_sinkhorn_fwd_kernel"]
