"""On a CPU with compiled code the score of an image and a class is theirs alone, bit for bit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from spa_fast import SinkhornAlign, _backends, sinkhorn_align

pytestmark = pytest.mark.skipif(
    _backends.available()["native"] is not None, reason="the compiled extension is absent"
)


def features(B: int, C: int, K: int, M: int, D: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(B + C + D)
    return (torch.randn(n, m, D, generator=generator).to(dtype) for n, m in ((B, K), (C, M)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "size", [(5, 7, 16, 6, 63), (3, 40, 32, 16, 512), (2, 3, 1, 1, 1), (4, 5, 7, 33, 197)], ids=str
)
def test_align_alone_as_in_a_batch(size: tuple[int, ...], dtype: torch.dtype) -> None:
    patches, tokens = features(*size, dtype)
    align = SinkhornAlign(eps=0.05, return_plan=True)
    want = align(patches, tokens)
    for b in range(patches.shape[0]):
        assert torch.equal(align(patches[b : b + 1], tokens).plan[0], want.plan[b])
    for start, step in ((0, 2), (1, 3), (2, 1)):
        got = align(patches, tokens[start::step])
        assert torch.equal(got.score, want.score[:, start::step])
        assert torch.equal(got.g, want.g[:, start::step])
    order = torch.randperm(tokens.shape[0])
    assert torch.equal(align(patches, tokens[order]).score, want.score[:, order])


def test_align_mask_is_a_slice() -> None:
    patches, tokens = features(4, 9, 16, 12, 197, torch.float32)
    want = sinkhorn_align(patches[:, :11], tokens[:, :7])
    patch_mask = (torch.arange(16) < 11).expand(4, 16)
    token_mask = (torch.arange(12) < 7).expand(9, 12)
    assert torch.equal(sinkhorn_align(patches, tokens, patch_mask=patch_mask, token_mask=token_mask), want)


def test_align_ragged_as_alone() -> None:
    patches, tokens = features(3, 12, 8, 1, 129, torch.float32)
    rows = tokens[:, 0]
    got = sinkhorn_align(patches, rows, cu_tokens=(0, 5, 7, 12))
    for c, (start, end) in enumerate(((0, 5), (5, 7), (7, 12))):
        assert torch.equal(got[:, c : c + 1], sinkhorn_align(patches, rows[None, start:end]))


def test_align_own_tokens_and_pairs_as_shared() -> None:
    patches, tokens = features(4, 6, 16, 5, 512, torch.float32)
    want = sinkhorn_align(patches, tokens)
    assert torch.equal(sinkhorn_align(patches, tokens[None].expand(4, -1, -1, -1)), want)
    paired = SinkhornAlign.paired()
    for c in range(6):
        assert torch.equal(paired(patches, tokens[c].expand(4, -1, -1)), want[:, c])


def test_align_layout_and_threads() -> None:
    patches, tokens = features(5, 30, 16, 6, 64, torch.float32)
    want = sinkhorn_align(patches, tokens)
    wide = torch.randn(5, 16, 100)
    wide[..., 7:71] = patches
    assert torch.equal(
        sinkhorn_align(wide[..., 7:71], tokens.transpose(1, 2).contiguous().transpose(1, 2)), want
    )
    threads = torch.get_num_threads()
    try:
        for n in (1, 3):
            torch.set_num_threads(n)
            assert torch.equal(sinkhorn_align(patches, tokens), want)
    finally:
        torch.set_num_threads(threads)
