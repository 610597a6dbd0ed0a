"""Every patch kernel, as launched, for sm_80, sm_90 and sm_100: no spills, shared memory that is there."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from spa_fast.kernels import patches, patches_cosine, patches_grad, patches_kept, patches_score
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel, make_backend
from triton.runtime.jit import create_function_from_signature

MODULES = (patches_cosine, patches, patches_kept, patches_score, patches_grad)

pytestmark = pytest.mark.skipif(
    not isinstance(patches._topk_patches_kernel, triton.JITFunction),
    reason="TRITON_INTERPRET is set: nothing to compile here",
)
# Bytes of shared memory a program may have.
SHARED = {80: 166_912, 90: 232_448, 100: 232_448}
POINTERS = {
    torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.int64: "*i64",
    torch.int32: "*i32", torch.int16: "*i16", torch.uint8: "*u8",
}  # fmt: skip
NUMBERS = {int: "i32", float: "fp32"}
OPTIONS = ("num_warps", "num_stages", "maxnreg")
F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32


@dataclass
class Launch:
    """What one launch compiles."""

    kernel: Any
    args: dict[str, Any]
    options: dict[str, Any]
    key: str

    def source(self) -> ASTSource:
        constants, types, attributes = {}, {}, {}
        for at, parameter in enumerate(self.kernel.params):
            value = self.args[parameter.name]
            if parameter.is_constexpr:
                constants[parameter.name], types[parameter.name] = value, "constexpr"
                continue
            types[parameter.name] = (
                POINTERS[value.dtype] if isinstance(value, torch.Tensor) else NUMBERS[type(value)]
            )
            # As Triton finds it: aligned allocations and widths, unless told not to look.
            whole = isinstance(value, int) and not parameter.do_not_specialize and value % 16 == 0
            if isinstance(value, torch.Tensor) or whole:
                attributes[at,] = [["tt.divisibility", 16]]
        return ASTSource(self.kernel, types, constants, attributes)

    def compiled(self, arch: int) -> CompiledKernel:
        options = {name: self.options[name] for name in OPTIONS if name in self.options}
        return triton.compile(self.source(), GPUTarget("cuda", arch, 32), options)


class Recorder:
    """Stands in for a kernel: keeps what a launch of it would compile."""

    def __init__(self, kernel: Any, seen: list[Launch]) -> None:
        self.kernel, self.seen = kernel, seen
        backend = make_backend(GPUTarget("cuda", 90, 32))
        self.bind = create_function_from_signature(kernel.signature, kernel.params, backend)

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        def launch(*args: Any, **options: Any) -> None:
            named, specialization, rest = self.bind(*args, **options)
            key = f"{self.kernel.__name__} {specialization} {sorted(rest.items())}"
            self.seen.append(Launch(self.kernel, named, rest, key))

        return launch


def kernels_of(module: Any) -> list[str]:
    return re.findall(r"^def (_\w+_kernel)\(", Path(module.__file__).read_text(), re.M)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[Launch]:
    """Launches instead of results; the transport's own kernels are compiled elsewhere."""
    found: list[Launch] = []
    for module in MODULES:
        for name in kernels_of(module):
            monkeypatch.setattr(module, name, Recorder(getattr(module, name), found))

    def solved(cost: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor, ...]:
        P, K, M = cost.shape
        return tuple(cost.new_zeros(shape) for shape in (P, (P, K), (P, M), P, P))

    monkeypatch.setattr(patches_score, "sinkhorn_fwd", solved)
    monkeypatch.setattr(patches_grad, "sinkhorn_bwd", lambda grad, cost, *_, **__: cost)
    return found


def inputs(
    dtype: torch.dtype, B: int, C: int, N: int, M: int, D: int, masked: bool = False
) -> tuple[Any, ...]:
    masks = (
        (torch.ones(B, N, dtype=torch.bool), torch.ones(C, M, dtype=torch.bool)) if masked else (None, None)
    )
    return torch.ones(B, N, D, dtype=dtype), torch.ones(C, M, D, dtype=dtype), *masks


def launch(
    op: str,
    dtype: torch.dtype,
    N: int,
    M: int,
    k: int,
    D: int = 64,
    B: int = 2,
    C: int = 3,
    masked: bool = False,
) -> None:
    """By name: topk_REDUCE, shared_REDUCE (over all classes), fused, value, split (two spaces), bwd."""
    p, t, pm, tm = inputs(dtype, B, C, N, M, D, masked)
    name, _, reduce = op.partition("_")
    if name in ("topk", "shared"):
        patches.topk_patches_fwd(p, t, pm, tm, k, reduce, name == "topk")
        return
    if name == "bwd":
        indices, n = torch.zeros(B, C, k, dtype=torch.int64), torch.ones(B, C, dtype=torch.int32)
        f, g = torch.zeros(B, C, k), torch.zeros(B, C, M)
        patches_grad.spa_scores_bwd(
            torch.ones(B, C), p, t, indices, pm, tm, f, g, n, 0.1, False, "envelope", True, True
        )
        return
    other = F16 if dtype == F32 else F32
    by = inputs(other, B, C, N, M, 48)[:2] if name == "split" else (None, None)
    patches_score.spa_scores_fwd(p, t, *by, pm, tm, None, k, 0.1, 9, 0.0, "max", True, name == "value")


CASES = [
    ("topk_max", BF16, 196, 16, 64), ("topk_max", F16, 1024, 5, 64), ("topk_max", F32, 1024, 1, 1024),
    ("topk_max", F16, 256, 256, 256), ("topk_mean", F16, 196, 25, 32), ("topk_softmax", F32, 196, 6, 16),
    ("shared_max", F16, 196, 6, 16), ("shared_mean", F32, 1024, 6, 64),
    ("fused", F16, 196, 6, 16), ("fused", BF16, 196, 16, 64), ("fused", F16, 196, 25, 16),
    ("fused", F32, 196, 16, 32), ("value", F16, 1, 1, 1), ("split", F32, 196, 6, 16),
    ("split", F16, 196, 16, 32), ("fused", F16, 256, 256, 256), ("bwd", F16, 196, 6, 16),
    ("bwd", F32, 196, 16, 64), ("bwd", BF16, 256, 256, 256),
]  # fmt: skip


@pytest.mark.parametrize("arch", SHARED)
@pytest.mark.parametrize(("op", "dtype", "N", "M", "k"), CASES)
def test_patches_compile_without_spills(
    seen: list[Launch], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    op: str, dtype: torch.dtype, N: int, M: int, k: int, arch: int,
) -> None:  # fmt: skip
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    launch(op, dtype, N, M, k, masked=op == "bwd")
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    for one in {x.key: x for x in seen}.values():
        binary = one.compiled(arch)
        (tmp_path / "kernel.cubin").write_bytes(binary.asm["cubin"])
        text = subprocess.run(
            [tool, "--dump-resource-usage", tmp_path / "kernel.cubin"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        used = {key: int(n) for key, n in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
        assert used["STACK"] == used["LOCAL"] == 0, (one.kernel.__name__, used)
        assert binary.metadata.shared <= SHARED[arch], (one.kernel.__name__, binary.metadata.shared)


@pytest.mark.parametrize("op", ["topk_max", "shared_mean", "fused", "split", "bwd"])
def test_patches_new_sizes_do_not_recompile(seen: list[Launch], op: str) -> None:
    """Any B and C; N, M and k within their powers of two; masks or none but for the norms."""
    for B, C in ((1, 1), (2, 15), (3, 16), (16, 1), (17, 33)):
        for N, M, k in ((130, 9, 9), (196, 15, 15), (256, 16, 16)):
            launch(op, F16, N, M, k, B=B, C=C)
    by_kernel = {
        key.split()[0]: {x.key for x in seen if x.key.startswith(key.split()[0])}
        for key in (x.key for x in seen)
    }
    norms = by_kernel.pop("_inverse_norm_kernel")
    # Of patches and of tokens, in each space.
    assert len(norms) == (4 if op == "split" else 2)
    both = by_kernel.pop("_unit_grad_kernel", {0, 1})
    assert len(both) == 2
    assert all(len(keys) == 1 for keys in by_kernel.values()), by_kernel


@pytest.mark.parametrize("op", ["topk_max", "shared_max", "fused", "bwd", "fused_large"])
def test_patches_offsets_are_64_bit(
    seen: list[Launch], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, op: str
) -> None:
    """Ids that count images and classes go nowhere but into a widening to i64: no product wraps at 2^31."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    launch(op.partition("_")[0] if op == "fused_large" else op, F16, 16, 256 if "large" in op else 4, 16)
    for one in {x.kernel.__name__: x for x in seen}.values():
        ir = one.compiled(90).asm["ttir"]
        ids = re.findall(r"(%\S+) = tt\.get_program_id x", ir)
        assert ids, one.key
        for name in ids:
            uses = [line for line in ir.splitlines() if re.search(rf"{re.escape(name)}\b(?! = )", line)]
            assert uses
            assert all("arith.extsi" in line and "to i64" in line for line in uses), uses


def test_every_patch_kernel_is_compiled_here(seen: list[Launch]) -> None:
    for op, dtype, N, M, k in CASES:
        launch(op, dtype, N, M, k)
    here = {x.kernel.__name__ for x in seen}
    folder = Path(patches.__file__).parent
    assert sorted(folder.glob("patches*.py")) == sorted(Path(m.__file__) for m in MODULES)
    assert here == {name for module in MODULES for name in kernels_of(module)}
