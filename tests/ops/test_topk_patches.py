from itertools import accumulate, pairwise

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from spa_fast import spa_scores, topk_patches
from spa_fast._backends import available
from spa_fast._features import by_length
from spa_fast._ops import patches as ops
from spa_fast._ops.selected import selected_sim, selected_sim_bwd
from spa_fast.patches import SOFTMAX_TEMPERATURE

REDUCES = ("max", "mean", "softmax")


def case(B=2, N=13, C=3, M=4, D=6, dtype=torch.float64, grad=False):
    g = torch.Generator().manual_seed(0)
    patches = torch.randn(B, N, D, generator=g, dtype=torch.float64).to(dtype).requires_grad_(grad)
    tokens = torch.randn(C, M, D, generator=g, dtype=torch.float64).to(dtype).requires_grad_(grad)
    return patches, tokens


def masks(B=2, N=13, C=3, M=4):
    patch_mask, token_mask = torch.ones(B, N, dtype=torch.bool), torch.ones(C, M, dtype=torch.bool)
    patch_mask[0, 2:9], token_mask[1, 1:3] = False, False
    return patch_mask, token_mask


def plain_relevance(patches, tokens, reduce):
    """[B, C, N] by einsum and autograd."""
    p = patches / patches.norm(dim=-1, keepdim=True)
    s = tokens / tokens.norm(dim=-1, keepdim=True)
    sim = torch.einsum("bnd,cmd->bcnm", p, s)
    if reduce == "max":
        return sim.amax(-1)
    return sim.mean(-1) if reduce == "mean" else ((sim / SOFTMAX_TEMPERATURE).softmax(-1) * sim).sum(-1)


@pytest.mark.parametrize("reduce", REDUCES)
@pytest.mark.parametrize("class_conditional", [True, False])
def test_topk_patches_matches_einsum_and_its_gradient(reduce, class_conditional):
    patches, tokens = case(grad=True)
    scores, indices = topk_patches(patches, tokens, 5, reduce=reduce, class_conditional=class_conditional)
    r = plain_relevance(patches, tokens, reduce)
    best = r if class_conditional else r.amax(1, keepdim=True).expand_as(r)
    assert torch.equal(indices, best.topk(5).indices)
    want = r.gather(2, indices)
    torch.testing.assert_close(scores, want, rtol=1e-11, atol=1e-14)
    grad = torch.randn_like(scores)
    got = torch.autograd.grad(scores, (patches, tokens), grad)
    for g, w in zip(got, torch.autograd.grad(want, (patches, tokens), grad), strict=True):
        torch.testing.assert_close(g, w, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("reduce", REDUCES)
def test_topk_patches_gradcheck(reduce):
    patches, tokens = case(B=1, N=6, C=2, M=3, D=4, grad=True)
    patch_mask, token_mask = torch.ones(1, 6, dtype=torch.bool), torch.ones(2, 3, dtype=torch.bool)
    patch_mask[0, 1], token_mask[0, 2] = False, False
    for masked in (None, patch_mask), (token_mask, patch_mask):
        tokens_on, patches_on = masked[0], masked[1]

        def scores(p, s, patches_on=patches_on, tokens_on=tokens_on):
            return topk_patches(p, s, 3, reduce=reduce, patch_mask=patches_on, token_mask=tokens_on)[0]

        assert torch.autograd.gradcheck(scores, (patches, tokens))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_topk_patches_dtypes(dtype):
    patches, tokens = case(dtype=dtype, grad=True)
    scores, indices = topk_patches(patches, tokens, 4)
    assert scores.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert indices.dtype == torch.int64
    scores.sum().backward()
    assert patches.grad.dtype == tokens.grad.dtype == dtype


def test_first_of_equal_tokens_takes_the_gradient():
    patches, tokens = case(grad=True)
    twins = torch.cat([tokens, tokens], 1)
    (grad,) = torch.autograd.grad(topk_patches(patches, twins, 5)[0].sum(), twins)
    assert grad[:, :4].any()
    assert not grad[:, 4:].any()


@pytest.mark.parametrize("reduce", REDUCES)
def test_masked_tokens_equal_absent_tokens(reduce):
    patches, tokens = case()
    _, token_mask = masks()
    scores, indices = topk_patches(patches, tokens, 5, reduce=reduce, token_mask=token_mask)
    alone, chosen = topk_patches(patches, tokens[1:2, [0, 3]], 5, reduce=reduce)
    assert torch.equal(indices[:, 1:2], chosen)
    torch.testing.assert_close(scores[:, 1:2], alone, rtol=1e-12, atol=1e-14)


def test_masked_patches_come_last_with_score_zero():
    patches, tokens = case()
    patch_mask, _ = masks()
    scores, indices = topk_patches(patches, tokens, 9, patch_mask=patch_mask)
    assert patch_mask[0][indices[0, :, :6]].all()
    assert torch.equal(indices[0, :, 6:], torch.tensor([2, 3, 4]).expand(3, 3))
    assert not scores[0, :, 6:].any()
    assert patch_mask[1][indices[1]].all()


def test_indices_carry_no_gradient():
    assert not topk_patches(*case(grad=True), 5)[1].requires_grad


def signs(n, m, D=16):
    """Entries of +-1: cosines are multiples of 1 / 8, exact in any order of summation, and many are equal."""
    g = torch.Generator().manual_seed(3)
    return torch.randint(0, 2, (n, m, D), generator=g).mul_(2).sub_(1).float()


@pytest.mark.parametrize("reduce", REDUCES)
@pytest.mark.parametrize("class_conditional", [True, False])
@pytest.mark.parametrize("k", [1, 7, 16, 64])
def test_backends_agree_with_the_reference(backend_device, reduce, class_conditional, k):
    backend, device = backend_device
    g = torch.Generator().manual_seed(k)
    patches, tokens = torch.randn(3, 64, 40, generator=g), torch.randn(5, 6, 40, generator=g)
    patch_mask, token_mask = torch.rand(3, 64, generator=g) > 0.2, torch.rand(5, 6, generator=g) > 0.3
    patch_mask[1], token_mask[3] = False, False
    patches[0, 5], tokens[1, 2] = 0, 0
    for mask in (False, True):
        on = {"patch_mask": patch_mask, "token_mask": token_mask} if mask else {}
        options = {"reduce": reduce, "class_conditional": class_conditional}
        want, indices = topk_patches(patches, tokens, k, backend="reference", **options, **on)
        on = {name: x.to(device) for name, x in on.items()}
        got, found = topk_patches(patches.to(device), tokens.to(device), k, backend=backend, **options, **on)
        torch.testing.assert_close(got.cpu(), want, rtol=1e-5, atol=2e-6)
        # Values that rounding could swap are further apart than this seed's rounding.
        assert torch.equal(found.cpu(), indices)


@pytest.mark.parametrize("reduce", ["max", "mean"])
@pytest.mark.parametrize("k", [1, 9, 50])
def test_ties_go_to_the_lowest_index_on_every_backend(backend_device, reduce, k):
    backend, device = backend_device
    patches, tokens = signs(2, 50), signs(3, 4)
    want = topk_patches(patches.double(), tokens.double(), k, reduce=reduce)
    _, indices, argmax = ops.topk_patches(
        patches.to(device), tokens.to(device), None, None, k, reduce, True, backend
    )
    assert torch.equal(indices.cpu(), want[1])
    if reduce == "max":
        sim = torch.einsum("bnd,cmd->bcnm", patches, tokens).gather(
            2, want[1][..., None].expand(-1, -1, -1, 4)
        )
        assert torch.equal(argmax.cpu().long(), sim.argmax(-1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_backends_take_narrow_features(backend_device, dtype):
    backend, device = backend_device
    patches, tokens = case(N=33, D=24, dtype=dtype)
    want = topk_patches(patches.double(), tokens.double(), 6)
    got = topk_patches(patches.to(device), tokens.to(device), 6, backend=backend)
    assert got[0].dtype == torch.float32
    torch.testing.assert_close(got[0].double().cpu(), want[0], rtol=1e-5, atol=2e-6)
    assert torch.equal(got[1].cpu(), want[1])


@pytest.mark.parametrize("reduce", REDUCES)
def test_backends_give_the_reference_gradient(backend_device, reduce):
    backend, device = backend_device
    patches, tokens = case(B=3, N=20, D=16, dtype=torch.float32, grad=True)
    want = torch.autograd.grad(
        topk_patches(patches, tokens, 5, reduce=reduce, backend="reference")[0].sum(), (patches, tokens)
    )
    on = [x.detach().to(device).requires_grad_() for x in (patches, tokens)]
    got = torch.autograd.grad(topk_patches(*on, 5, reduce=reduce, backend=backend)[0].sum(), on)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g.cpu(), w, rtol=1e-4, atol=1e-6)


def test_ragged_tokens_equal_a_mask():
    patches, tokens = case(grad=True)
    _, token_mask = masks()
    flat = torch.cat([t[on] for t, on in zip(tokens, token_mask, strict=True)])
    scores, indices = topk_patches(patches, flat, 5, cu_tokens=[0, 4, 6, 10])
    want, chosen = topk_patches(patches, tokens, 5, token_mask=token_mask)
    assert torch.equal(indices, chosen)
    torch.testing.assert_close(scores, want, rtol=1e-12, atol=1e-14)
    got = torch.autograd.grad(scores.sum(), (patches, tokens), retain_graph=True)
    for g, w in zip(got, torch.autograd.grad(want.sum(), (patches, tokens)), strict=True):
        torch.testing.assert_close(g, w)
    with pytest.raises(ValueError, match="cu_tokens"):
        topk_patches(patches, flat, 5, cu_tokens=[0, 4, 11])


@pytest.mark.parametrize("reduce", REDUCES)
def test_image_or_class_without_anything_scores_zero(reduce):
    patches, tokens = case(grad=True)
    patch_mask, token_mask = torch.ones(2, 13, dtype=torch.bool), torch.ones(3, 4, dtype=torch.bool)
    patch_mask[1], token_mask[2] = False, False
    scores, indices = topk_patches(
        patches, tokens, 5, reduce=reduce, patch_mask=patch_mask, token_mask=token_mask
    )
    assert not scores[1].any()
    assert not scores[:, 2].any()
    assert torch.equal(indices[1], torch.arange(5).expand(3, 5))
    grads = torch.autograd.grad(scores.sum(), (patches, tokens))
    assert all(grad.isfinite().all() for grad in grads)
    assert not grads[0][1].any()
    assert not grads[1][2].any()


def test_strides_do_not_matter():
    patches, tokens = case(dtype=torch.float32)
    want = topk_patches(patches, tokens, 5)
    wide = torch.randn(2, 13, 12)[..., ::2].copy_(patches)
    turned = patches.transpose(1, 2).contiguous().transpose(1, 2)
    for p in (wide, turned):
        for g, w in zip(topk_patches(p, tokens, 5), want, strict=True):
            torch.testing.assert_close(g, w)
    one = patches[:1].expand(4, -1, -1)
    assert torch.equal(topk_patches(one, tokens, 5)[1], want[1][:1].expand(4, -1, -1))


@pytest.mark.parametrize(("B", "C"), [(0, 3), (2, 0)])
@pytest.mark.parametrize("reduce", REDUCES)
def test_empty_batches_are_differentiable(B, C, reduce):
    patches = torch.randn(B, 13, 6, requires_grad=True)
    tokens = torch.randn(C, 4, 6, requires_grad=True)
    scores, indices = topk_patches(patches, tokens, 5, reduce=reduce)
    assert scores.shape == indices.shape == (B, C, 5)
    scores.sum().backward()
    assert patches.grad.shape == patches.shape
    assert not tokens.grad.any()


@pytest.mark.parametrize("need", [(True, False), (False, True), (True, True)])
def test_gradient_of_one_side_only(need):
    patches, tokens = case()
    patches.requires_grad_(need[0])
    tokens.requires_grad_(need[1])
    both = [x.detach().requires_grad_() for x in (patches, tokens)]
    want = torch.autograd.grad(topk_patches(*both, 5)[0].sum(), both)
    topk_patches(patches, tokens, 5)[0].sum().backward()
    for x, on, w in zip((patches, tokens), need, want, strict=True):
        assert torch.equal(x.grad, w) if on else x.grad is None


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_extreme_scales(scale):
    patches, tokens = case(dtype=torch.float32)
    scores, indices = topk_patches(patches, tokens, 5)
    far, same = topk_patches(patches * scale, tokens / scale, 5)
    assert torch.equal(indices, same)
    torch.testing.assert_close(far, scores)


@pytest.mark.parametrize("reduce", REDUCES)
@pytest.mark.parametrize("masked", [False, True])
def test_opcheck(backend_device, reduce, masked):
    backend, device = backend_device
    patch_mask, token_mask = (x.to(device) for x in masks()) if masked else (None, None)
    for grad in (False, True):
        patches, tokens = (x.detach().to(device).requires_grad_(grad) for x in case(dtype=torch.float32))
        torch.library.opcheck(
            ops.topk_patches, (patches, tokens, patch_mask, token_mask, 5, reduce, True, backend)
        )


def test_opcheck_of_backwards():
    patches, tokens = case()
    patch_mask, token_mask = masks()
    scores, indices, argmax = ops.topk_patches(
        patches, tokens, patch_mask, token_mask, 5, "max", True, "reference"
    )
    on = (patch_mask, token_mask)
    chosen = (patches, tokens, indices)
    torch.library.opcheck(
        ops.topk_patches_bwd, (torch.randn_like(scores), *chosen, argmax, *on, "max", True, False)
    )
    grad = torch.randn(2, 3, 5, 4, dtype=torch.float64)
    torch.library.opcheck(selected_sim_bwd, (grad, *chosen, *on, True, False))
    leaves = [x.detach().requires_grad_() for x in (patches, tokens)]
    torch.library.opcheck(selected_sim, (*leaves, indices, *on))


def test_compiles_in_one_graph_and_once_for_all_batch_sizes():
    patches, tokens = case(dtype=torch.float32, B=4, grad=True)
    counter = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()

    @torch.compile(fullgraph=True, backend=counter)
    def scores(p, s):
        return topk_patches(p, s, 5, reduce="softmax")[0]

    for B in (4, 3, 2):
        p = patches[:B].detach().requires_grad_()
        torch._dynamo.mark_dynamic(p, 0)
        torch.testing.assert_close(scores(p, tokens), topk_patches(p, tokens, 5, reduce="softmax")[0])
    assert counter.frame_count == 1


def test_autocast_keeps_fp32():
    patches, tokens = case(dtype=torch.float32, D=64, grad=True)
    want, _ = topk_patches(patches, tokens, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores, _ = topk_patches(patches, tokens, 5)
        grads = torch.autograd.grad(scores.sum(), (patches, tokens))
    assert torch.equal(scores, want)
    for g, w in zip(grads, torch.autograd.grad(want.sum(), (patches, tokens)), strict=True):
        torch.testing.assert_close(g, w)


@pytest.mark.parametrize("k", [0, -1, 14])
def test_k_out_of_range_names_both_numbers(k):
    with pytest.raises(ValueError, match=rf"N = 13.*got {k}"):
        topk_patches(*case(), k)


def test_refusals():
    patches, tokens = case()
    with pytest.raises(ValueError, match="tokens: expected M >= 1"):
        topk_patches(patches, tokens[:, :0], 3)
    with pytest.raises(ValueError, match=r"tokens: expected .* width"):
        topk_patches(patches, tokens[..., :5], 3)
    with pytest.raises(ValueError, match="patches: expected"):
        topk_patches(patches[0], tokens, 3)
    with pytest.raises(TypeError, match="tokens: expected the dtype"):
        topk_patches(patches, tokens.float(), 3)
    with pytest.raises(TypeError, match="patches: expected fp16"):
        topk_patches(patches.long(), tokens.long(), 3)
    with pytest.raises(ValueError, match="reduce"):
        topk_patches(patches, tokens, 3, reduce="maximum")
    with pytest.raises(RuntimeError, match=r"native.* (got torch.float64|not been built)"):
        topk_patches(patches, tokens, 3, backend="native")
    with pytest.raises(ValueError, match="backend"):
        topk_patches(patches, tokens, 3, backend="cuda")
    with pytest.raises(TypeError, match="patch_mask: expected bool"):
        topk_patches(patches, tokens, 3, patch_mask=torch.ones(2, 13))
    with pytest.raises(ValueError, match="token_mask"):
        topk_patches(patches, tokens, 3, token_mask=torch.ones(2, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match="tokens: expected the device of patches, cpu, got meta"):
        topk_patches(patches, tokens.to("meta"), 3)


@pytest.mark.skipif(available()["native"] is not None, reason="native is not built")
@pytest.mark.parametrize(("N", "M", "k", "word"), [(1025, 2, 3, "N"), (9, 257, 3, "M")])
def test_a_named_backend_refuses_what_it_does_not_take(N, M, k, word):
    patches, tokens = torch.randn(1, N, 4), torch.randn(1, M, 4)
    with pytest.raises(RuntimeError, match=rf"native.*it takes {word} <="):
        topk_patches(patches, tokens, k, backend="native")
    assert topk_patches(patches, tokens, k)[0].shape == (1, 1, k)


@pytest.mark.parametrize("class_conditional", [True, False])
def test_all_of_the_most_patches_can_be_kept(backend_device, class_conditional):
    backend, device = backend_device
    patches, tokens = signs(1, 1024), signs(2, 2)
    options = {"reduce": "mean", "class_conditional": class_conditional}
    want = topk_patches(patches.double(), tokens.double(), 1024, **options)
    got = topk_patches(patches.to(device), tokens.to(device), 1024, **options, backend=backend)
    assert torch.equal(got[1].cpu(), want[1])
    torch.testing.assert_close(got[0].cpu().double(), want[0], rtol=0, atol=1e-6)


def test_nan_is_refused_unless_masked():
    patches, tokens = case()
    patch_mask, _ = masks()
    patches[0, 4, 1] = torch.nan
    with pytest.raises(ValueError, match=r"patches: .*image 0, patch 4"):
        topk_patches(patches, tokens, 3)
    scores, _ = topk_patches(patches, tokens, 13, patch_mask=patch_mask)
    assert scores.isfinite().all()
    tokens[2, 3] = torch.inf
    with pytest.raises(ValueError, match=r"tokens: .*class 2, token 3"):
        topk_patches(patches, tokens, 3, patch_mask=patch_mask)


LENGTHS = [4, 1, 0, 3, 40, 4, 2, 300]


@pytest.mark.parametrize("masked", [False, True])
def test_classes_of_very_different_lengths_go_in_groups(masked):
    offsets = [0, *accumulate(LENGTHS)]
    patches, flat = torch.randn(3, 20, 12), torch.randn(offsets[-1], 12, requires_grad=True)
    mask = torch.rand(offsets[-1]) < 0.7 if masked else None
    assert [group.classes.tolist() for group in by_length(flat, mask, offsets)] == [
        [1, 2],
        [3, 6],
        [0, 5],
        [4],
        [7],
    ]
    scores, indices = topk_patches(patches, flat, 5, token_mask=mask, cu_tokens=torch.tensor(offsets))
    aligned = spa_scores(patches, flat, 5, token_mask=mask, cu_tokens=offsets)
    weights = torch.randn(3, len(LENGTHS))
    grad = torch.autograd.grad((aligned * weights).sum(), flat)[0]
    for c, (start, end) in enumerate(pairwise(offsets)):
        own = flat[start:end].detach() if end > start else torch.zeros(1, 12)
        own, on = (
            own.clone().requires_grad_(),
            None if mask is None or end == start else mask[None, start:end],
        )
        want = topk_patches(patches, own[None], 5, token_mask=on)
        assert torch.equal(indices[:, c], want[1][:, 0])
        torch.testing.assert_close(scores[:, c], want[0][:, 0])
        if end == start:
            assert (aligned[:, c] == 0).all()
            continue
        alone = spa_scores(patches, own[None], 5, token_mask=on)
        torch.testing.assert_close(aligned[:, c], alone[:, 0], atol=1e-5, rtol=1e-5)
        of_own = torch.autograd.grad((alone[:, 0] * weights[:, c]).sum(), own)[0]
        torch.testing.assert_close(grad[start:end], of_own, atol=1e-5, rtol=1e-4)


def test_classes_of_similar_lengths_are_padded_at_once():
    assert by_length(torch.randn(11, 3), None, [0, 4, 7, 11]) == []
    with pytest.raises(ValueError, match="cu_tokens: expected offsets rising from 0 to 50"):
        topk_patches(torch.randn(1, 4, 3), torch.randn(50, 3), 2, cu_tokens=[0, 40, 41, 41, 49])
    with pytest.raises(ValueError, match=r"token_mask: expected \[sum M\]"):
        topk_patches(
            torch.randn(1, 4, 3),
            torch.randn(50, 3),
            2,
            cu_tokens=[0, 48, 49, 50],
            token_mask=torch.ones(9) > 0,
        )
