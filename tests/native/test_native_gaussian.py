"""spa_fast._C.sample_gaussian_cpu, called through raw pointers, against the fp64 reference."""

import math
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import Tensor

from spa_fast._native import extension, native_info
from spa_fast.reference.gaussian import normals, philox4x32, sample_gaussian

_C = extension()
if _C is None:
    pytest.skip(native_info()["reason"], allow_module_level=True)

DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
KINDS = {"tril": 0, "diag": 1, "lowrank": 2}
ARCHS = native_info()["cuda_archs"]


def arguments(
    mean: Tensor,
    factor: Tensor,
    diag: Tensor | None,
    out: Tensor,
    ids: Tensor,
    seed: Tensor,
    kind: str,
    first: int = 0,
) -> object:
    def stride(x: Tensor | None) -> int:
        return 0 if x is None or x.shape[0] == 1 else x.stride(0)

    return _C.GaussianArgs(
        rows=0,
        mean=mean.data_ptr(),
        mean_dtype=DTYPES[mean.dtype],
        factor=factor.data_ptr(),
        factor_dtype=DTYPES[factor.dtype],
        factor_stride=stride(factor),
        diag=0 if diag is None else diag.data_ptr(),
        diag_stride=stride(diag),
        class_ids=ids.data_ptr(),
        seed=seed.data_ptr(),
        out=out.data_ptr(),
        kind=KINDS[kind],
        C=mean.shape[0],
        D=mean.shape[1],
        n=out.shape[1],
        rank=factor.shape[2] if kind == "lowrank" else 0,
        first=first,
    )


def native(
    mean: Tensor,
    factor: Tensor,
    diag: Tensor | None,
    n: int,
    *,
    kind: str = "tril",
    ids: Tensor | None = None,
    seed: int = 12345,
    first: int = 0,
    threads: int = 1,
    isa: str = "auto",
) -> Tensor:
    C, D = mean.shape
    out = torch.full((C, n, D), math.nan, dtype=mean.dtype)
    ids = torch.arange(C) if ids is None else ids
    seeds = torch.tensor([seed])
    args = arguments(mean, factor, diag, out, ids, seeds, kind, first)
    _C.sample_gaussian_cpu(args, threads, isa)
    return out


def usable(isa: str) -> bool:
    try:
        native(torch.zeros(1, 1), torch.ones(1, 1), None, 1, isa=isa)
    except ValueError:
        return False
    return True


ISAS = [isa for isa in native_info()["simd_compiled"] if usable(isa)]


def case(
    kind: str, C: int, D: int, rank: int = 3, shared: bool = False
) -> tuple[Tensor, Tensor, Tensor | None]:
    generator = torch.Generator().manual_seed(D)
    rows = 1 if shared else C
    size = {"tril": (D * (D + 1) // 2,), "diag": (D,), "lowrank": (D, rank)}[kind]
    factor = torch.randn(rows, *size, generator=generator)
    diag = torch.rand(rows, D, generator=generator) if kind == "lowrank" else None
    return torch.randn(C, D, generator=generator), factor, diag


def oracle(mean: Tensor, factor: Tensor, diag: Tensor | None, n: int, seed: int, ids: Tensor) -> Tensor:
    both = factor.double() if diag is None else (factor.double(), diag.double())
    return sample_gaussian(mean.double(), both, n, seed, ids)


def ulps(got: Tensor, want: Tensor) -> Tensor:
    """Distance of fp32 numbers in units of the last place; of 1e-8 where there is next to nothing."""
    size = want.abs().float().clamp(min=1e-8)
    step = torch.nextafter(size, torch.tensor(math.inf)) - size
    return (got.double() - want.double()).abs() / step.double()


def test_philox_published_vectors():
    known = [  # Random123's kat_vectors for philox4x32-10: counter, key, result
        (
            "00000000 00000000 00000000 00000000",
            "00000000 00000000",
            "6627e8d5 e169c58d bc57ac4c 9b00dbd8",
        ),
        (
            "ffffffff ffffffff ffffffff ffffffff",
            "ffffffff ffffffff",
            "408f276d 41c83b0e a20bc7c6 6d5451fd",
        ),
        (
            "243f6a88 85a308d3 13198a2e 03707344",
            "a4093822 299f31d0",
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ]
    for counter, key, want in known:
        words = tuple(torch.tensor(int(word, 16)) for word in counter.split())
        got = philox4x32(words, tuple(int(word, 16) for word in key.split()))
        assert [int(word) for word in got] == [int(word, 16) for word in want.split()]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("seed", [0, 12345, -(1 << 63), (1 << 63) - 1])
def test_normals_are_those_of_the_reference(isa: str, seed: int):
    ids = torch.tensor([0, 5, (1 << 32) - 1])
    z = native(torch.zeros(3, 512), torch.ones(1, 512), None, 60, kind="diag", ids=ids, seed=seed, isa=isa)
    # fp32 Box-Muller, off by the logarithm, the root, the cosine and their product.
    assert float(ulps(z, normals(seed, ids, 60, 512)).max()) <= 4


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("D", [1, 2, 5, 31, 64, 192, 200])
@pytest.mark.parametrize("n", [1, 4, 7])
def test_draws_against_fp64(isa: str, kind: str, D: int, n: int):
    for shared in (False, True):
        mean, factor, diag = case(kind, 3, D, shared=shared)
        ids = torch.tensor([4, 0, 9])
        want = oracle(mean, factor, diag, n, 12345, ids)
        got = native(mean, factor, diag, n, kind=kind, ids=ids, isa=isa)
        torch.testing.assert_close(got.double(), want, rtol=0, atol=1e-6 * float(want.abs().max()))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("factor_dtype", list(DTYPES))
@pytest.mark.parametrize("mean_dtype", list(DTYPES))
@pytest.mark.parametrize("kind", list(KINDS))
def test_dtypes(isa: str, factor_dtype: torch.dtype, mean_dtype: torch.dtype, kind: str):
    mean, factor, diag = case(kind, 2, 45)
    mean, factor = mean.to(mean_dtype), factor.to(factor_dtype)
    diag = None if diag is None else diag.to(factor_dtype)
    for n in (3, 6):
        wide = native(mean.float(), factor, diag, n, kind=kind, isa=isa)
        got = native(mean, factor, diag, n, kind=kind, isa=isa)
        assert torch.equal(got, wide.to(mean_dtype))
        want = oracle(mean, factor, diag, n, 12345, torch.arange(2))
        torch.testing.assert_close(wide.double(), want, rtol=0, atol=1e-6 * float(want.abs().max()))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kind", list(KINDS))
def test_a_draw_depends_on_nothing_else(isa: str, kind: str):
    mean, factor, diag = case(kind, 4, 100)
    whole = native(mean, factor, diag, 21, kind=kind, isa=isa)
    assert torch.equal(native(mean, factor, diag, 21, kind=kind, isa=isa, threads=3), whole)
    for n, first in ((1, 0), (4, 3), (5, 16), (20, 1)):
        part = native(mean, factor, diag, n, kind=kind, isa=isa, first=first)
        assert torch.equal(part, whole[:, first : first + n])
    some = torch.tensor([2, 0])
    rows = (mean[some], factor[some], None if diag is None else diag[some])
    assert torch.equal(native(*rows, 21, kind=kind, ids=some, isa=isa), whole[some])


def test_refusals():
    mean, factor, _ = case("tril", 2, 5)
    with pytest.raises(ValueError, match="first"):
        native(mean, factor, None, 1, first=1 << 32)
    with pytest.raises(ValueError, match="isa"):
        native(mean, factor, None, 1, isa="sse")
    with pytest.raises(ValueError, match="rank"):
        native(mean, torch.zeros(2, 5, 0), torch.zeros(2, 5), 1, kind="lowrank")


@pytest.mark.skipif(not ARCHS, reason="built without CUDA")
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a driver")
def test_a_launch_without_a_driver_says_what_cuda_says():
    mean, factor, _ = case("tril", 2, 5)
    args = arguments(mean, factor, None, torch.zeros(2, 3, 5), torch.arange(2), torch.tensor([1]), "tril")
    with pytest.raises(RuntimeError, match=r"CUDA: .*driver.* \(error \d+\)"):
        _C.sample_gaussian_cuda(args, 0, 0)


@pytest.mark.skipif(not ARCHS, reason="built without CUDA")
def test_cuda_kernels_do_not_spill():
    tool = shutil.which("cuobjdump")
    if tool is None and (triton := find_spec("triton")) is not None:
        packaged = Path(str(triton.origin)).parent / "backends/nvidia/bin/cuobjdump"
        tool = str(packaged) if packaged.exists() else None
    if tool is None:
        pytest.skip("no cuobjdump")
    usage = subprocess.check_output([tool, "-res-usage", _C.__file__], text=True).splitlines()
    kernels = [line for line in usage if "REG:" in line]
    assert {f"arch = {arch}" for arch in ARCHS} <= {line.strip() for line in usage}
    assert len(kernels) == 10 * len(ARCHS)  # 3 factor types x 3 tiles, and the diagonal
    assert all("STACK:0" in line and "LOCAL:0" in line for line in kernels), kernels
