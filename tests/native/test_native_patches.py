"""spa_fast._C.topk_patches_fwd, spa_scores_fwd and spa_scores_bwd, called through raw pointers."""

from __future__ import annotations

import math

import pytest
import torch
from tolerance import TABLE, assert_grad
from torch import Tensor

from spa_fast._native import extension, native_info
from spa_fast.reference import patches as reference

_C = extension()
if _C is None:
    pytest.skip(native_info()["reason"], allow_module_level=True)

DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
NOTHING = (0, 0, 0, 0, 0, 0)


def described(patches: Tensor, tokens: Tensor, token_mask: Tensor | None) -> tuple[int, ...]:
    mask = 0 if token_mask is None else token_mask.data_ptr()
    return patches.data_ptr(), tokens.data_ptr(), DTYPES[patches.dtype], *tokens.shape[1:], mask


def topk(
    patches: Tensor,
    tokens: Tensor,
    k: int,
    *,
    patch_mask: Tensor | None = None,
    token_mask: Tensor | None = None,
    reduce: str = "max",
    class_conditional: bool = True,
    threads: int = 1,
    isa: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    (B, N, _), C = patches.shape, tokens.shape[0]
    scores = torch.full((B, C, k), math.nan)
    indices = torch.full((B, C, k), -1, dtype=torch.int64)
    argmax = torch.full((B, C, k), -1, dtype=torch.int32)
    _C.topk_patches_fwd(
        described(patches, tokens, token_mask),
        0 if patch_mask is None else patch_mask.data_ptr(),
        (B, N, C, k),
        reduce,
        class_conditional,
        *(x.data_ptr() for x in (scores, indices, argmax)),
        threads,
        isa,
    )
    return scores, indices, argmax


def spa_scores(
    patches: Tensor,
    tokens: Tensor,
    k: int,
    select: tuple[Tensor, Tensor] | None = None,
    *,
    patch_mask: Tensor | None = None,
    token_mask: Tensor | None = None,
    select_token_mask: Tensor | None = None,
    eps: float = 0.1,
    max_iter: int = 100,
    tol: float = 1e-3,
    reduce: str = "max",
    class_conditional: bool = True,
    value: bool = False,
    threads: int = 1,
    isa: str = "auto",
) -> tuple[Tensor, ...]:
    (B, N, _), (C, M, _) = patches.shape, tokens.shape
    score, f, g = (torch.full(size, math.nan) for size in ((B, C), (B, C, k), (B, C, M)))
    indices = torch.full((B, C, k), -1, dtype=torch.int64)
    n_iter = torch.full((B, C), -1, dtype=torch.int32)
    own = described(patches, tokens, token_mask)
    _C.spa_scores_fwd(
        *((own, NOTHING) if select is None else (described(*select, select_token_mask), own)),
        0 if patch_mask is None else patch_mask.data_ptr(),
        (B, N, C, k),
        reduce,
        class_conditional,
        *(eps, max_iter, tol, value),
        *(x.data_ptr() for x in (score, indices, f, g, n_iter)),
        threads,
        isa,
    )
    return score, indices, f, g, n_iter


def spa_scores_bwd(
    grad_score: Tensor,
    patches: Tensor,
    tokens: Tensor,
    forward: tuple[Tensor, ...],
    *,
    patch_mask: Tensor | None = None,
    token_mask: Tensor | None = None,
    eps: float = 0.1,
    value: bool = False,
    threads: int = 1,
    isa: str = "auto",
) -> tuple[Tensor, Tensor]:
    _, indices, f, g, _ = forward
    grads = torch.full_like(patches, math.nan), torch.full(tokens.shape, math.nan)
    _C.spa_scores_bwd(
        grad_score.data_ptr(),
        described(patches, tokens, token_mask),
        0 if patch_mask is None else patch_mask.data_ptr(),
        (*patches.shape[:2], tokens.shape[0], indices.shape[2]),
        indices.data_ptr(),
        *(eps, value),
        *(x.data_ptr() for x in (f, g, *grads)),
        threads,
        isa,
    )
    return grads


def usable(isa: str) -> bool:
    try:
        topk(torch.ones(1, 1, 1), torch.ones(1, 1, 1), 1, isa=isa)
    except ValueError:
        return False
    return True


ISAS = [isa for isa in native_info()["simd_compiled"] if usable(isa)]
# B, N, C, M, D, k
SIZES = [
    (1, 1, 1, 1, 1, 1),
    (2, 7, 3, 2, 7, 7),
    (2, 63, 5, 33, 63, 1),
    (3, 196, 19, 6, 197, 16),
    (1, 197, 4, 5, 513, 64),
    (2, 256, 2, 100, 8, 30),
]


def features(
    B: int, N: int, C: int, M: int, D: int, dtype: torch.dtype, seed: int = 0
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed + N + D)
    return (
        torch.randn(B, N, D, generator=generator).to(dtype),
        torch.randn(C, M, D, generator=generator).to(dtype),
    )


def masks(patches: Tensor, tokens: Tensor) -> dict[str, Tensor]:
    """Some of each; of the last image and of the last class everything, where there are more."""
    generator = torch.Generator().manual_seed(1)
    on = [torch.rand(x.shape[:2], generator=generator) > 0.3 for x in (patches, tokens)]
    for mask in on:
        mask[0, 0] = True
        if len(mask) > 1:
            mask[-1] = False
    return {"patch_mask": on[0], "token_mask": on[1]}


def same(got: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(got, want, strict=True))


def relevance(scores: Tensor, indices: Tensor) -> Tensor:
    """r [B, C, N] of what a selection of all N patches returned."""
    return torch.empty_like(scores).scatter_(2, indices, scores)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_topk_patches_matches_fp64(isa: str, dtype: torch.dtype, size: tuple[int, ...], masked: bool) -> None:
    *shape, k = size
    patches, tokens = features(*shape, dtype)
    on = masks(patches, tokens) if masked else {"patch_mask": None, "token_mask": None}
    for reduce in ("max", "mean", "softmax"):
        all_, order, _ = topk(patches, tokens, shape[1], reduce=reduce, isa=isa, **on)
        r = relevance(all_, order)
        want = reference.topk_patches_fwd(
            patches.double(), tokens.double(), *on.values(), shape[1], reduce, True
        )
        torch.testing.assert_close(r.double(), relevance(*want[:2]), rtol=0, atol=2e-6)
        key = r if on["patch_mask"] is None else r.masked_fill(~on["patch_mask"][:, None], -math.inf)
        exact = key.sort(dim=-1, descending=True, stable=True).indices
        assert torch.equal(order, exact)
        scores, indices, argmax = topk(patches, tokens, k, reduce=reduce, isa=isa, **on)
        assert torch.equal(indices, exact[..., :k])
        assert torch.equal(scores, all_[..., :k])
        if reduce != "max":
            assert not argmax.any()
            continue
        at = tokens[torch.arange(shape[2])[:, None], argmax.long()].double()
        kept = patches[torch.arange(shape[0])[:, None, None], indices].double()
        cosine = torch.nn.functional.cosine_similarity(kept, at, dim=-1, eps=1e-30)
        attained = torch.where(scores == 0, 0.0, cosine)
        torch.testing.assert_close(attained, scores.double(), rtol=0, atol=2e-6)


@pytest.mark.parametrize("isa", ISAS)
def test_topk_patches_ties_go_to_the_lowest_index(isa: str) -> None:
    generator = torch.Generator().manual_seed(0)
    for N in (1, 5, 16, 17, 100, 1024):
        which = torch.randint(max(1, N // 9), (2, N), generator=generator)
        few = torch.randn(2, N, 24, generator=generator)
        patches = few.gather(1, which[..., None].expand(-1, -1, 24))
        tokens = torch.randn(3, 4, 24, generator=generator)
        tokens[:, 2] = tokens[:, 1]
        r = relevance(*topk(patches, tokens, N, isa=isa)[:2])
        first = (which[:, :, None] == which[:, None]).int().argmax(-1)
        assert torch.equal(r, r.gather(2, first[:, None].expand(-1, 3, -1)))
        exact = r.sort(dim=-1, descending=True, stable=True).indices
        for k in {1, 2, N // 3 + 1, N}:
            if k <= N:
                _, indices, argmax = topk(patches, tokens, k, isa=isa)
                assert torch.equal(indices, exact[..., :k])
                assert not (argmax == 2).any()
        same_everywhere = topk(torch.ones(1, N, 3), torch.ones(1, 1, 3), N, isa=isa)[1]
        assert torch.equal(same_everywhere.flatten(), torch.arange(N))
        negative = topk(-torch.ones(1, N, 3), torch.ones(1, 1, 3), max(1, N // 2), isa=isa)[1]
        assert torch.equal(negative.flatten(), torch.arange(max(1, N // 2)))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("reduce", ["max", "mean", "softmax"])
def test_topk_patches_once_an_image(isa: str, reduce: str) -> None:
    patches, tokens = features(3, 50, 9, 6, 40, torch.float32)
    for on in ({}, masks(patches, tokens)):
        each = topk(patches, tokens, 50, reduce=reduce, isa=isa, **on)
        r = relevance(*each[:2])
        key = r.masked_fill(~on["token_mask"].any(1)[None, :, None], -math.inf) if on else r
        key = key.amax(1)
        key = key.masked_fill(~on["patch_mask"], -torch.inf) if on else key
        exact = key.sort(dim=-1, descending=True, stable=True).indices[:, None, :11].expand(-1, 9, -1)
        scores, indices, argmax = topk(
            patches, tokens, 11, reduce=reduce, class_conditional=False, isa=isa, **on
        )
        assert torch.equal(indices, exact)
        assert torch.equal(scores, r.gather(2, exact))
        assert torch.equal(argmax, torch.zeros_like(each[2]).scatter(2, *each[1:]).gather(2, exact))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_spa_scores_match_fp64(
    isa: str, dtype: torch.dtype, size: tuple[int, ...], apart: bool, masked: bool
) -> None:
    B, N, C, M, D, k = size
    patches, tokens = features(B, N, C, M, D, dtype)
    select = features(B, N, C, M + 2, D + 1, torch.float32, seed=1) if apart else None
    on = masks(patches, tokens) if masked else {"patch_mask": None, "token_mask": None}
    own = {} if select is None or not masked else {"select_token_mask": masks(*select)["token_mask"]}
    for value in (False, True):
        got = spa_scores(patches, tokens, k, select, value=value, isa=isa, **on, **own)
        score, indices, f, g, n_iter = got
        chosen = topk(
            *(select or (patches, tokens)),
            k,
            isa=isa,
            patch_mask=on["patch_mask"],
            token_mask=own.get("select_token_mask", None if apart else on["token_mask"]),
        )
        assert torch.equal(indices, chosen[1])
        # The same indices, so that what differs is what follows from them.
        sim = cosines(patches, tokens, indices, on)
        cost = (1 - sim).flatten(0, 1)
        a, b = reference._weights(indices, M, *on.values(), cost)
        want = reference.sinkhorn_fwd(cost, a, b, 0.1, 100, 1e-3, value)
        mass = ((a != 0).any(-1) & (b != 0).any(-1)).double()
        expected = (want[0] if value else mass - want[0]).view(B, C)
        # Halves are widened and everything after is fp32.
        torch.testing.assert_close(score.double(), expected, rtol=1e-5, atol=2e-6)
        assert torch.equal(n_iter.flatten(), want[3])
        for x, y in ((f, want[1]), (g, want[2])):
            torch.testing.assert_close(x.double().flatten(0, 1), y, rtol=1e-5, atol=1e-5)


def cosines(patches: Tensor, tokens: Tensor, indices: Tensor, on: dict[str, Tensor | None]) -> Tensor:
    u, v = (torch.nn.functional.normalize(x.double(), dim=-1, eps=1e-300) for x in (patches, tokens))
    u = u if on["patch_mask"] is None else u * on["patch_mask"][..., None]
    v = v if on["token_mask"] is None else v * on["token_mask"][..., None]
    kept = u[torch.arange(len(u))[:, None, None], indices]
    return torch.einsum("bckd,cmd->bckm", kept, v)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_spa_scores_bwd_matches_fp64(
    isa: str, dtype: torch.dtype, size: tuple[int, ...], masked: bool
) -> None:
    B, N, C, M, D, k = size
    patches, tokens = features(B, N, C, M, D, dtype)
    on = masks(patches, tokens) if masked else {"patch_mask": None, "token_mask": None}
    grad = torch.randn(B, C, generator=torch.Generator().manual_seed(5))
    for value in (False, True):
        forward = spa_scores(patches, tokens, k, value=value, isa=isa, **on)
        got = spa_scores_bwd(grad, patches, tokens, forward, value=value, isa=isa, **on)
        _, indices, f, g, n_iter = forward
        want = reference.spa_scores_bwd(
            *(grad.double(), patches.double(), tokens.double(), indices, *on.values()),
            *(f.double(), g.double(), n_iter, 0.1, value, "envelope", True, True),
        )
        for x, y in zip(got, want, strict=True):
            assert x.isfinite().all()
            if D == 1:
                # A unit vector of one number is constant; what is left of its gradient is rounding.
                assert x.float().abs().max() <= 1e-5 * grad.abs().sum()
            else:
                # Rounded alike: the largest entry's last place shows beside the root mean square.
                assert_grad(x, y.to(x.dtype), dtype)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("apart", [False, True])
def test_patches_bits_depend_on_nothing_else(isa: str, apart: bool) -> None:
    patches, tokens = features(5, 70, 37, 6, 100, torch.float32)
    select = features(5, 70, 37, 4, 50, torch.float32) if apart else None
    grad = torch.randn(5, 37)
    want = spa_scores(patches, tokens, 12, select, isa=isa)
    grads = spa_scores_bwd(grad, patches, tokens, want, isa=isa)
    for threads in (2, 4):
        for conditional in (True, False):
            one, many = (
                topk(patches, tokens, 12, class_conditional=conditional, threads=n, isa=isa)
                for n in (1, threads)
            )
            assert same(one, many)
        assert same(spa_scores(patches, tokens, 12, select, threads=threads, isa=isa), want)
        assert same(spa_scores_bwd(grad, patches, tokens, want, threads=threads, isa=isa), grads)
    for b in (0, 3):
        alone = select and (select[0][b : b + 1].clone(), select[1])
        assert same(
            spa_scores(patches[b : b + 1].clone(), tokens, 12, alone, isa=isa),
            tuple(x[b : b + 1] for x in want),
        )
    some = torch.tensor([36, 5, 20])
    few = select and (select[0], select[1][some])
    assert same(spa_scores(patches, tokens[some], 12, few, isa=isa), tuple(x[:, some] for x in want))
    # Masked patches and tokens at the end: as if they were not there.
    more = [torch.cat([x, torch.full_like(x[:, :3], math.nan)], 1) for x in (patches, tokens)]
    on = [torch.arange(x.shape[1]).expand(x.shape[:2]) < x.shape[1] - 3 for x in more]
    on = [mask.contiguous() for mask in on]
    wide = select and (torch.cat([select[0], select[0][:, :3]], 1), select[1])
    got = spa_scores(*more, 12, wide, patch_mask=on[0], token_mask=on[1], isa=isa)
    assert same((*got[:3], got[3][..., :-3], got[4]), want)
    masked = spa_scores_bwd(grad, *more, got, patch_mask=on[0], token_mask=on[1], isa=isa)
    assert same(tuple(x[:, :-3] for x in masked), grads)
    assert all(not x[:, -3:].any() for x in masked)


@pytest.mark.parametrize("isa", ISAS)
def test_spa_scores_chunked_gradient(isa: str) -> None:
    """Two images a chunk: 40 x 256 x 256 gradients of similarities an image."""
    patches, tokens = features(5, 300, 30, 256, 8, torch.float32)
    on = {"patch_mask": None, "token_mask": None}
    forward = spa_scores(patches, tokens, 256, tol=1e-2, isa=isa)
    grad = torch.randn(5, 30)
    got = spa_scores_bwd(grad, patches, tokens, forward, isa=isa)
    _, indices, f, g, n_iter = forward
    want = reference.spa_scores_bwd(
        *(grad.double(), patches.double(), tokens.double(), indices, *on.values()),
        *(f.double(), g.double(), n_iter, 0.1, False, "envelope", True, True),
    )
    for x, y in zip(got, want, strict=True):
        assert_grad(x, y, torch.float32)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_patches_hostile(isa: str, dtype: torch.dtype) -> None:
    patches, tokens = features(2, 40, 6, 5, 33, dtype)
    want = spa_scores(patches, tokens, 9, isa=isa)
    grad = torch.ones(2, 6)
    expected = spa_scores_bwd(grad, patches, tokens, want, isa=isa)
    factors = 2.0 ** torch.arange(-90, 90, 4.5).round()[:40]
    far = patches * factors[:, None].to(dtype), tokens * 2.0**90
    scaled = spa_scores(*far, 9, isa=isa)
    assert torch.equal(scaled[1], want[1])
    torch.testing.assert_close(scaled[0], want[0], rtol=0, atol=2 * TABLE[torch.float32].score)
    d_patches, d_tokens = (x.float() for x in spa_scores_bwd(grad, *far, scaled, isa=isa))
    assert_grad(d_patches * factors[:, None], expected[0].double(), dtype)
    assert_grad(d_tokens * 2.0**90, expected[1].double(), dtype)
    patches[0, 3], tokens[2, 1] = 0, 0
    patches[1, 5] = 1e-40
    forward = spa_scores(patches, tokens, 40, isa=isa)
    grads = spa_scores_bwd(grad, patches, tokens, forward, isa=isa)
    assert all(x.isfinite().all() for x in (*forward, *grads))
    assert not grads[0][0, 3].any()
    assert not grads[0][1, 5].any()
    assert not grads[1][2, 1].any()
    # NaN is the largest, and spoils its image only.
    patches[0, 7, 2] = math.nan
    scores, indices, _ = topk(patches, tokens, 9, isa=isa)
    assert (indices[0, :, 0] == 7).all()
    assert scores[0, :, 0].isnan().all()
    assert scores[0, :, 1:].isfinite().all()
    spoiled = spa_scores(patches, tokens, 40, isa=isa)
    assert spoiled[0][0].isnan().all()
    assert same(tuple(x[1] for x in spoiled), tuple(x[1] for x in forward))


def test_patches_refuse() -> None:
    patches, tokens = features(1, 4, 2, 3, 8, torch.float32)
    for k in (0, 5):
        with pytest.raises(ValueError, match="k <= N"):
            topk(patches, tokens, k)
    with pytest.raises(ValueError, match="reduce"):
        topk(patches, tokens, 1, reduce="min")
    with pytest.raises(ValueError, match="M >= 1"):
        topk(patches, tokens[:, :0], 1)
    with pytest.raises(ValueError, match="eps"):
        spa_scores(patches, tokens, 1, eps=0.0)
    with pytest.raises(ValueError, match="max_iter"):
        spa_scores(patches, tokens, 1, max_iter=0)
    with pytest.raises(ValueError, match="256"):
        spa_scores(*features(1, 300, 1, 1, 2, torch.float32), 257)
    with pytest.raises(ValueError, match="isa"):
        topk(patches, tokens, 1, isa="sse")


@pytest.mark.parametrize(("B", "C"), [(0, 3), (3, 0), (0, 0)])
def test_patches_empty(B: int, C: int) -> None:
    patches, tokens = features(B, 5, C, 2, 4, torch.float32)
    assert topk(patches, tokens, 2)[0].shape == (B, C, 2)
    forward = spa_scores(patches, tokens, 2)
    assert forward[0].shape == (B, C)
