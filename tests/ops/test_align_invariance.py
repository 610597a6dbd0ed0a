"""Bitwise: an image or class scores the same alone and in a batch, masked and sliced."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from spa_fast import SinkhornAlign, sinkhorn_align, transport

# (images, classes, patches, tokens, width): around the block sizes of matrix products.
SIZES = [(3, 4, 6, 5, 8), (5, 7, 32, 16, 64), (2, 33, 16, 5, 512), (17, 3, 49, 9, 96)]
OPTIONS = [
    {},
    {"tol": 0, "max_iter": 20},
    {"score": "value"},
    {"eps": 0.01},
    {"normalize": False, "eps": 30.0},
]


def features(size: tuple[int, ...], device: str) -> tuple[Tensor, Tensor]:
    B, C, K, M, D = size
    return torch.randn(B, K, D, device=device), torch.randn(C, M, D, device=device)


def on_device(backend: str, device: str) -> None:
    if device == "cuda" and backend == "reference":
        pytest.skip("the contract holds for the CPU and for triton")


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_one_image_or_class_is_the_batch_bitwise(
    backend_device: tuple[str, str], size: tuple[int, ...], options: dict[str, object]
) -> None:
    backend, device = backend_device
    on_device(backend, device)
    align = SinkhornAlign(backend=backend, **options)
    patches, tokens = features(size, device)
    every = align(patches, tokens)
    for i in (0, size[0] - 1):
        assert torch.equal(align(patches[i : i + 1], tokens), every[i : i + 1])
    for c in (0, size[1] - 1):
        assert torch.equal(align(patches, tokens[c : c + 1]), every[:, c : c + 1])
    assert torch.equal(align(patches[1:2], tokens[1:2]), every[1:2, 1:2])


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_mask_is_slice_bitwise(
    backend_device: tuple[str, str], size: tuple[int, ...], options: dict[str, object]
) -> None:
    backend, device = backend_device
    on_device(backend, device)
    if device == "cuda":
        pytest.skip("a mask is a slice bitwise on the CPU")
    align = SinkhornAlign(backend=backend, **options)
    patches, tokens = features(size, device)
    B, C, K, M, _ = size
    k, m = (2 * K) // 3, (M + 1) // 2
    patch_mask = (torch.arange(K) < k).expand(B, K)
    token_mask = (torch.arange(M) < m).expand(C, M)
    masked = align(patches, tokens, patch_mask=patch_mask, token_mask=token_mask)
    assert torch.equal(masked, align(patches[:, :k], tokens[:, :m]))
    assert torch.equal(align(patches, tokens, token_mask=token_mask), align(patches, tokens[:, :m]))
    assert torch.equal(align(patches, tokens, patch_mask=patch_mask), align(patches[:, :k], tokens))


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_ragged_class_is_itself_alone_bitwise(backend_device: tuple[str, str], size: tuple[int, ...]) -> None:
    backend, device = backend_device
    on_device(backend, device)
    if device == "cuda":
        pytest.skip("a mask is a slice bitwise on the CPU")
    align = SinkhornAlign(backend=backend)
    patches, tokens = features(size, device)
    tokens = tokens.flatten(0, 1)
    offsets = [0, 1, 1, len(tokens) // 2, len(tokens)]
    scores = align(patches, tokens, cu_tokens=offsets)
    assert not scores[:, 1].any()
    for c in (0, 2, 3):
        alone = align(patches, tokens[None, offsets[c] : offsets[c + 1]])
        assert torch.equal(scores[:, c : c + 1], alone)


def test_chunks_change_no_bit(backend_device: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    backend, device = backend_device
    on_device(backend, device)
    align = SinkhornAlign(backend=backend)
    patches, tokens = features((7, 4, 6, 5, 32), device)
    whole = align(patches, tokens)
    monkeypatch.setattr(transport, "_CHUNK", 300)
    assert torch.equal(align(patches, tokens), whole)


@pytest.mark.parametrize("size", SIZES[:2], ids=str)
def test_gradient_of_one_image_is_that_of_the_batch_bitwise(
    backend_device: tuple[str, str], size: tuple[int, ...]
) -> None:
    """Of the patches: each image's gradient comes from its own scores alone."""
    backend, device = backend_device
    on_device(backend, device)
    align = SinkhornAlign(backend=backend)
    patches, tokens = (x.requires_grad_() for x in features(size, device))
    (every,) = torch.autograd.grad(align(patches, tokens).sum(), patches)
    (alone,) = torch.autograd.grad(align(patches[:1], tokens).sum(), patches)
    assert torch.equal(every[0], alone[0])


def test_same_call_twice_gives_the_same_bits(backend_device: tuple[str, str]) -> None:
    backend, device = backend_device
    patches, tokens = features(SIZES[1], device)
    tokens.requires_grad_()
    grads = []
    for _ in range(2):
        scores = SinkhornAlign(backend=backend)(patches, tokens)
        grads.append((scores, *torch.autograd.grad(scores.square().sum(), tokens)))
    assert all(torch.equal(x, y) for x, y in zip(*grads, strict=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_alone_is_the_batch_bitwise(dtype: torch.dtype) -> None:
    patches, tokens = (x.to(dtype) for x in features((4, 5, 7, 33, 197), "cpu"))
    every = sinkhorn_align(patches, tokens)
    assert torch.equal(sinkhorn_align(patches[2:3], tokens), every[2:3])
    order = torch.randperm(5)
    assert torch.equal(sinkhorn_align(patches, tokens[order]), every[:, order])


def test_align_own_tokens_and_pairs_as_shared() -> None:
    patches, tokens = features((4, 6, 16, 5, 512), "cpu")
    want = sinkhorn_align(patches, tokens)
    assert torch.equal(sinkhorn_align(patches, tokens[None].expand(4, -1, -1, -1)), want)
    paired = SinkhornAlign.paired()
    for c in range(6):
        assert torch.equal(paired(patches, tokens[c].expand(4, -1, -1)), want[:, c])


def test_align_layout_and_threads() -> None:
    patches, tokens = features((5, 30, 16, 6, 64), "cpu")
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
