"""Kernels compiled ahead of time, without a GPU, and what their binaries take."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import triton
from spa_fast.kernels._tiles import MAX_REGISTERS
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

FLOATS = {"to_log2", "from_log2", "inv_eps", "tol", "unit", "sign"}

Compile = Callable[..., CompiledKernel]


@pytest.fixture
def compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Compile:
    """compiled(kernel, constants, geometry, arch, dtype of cost and gradient) with a cache of its own."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))

    def build(
        kernel: Any, constants: dict[str, Any], options: dict[str, int], arch: int = 90, dtype: str = "fp32"
    ) -> CompiledKernel:
        types = {"cost_ptr": f"*{dtype}", "out_ptr": f"*{dtype}", "n_iter_ptr": "*i32"}
        types |= dict.fromkeys(FLOATS, "fp32") | dict.fromkeys(constants, "constexpr")
        signature = {
            name: types.get(name, "*fp32" if name.endswith("_ptr") else "i32") for name in kernel.arg_names
        }
        return triton.compile(ASTSource(kernel, signature, constants), GPUTarget("cuda", arch, 32), options)

    return build


@pytest.fixture
def registers(compiled: Compile, tmp_path: Path) -> Callable[..., int]:
    """As `compiled`, but the registers of a thread of the binary that would run; spills fail."""

    def measure(*args: Any, **options: Any) -> int:
        cubin = tmp_path / "kernel.cubin"
        cubin.write_bytes(compiled(*args, **options).asm["cubin"])
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        text = subprocess.run(
            [tool, "--dump-resource-usage", cubin], capture_output=True, text=True, check=True
        ).stdout
        used = {name: int(n) for name, n in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
        # Spills go to the stack.
        assert used["STACK"] == used["LOCAL"] == 0, used
        assert used["REG"] <= MAX_REGISTERS
        return used["REG"]

    return measure
