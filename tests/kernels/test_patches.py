"""kernels.topk_patches_fwd against the fp64 oracle on inputs already rounded to the test dtype."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from spa_fast.kernels import PatchConfig, topk_patches_fwd
from spa_fast.kernels._tiles import default_patches
from tolerance import TABLE
from torch import Tensor

from spa_fast.reference import patches as reference

NAN, INF = float("nan"), float("inf")
REDUCES = ["max", "mean", "softmax"]
ALL = [True, False]
# The interpreter's product of bf16 is wrong.
DTYPES = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]


def features(
    device: str, B: int, C: int, N: int, M: int, D: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(N * 1009 + M * 31 + D)
    patches = torch.randn(B, N, D, generator=rng) * (0.5 + torch.rand(B, N, 1, generator=rng))
    return patches.to(dtype).to(device), torch.randn(C, M, D, generator=rng).to(dtype).to(device)


def oracle(patches: Tensor, tokens: Tensor, *rest: object) -> tuple[Tensor, ...]:
    rest = tuple(x.cpu() if isinstance(x, Tensor) else x for x in rest)
    return reference.topk_patches_fwd(patches.double().cpu(), tokens.double().cpu(), *rest)


def check(
    patches: Tensor,
    tokens: Tensor,
    patch_mask: Tensor | None,
    token_mask: Tensor | None,
    k: int,
    reduce: str,
    each: bool,
    config: PatchConfig | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Arithmetic is fp32 for every input dtype, so is the tolerance."""
    args = (patches, tokens, patch_mask, token_mask, k, reduce, each)
    got = topk_patches_fwd(*args, config)
    scores, indices, argmax = (x.cpu() for x in got)
    want = oracle(*args)
    assert [x.dtype for x in got] == [torch.float32, torch.int64, torch.int32]
    tol = TABLE[torch.float32].score
    torch.testing.assert_close(scores.double(), want[0], rtol=tol, atol=tol, equal_nan=True)
    torch.testing.assert_close(indices, want[1], rtol=0, atol=0)
    torch.testing.assert_close(argmax, want[2], rtol=0, atol=0)
    return scores, indices, argmax


@pytest.mark.parametrize("each", ALL, ids=["each", "shared"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("N", "M", "D", "k"), [(1, 1, 7, 1), (7, 5, 2, 7), (63, 6, 64, 16), (197, 16, 100, 1), (33, 1, 7, 33)]
)
def test_topk_patches_matches_the_oracle(
    device: str, N: int, M: int, D: int, k: int, dtype: torch.dtype, each: bool
) -> None:
    check(*features(device, 2, 3, N, M, D, dtype), None, None, k, "max", each)


@pytest.mark.parametrize("each", ALL, ids=["each", "shared"])
@pytest.mark.parametrize("reduce", REDUCES)
def test_topk_patches_masks(device: str, reduce: str, each: bool) -> None:
    """Ragged masks, an image and a class with nothing left, and what is masked is not read."""
    patches, tokens = features(device, 3, 5, 21, 6, 20)
    patch_mask = torch.rand(3, 21, device=device) > 0.4
    token_mask = torch.rand(5, 6, device=device) > 0.4
    patch_mask[1], token_mask[2] = False, False
    clean = check(patches, tokens, patch_mask, token_mask, 21, reduce, each)
    assert not clean[0][1].any()
    assert not clean[0][:, 2].any()
    assert clean[1][1].tolist() == [list(range(21))] * 5
    patches[~patch_mask], tokens[~token_mask] = NAN, INF
    dirty = topk_patches_fwd(patches, tokens, patch_mask, token_mask, 21, reduce, each)
    assert all(torch.equal(x, y.cpu()) for x, y in zip(clean, dirty, strict=True))


def exact(device: str, sets: int, rows: int) -> Tensor:
    """[sets, rows, 16] of norm 2 with four entries +-1: every order of summation gives the same bits."""
    x = torch.zeros(sets, rows, 16)
    at = torch.rand(sets, rows, 16).argsort(-1)[..., :4]
    return x.scatter_(2, at, torch.randint(0, 2, at.shape) * 2.0 - 1).to(device)


@pytest.mark.parametrize("each", ALL, ids=["each", "shared"])
@pytest.mark.parametrize("reduce", REDUCES)
def test_topk_patches_ties_go_to_the_lowest_index(device: str, reduce: str, each: bool) -> None:
    patches, tokens = exact(device, 2, 37), exact(device, 3, 5)
    if reduce != "softmax":
        # Its sums of the same numbers in another order are no ties.
        scores = check(patches, tokens, None, None, 37, reduce, each)[0]
        assert len(scores.unique()) < scores.numel() // 2
    same = patches[:, [0] * 37].contiguous()
    assert (
        topk_patches_fwd(same, tokens, None, None, 9, reduce, each)[1].tolist() == [[list(range(9))] * 3] * 2
    )


def test_topk_patches_one_feature(device: str) -> None:
    """D = 1: cosines are +-1 up to rounding."""
    patches, tokens = features(device, 2, 3, 7, 5, 1)
    scores, indices, _ = topk_patches_fwd(patches, tokens, None, None, 7, "mean", True)
    r = (patches.sign() * tokens.sign().mean((1, 2))[:, None, None, None]).transpose(0, 1)[..., 0]
    torch.testing.assert_close(scores, r.gather(2, indices), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("each", ALL, ids=["each", "shared"])
def test_topk_patches_zero_vectors_and_signed_zeros(device: str, each: bool) -> None:
    patches, tokens = features(device, 2, 3, 9, 4, 8)
    patches[0, 3:], patches[1] = 0, 0
    patches[1, ::2, 0] = 1
    tokens[0], tokens[1, 1] = 0, 0
    tokens[1, :, 0] *= -0.0
    check(patches, tokens, None, None, 9, "max", each)


@pytest.mark.parametrize("reduce", REDUCES)
def test_topk_patches_nan_is_chosen_first_and_stays_in_its_image(device: str, reduce: str) -> None:
    patches, tokens = features(device, 2, 3, 9, 4, 8)
    clean = topk_patches_fwd(patches, tokens, None, None, 4, reduce, True)
    patches[1, 5, 2] = NAN
    scores, indices, argmax = topk_patches_fwd(patches, tokens, None, None, 4, reduce, True)
    assert scores[1, :, 0].isnan().all()
    assert (indices[1, :, 0] == 5).all()
    for x, y in zip((scores, indices, argmax), clean, strict=True):
        assert torch.equal(x[0], y[0])


@pytest.mark.parametrize("size", [1e-30, 1e-12, 1e12, 1e30])
def test_topk_patches_norms_do_not_matter(device: str, size: float) -> None:
    patches, tokens = features(device, 2, 3, 9, 4, 8)
    check(patches * size, tokens * size, None, None, 5, "max", True)
    check(patches * size, tokens / size, None, None, 5, "mean", False)


def test_topk_patches_1024_patches(device: str) -> None:
    patches, tokens = features(device, 1, 1, 1024, 2, 5)
    config = dataclasses.replace(default_patches(1024, 1024, 2, 4), classes=1)
    check(patches, tokens, None, None, 1024, "max", True, config)
    check(patches, tokens, None, None, 3, "mean", False, config)


@pytest.mark.parametrize("each", ALL, ids=["each", "shared"])
def test_topk_patches_neighbours_change_no_bit(device: str, each: bool) -> None:
    patches, tokens = exact(device, 3, 20), exact(device, 5, 5)
    together = topk_patches_fwd(patches, tokens, None, None, 6, "max", each)
    for b in range(3):
        alone = topk_patches_fwd(patches[b : b + 1].clone(), tokens, None, None, 6, "max", each)
        assert all(torch.equal(x[b : b + 1], y) for x, y in zip(together, alone, strict=True))
    if each:
        few = topk_patches_fwd(patches, tokens[2:4].clone(), None, None, 6, "max", each)
        assert all(torch.equal(x[:, 2:4], y) for x, y in zip(together, few, strict=True))


@pytest.mark.parametrize("change", [{"block_n": 16}, {"classes": 2, "block_d": 32}, {"classes": 16}], ids=str)
def test_topk_patches_config_changes_only_rounding(device: str, change: dict[str, int]) -> None:
    config = dataclasses.replace(default_patches(40, 10, 3, 4), **change)
    for each in ALL:
        check(*features(device, 1, 5, 40, 3, 20), None, None, 10, "max", each, config)


@pytest.mark.gpu
@pytest.mark.parametrize("each", ALL, ids=["each", "shared"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("N", "M", "k"), [(196, 6, 16), (197, 16, 64), (1024, 25, 32), (256, 256, 256)])
def test_topk_patches_on_a_device(N: int, M: int, k: int, dtype: torch.dtype, each: bool) -> None:
    """Near-equal relevances may swap: the oracle's r of what was chosen must be that of its own choice."""
    patches, tokens = features("cuda", 4, 10, N, M, 512, dtype)
    scores, indices, _ = topk_patches_fwd(patches, tokens, None, None, k, "max", each)
    want, _, _ = oracle(patches, tokens, None, None, k, "max", each)
    u, v = (torch.nn.functional.normalize(x.double().cpu(), dim=-1) for x in (patches, tokens))
    r = torch.einsum("bnd,cmd->bcnm", u, v).amax(-1).gather(2, indices.cpu())
    tol = TABLE[torch.float32].score
    torch.testing.assert_close(scores.double().cpu(), r, rtol=tol, atol=tol)
    if each:
        torch.testing.assert_close(r, want, rtol=tol, atol=tol)
    assert all(len(set(row)) == k for row in indices.flatten(0, 1).tolist())


@pytest.mark.gpu
def test_topk_patches_memory_is_independent_of_n_and_m() -> None:
    """Beside the outputs: norms, of N and M alone. Nothing waits for the device."""
    peaks = []
    for N, M in ((64, 4), (512, 32)):
        patches, tokens = features("cuda", 8, 64, N, M, 64, torch.float16)
        for mode in ("default", "error"):
            torch.cuda.set_sync_debug_mode(mode)
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            topk_patches_fwd(patches, tokens, None, None, 16, "max", True)
        torch.cuda.set_sync_debug_mode("default")
        peaks.append(torch.cuda.max_memory_allocated() - before - 4 * (8 * N + 64 * M))
    assert peaks[1] <= peaks[0] + 4096
