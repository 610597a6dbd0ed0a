"""kernels.spa_scores_fwd and _bwd against the fp64 oracle on inputs already rounded to the test dtype."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from spa_fast.kernels import PatchConfig, spa_scores_bwd, spa_scores_fwd
from spa_fast.kernels._tiles import default_scores
from tolerance import TABLE, assert_grad
from torch import Tensor

from spa_fast import spa_scores, topk_patches
from spa_fast.reference import patches as reference

NAN, INF = float("nan"), float("inf")
# The interpreter's product of bf16 is wrong.
DTYPES = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]
OPTIONS: dict[str, Any] = {
    "select_patches": None,
    "select_tokens": None,
    "patch_mask": None,
    "token_mask": None,
    "select_token_mask": None,
    "k": 5,
    "eps": 0.1,
    "max_iter": 8,
    "tol": 1e-3,
    "reduce": "max",
    "class_conditional": True,
    "value": False,
}


def features(
    device: str, B: int, C: int, N: int, M: int, D: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(N * 1009 + M * 31 + D)
    patches = torch.randn(B, N, D, generator=rng) * (0.5 + torch.rand(B, N, 1, generator=rng))
    return patches.to(dtype).to(device), torch.randn(C, M, D, generator=rng).to(dtype).to(device)


def exact(x: Any) -> Any:
    if not isinstance(x, Tensor):
        return x
    return x.double().cpu() if x.is_floating_point() else x.cpu()


def check(
    patches: Tensor, tokens: Tensor, config: PatchConfig | None = None, **changes: Any
) -> tuple[Tensor, ...]:
    """All five outputs; arithmetic is fp32 for every input dtype, so is the tolerance."""
    options = OPTIONS | changes
    got = spa_scores_fwd(patches, tokens, *options.values(), config)
    want = reference.spa_scores_fwd(exact(patches), exact(tokens), *map(exact, options.values()))
    f32, i32, i64 = torch.float32, torch.int32, torch.int64
    assert [x.dtype for x in got] == [f32, i64, f32, f32, i32]
    tol = max(TABLE[f32].score, 8 * 2**-24 * 2 / options["eps"])
    # Potentials modulo the additive constant, by which rounding moves them every iteration.
    rows, cols = want[2] != 0, want[3] != 0
    off = ((got[2].cpu() - want[2]) * rows).sum(2, keepdim=True) / rows.sum(2, keepdim=True).clamp(min=1)
    off = off.nan_to_num()
    near = got[0], got[1], got[2].cpu() - off * rows, got[3].cpu() + off * cols, got[4]
    tols = tol, 0, tol, tol, 0
    for name, x, y, t in zip(("score", "indices", "f", "g", "n_iter"), near, want, tols, strict=True):
        torch.testing.assert_close(
            x.cpu().to(y.dtype), y, rtol=t, atol=t, equal_nan=True, msg=lambda m, name=name: f"{name}: {m}"
        )
    return got


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("N", "M", "D", "k"), [(1, 1, 7, 1), (7, 5, 64, 7), (63, 6, 20, 16), (197, 16, 7, 1), (17, 1, 100, 5)]
)
def test_spa_scores_matches_the_oracle(
    device: str, N: int, M: int, D: int, k: int, dtype: torch.dtype
) -> None:
    check(*features(device, 2, 3, N, M, D, dtype), k=k)


@pytest.mark.parametrize("value", [False, True], ids=["transport", "value"])
@pytest.mark.parametrize("eps", [1e-3, 2 / 80, 1.0, 1e2])
def test_spa_scores_over_eps(device: str, eps: float, value: bool) -> None:
    """From MIN_FUSED_EPS on in one launch, with the same contract below."""
    check(*features(device, 2, 3, 20, 5, 16), eps=eps, value=value, tol=0.0)


def test_spa_scores_range_of_costs_at_the_least_fused_eps(device: str) -> None:
    """Costs from 0 to 2 at eps = 2 / 80: kernel entries down to e^-80."""
    patches, tokens = features(device, 1, 1, 8, 4, 3)
    patches[0, ::2] = tokens[0, 0]
    patches[0, 1::2] = -tokens[0, 0]
    tokens[0, 1] = -tokens[0, 0]
    score, *rest = check(patches, tokens, k=8, eps=2 / 80, max_iter=30, tol=0.0)
    assert all(x.isfinite().all() for x in (score, *rest))


@pytest.mark.parametrize("each", [True, False], ids=["each", "shared"])
@pytest.mark.parametrize("other", DTYPES[:2], ids=str)
def test_spa_scores_selects_in_one_space_and_aligns_in_another(
    device: str, other: torch.dtype, each: bool
) -> None:
    patches, tokens = features(device, 2, 3, 20, 5, 16, torch.float16)
    by = dict(zip(("select_patches", "select_tokens"), features(device, 2, 3, 20, 2, 7, other), strict=True))
    mask = torch.tensor([[True, True], [False, True], [True, False]], device=device)
    check(patches, tokens, **by, select_token_mask=mask, class_conditional=each)


@pytest.mark.parametrize("value", [False, True], ids=["transport", "value"])
@pytest.mark.parametrize("eps", [0.1, 1e-2])
def test_spa_scores_masks(device: str, eps: float, value: bool) -> None:
    """Ragged masks, kept patches that are masked, an image and a class with nothing left, junk unread."""
    patches, tokens = features(device, 3, 5, 21, 6, 20)
    masks = {
        "patch_mask": torch.rand(3, 21, device=device) > 0.4,
        "token_mask": torch.rand(5, 6, device=device) > 0.4,
    }
    masks["patch_mask"][0, 3:], masks["patch_mask"][1], masks["token_mask"][2] = False, False, False
    options = {"eps": eps, "value": value, "k": 6}
    clean = check(patches, tokens, **masks, **options)
    score, _, f, g, n_iter = (x.cpu() for x in clean)
    assert not score[1].any()
    assert not score[:, 2].any()
    assert not f[0, :, 3:].any()
    assert not n_iter[1].any()
    assert not g.movedim(0, -1)[~masks["token_mask"].cpu()].any()
    patches[~masks["patch_mask"]], tokens[~masks["token_mask"]] = NAN, INF
    dirty = spa_scores_fwd(patches, tokens, *(OPTIONS | masks | options).values())
    assert all(torch.equal(x, y) for x, y in zip(clean, dirty, strict=True))


def test_spa_scores_zero_vectors_keep_their_weight(device: str) -> None:
    patches, tokens = features(device, 2, 3, 9, 4, 8)
    patches[0, 3:], patches[1], tokens[0], tokens[1, 1] = 0, 0, 0, 0
    check(patches, tokens, k=9)


@pytest.mark.parametrize("eps", [0.1, 1e-2])
def test_spa_scores_nan_stays_in_its_image(device: str, eps: float) -> None:
    patches, tokens = features(device, 2, 3, 9, 4, 8)
    options = (OPTIONS | {"eps": eps}).values()
    clean = spa_scores_fwd(patches, tokens, *options)
    patches[1, 5, 2] = NAN
    dirty = spa_scores_fwd(patches, tokens, *options)
    assert dirty[0][1].isnan().all()
    assert not dirty[4][1].any()
    assert all(torch.equal(x[0], y[0]) for x, y in zip(clean, dirty, strict=True))


def test_spa_scores_each_problem_stops_by_itself(device: str) -> None:
    patches, tokens = features(device, 3, 6, 20, 5, 3)
    n_iter = check(patches, tokens, max_iter=30, tol=1e-4)[4]
    assert len(n_iter.unique()) >= 4


@pytest.mark.parametrize("change", [{"aligned": 0}, {"aligned": 2}, {"classes": 8, "aligned": 8}], ids=str)
def test_spa_scores_config_changes_only_rounding(device: str, change: dict[str, int]) -> None:
    config = dataclasses.replace(default_scores(20, 5, 3, 3, 4), **change)
    check(*features(device, 2, 5, 20, 3, 16), config)


def test_spa_scores_past_the_registers_takes_more_launches(device: str) -> None:
    """40 x 70 pads to 64 x 128 entries in two blocks of tokens; two iterations: the interpreter is slow."""
    assert not default_scores(41, 40, 70, 70, 4).aligned
    check(*features(device, 1, 1, 41, 70, 16), k=40, max_iter=2, tol=0.0)


def bwd(patches: Tensor, tokens: Tensor, *need: bool, mode: str = "envelope", **changes: Any) -> None:
    """Gradients of one side or both at random cotangents, deterministic."""
    need = need or (True, True)
    options = OPTIONS | changes
    eps, value = options["eps"], options["value"]
    kept = reference.spa_scores_fwd(exact(patches), exact(tokens), *map(exact, options.values()))[1:]
    masks = options["patch_mask"], options["token_mask"]
    grad = torch.randn(patches.shape[0], tokens.shape[0])
    want = reference.spa_scores_bwd(
        exact(grad), exact(patches), exact(tokens), kept[0], *map(exact, masks), *kept[1:], eps, value, mode,
        *need,
    )  # fmt: skip
    mine = spa_scores_fwd(patches, tokens, *options.values())[1:]
    args = grad.to(patches.device), patches, tokens, mine[0], *masks, *mine[1:], eps, value, mode, *need
    got = spa_scores_bwd(*args)
    assert all(torch.equal(x, y) for x, y in zip(got, spa_scores_bwd(*args), strict=True))
    for x, y in zip(got, want, strict=True):
        assert x.dtype == patches.dtype
        assert x.shape == y.shape
        assert_grad(x, y, patches.dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("N", "M", "D", "k"), [(7, 5, 64, 7), (37, 6, 70, 16), (9, 1, 7, 1)])
def test_spa_scores_bwd_matches_the_oracle(
    device: str, N: int, M: int, D: int, k: int, dtype: torch.dtype
) -> None:
    bwd(*features(device, 2, 3, N, M, D, dtype), k=k)


@pytest.mark.parametrize("mode", ["implicit", "unroll"])
@pytest.mark.parametrize("eps", [0.1, 1e-2])
def test_spa_scores_bwd_modes(device: str, eps: float, mode: str) -> None:
    bwd(*features(device, 1, 2, 12, 4, 16), mode=mode, eps=eps, max_iter=20)


@pytest.mark.parametrize("value", [False, True], ids=["transport", "value"])
def test_spa_scores_bwd_masked_and_zero_vectors_get_none(device: str, value: bool) -> None:
    patches, tokens = features(device, 3, 5, 13, 6, 20)
    patch_mask, token_mask = torch.rand(3, 13, device=device) > 0.4, torch.rand(5, 6, device=device) > 0.4
    patch_mask[1], token_mask[2] = False, False
    patches[0, 2], tokens[0, 1] = 0, 0
    masks = {"patch_mask": patch_mask, "token_mask": token_mask}
    bwd(patches, tokens, value=value, k=8, **masks)
    bwd(patches, tokens, True, False, k=8, **masks)
    bwd(patches, tokens, False, True, k=8, **masks)
    options = OPTIONS | masks | {"k": 8}
    patches[~patch_mask], tokens[~token_mask] = NAN, INF
    _, indices, *saved = spa_scores_fwd(patches, tokens, *options.values())
    one = torch.ones(3, 5, device=device)
    for x, mask in zip(
        spa_scores_bwd(
            one, patches, tokens, indices, patch_mask, token_mask, *saved, 0.1, value, "envelope", True, True
        ),
        (patch_mask, token_mask),
        strict=True,
    ):
        assert x.isfinite().all()
        assert not x[~mask].any()


def test_spa_scores_bwd_past_a_block_of_tokens(device: str) -> None:
    bwd(*features(device, 1, 2, 6, 37, 5), k=4, max_iter=2)


def test_patch_ops_take_the_kernels_by_name(device: str) -> None:
    """The public functions with backend="triton", both gradients, against the reference in fp64."""
    p, t = features(device, 2, 3, 20, 5, 16)
    results = []
    for dtype, backend in ((torch.float32, "triton"), (torch.float64, "reference")):
        leaves = [x.detach().to(dtype).requires_grad_() for x in (p, t)]
        r, indices = topk_patches(*leaves, 4, backend=backend)
        scores = spa_scores(*leaves, 4, backend=backend)
        loss = (scores * torch.arange(6, device=device).view(2, 3)).sum() + r.square().sum()
        results.append((scores, r, indices, *torch.autograd.grad(loss, leaves)))
    for x, y in zip(*results, strict=True):
        torch.testing.assert_close(x, y.to(x.dtype), rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("N", "M", "k", "eps"), [(196, 6, 16, 0.1), (196, 16, 64, 0.05), (196, 25, 32, 0.1), (196, 6, 16, 0.01)]
)
def test_spa_scores_on_a_device(N: int, M: int, k: int, eps: float, dtype: torch.dtype) -> None:
    check(*features("cuda", 4, 10, N, M, 512, dtype), k=k, eps=eps, max_iter=50)
    bwd(*features("cuda", 4, 10, N, M, 512, dtype), k=k, eps=eps, max_iter=50)


@pytest.mark.gpu
def test_spa_scores_memory_is_independent_of_n_and_m() -> None:
    """Beside outputs and norms nothing of size N or M exists. Nothing waits for the device."""
    peaks = []
    for N, M in ((64, 4), (512, 16)):
        patches, tokens = features("cuda", 8, 64, N, M, 64, torch.float16)
        for mode in ("default", "error"):
            torch.cuda.set_sync_debug_mode(mode)
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            spa_scores_fwd(patches, tokens, *(OPTIONS | {"k": 16}).values())
        torch.cuda.set_sync_debug_mode("default")
        peaks.append(torch.cuda.max_memory_allocated() - before - 4 * (8 * N + 64 * M + 8 * 64 * M))
    assert peaks[1] <= peaks[0] + 4096
