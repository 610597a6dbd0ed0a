import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from spa_fast import patches as module
from spa_fast import sinkhorn_align, spa_scores, topk_patches
from spa_fast.patches import align_selected, select_indices

OPTIONS = {"eps": 0.1, "max_iter": 200, "tol": 1e-9}


def case(B=3, N=12, C=4, M=5, D=6, dtype=torch.float64, grad=False, seed=0):
    g = torch.Generator().manual_seed(seed)
    patches = torch.randn(B, N, D, generator=g, dtype=torch.float64).to(dtype).requires_grad_(grad)
    tokens = torch.randn(C, M, D, generator=g, dtype=torch.float64).to(dtype).requires_grad_(grad)
    return patches, tokens


def masks(B=3, N=12, C=4, M=5):
    patch_mask, token_mask = torch.ones(B, N, dtype=torch.bool), torch.ones(C, M, dtype=torch.bool)
    patch_mask[0, 1:9], token_mask[1, 2:], token_mask[3, 0] = False, False, False
    return patch_mask, token_mask


def one_by_one(patches, tokens, k, patch_mask=None, token_mask=None, **options):
    """Each pair on its own: drop what is masked, select, gather the features, align."""
    scores = []
    for b in range(len(patches)):
        for c in range(len(tokens)):
            p = patches[b] if patch_mask is None else patches[b][patch_mask[b]]
            s = tokens[c] if token_mask is None else tokens[c][token_mask[c]]
            _, indices = topk_patches(p[None], s[None], min(k, len(p)))
            scores.append(sinkhorn_align(p[indices[0, 0]][None], s[None], **options)[0, 0])
    return torch.stack(scores).view(len(patches), len(tokens))


@pytest.mark.parametrize("k", [1, 4, 12])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("solver", ["sinkhorn", "uniform", "double_softmax", "max_mean"])
def test_spa_scores_equals_one_pair_at_a_time(k, masked, solver):
    patches, tokens = case()
    patch_mask, token_mask = masks() if masked else (None, None)
    got = spa_scores(
        patches, tokens, k, patch_mask=patch_mask, token_mask=token_mask, solver=solver, **OPTIONS
    )
    want = one_by_one(patches, tokens, k, patch_mask, token_mask, solver=solver, **OPTIONS)
    torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("grad", ["envelope", "implicit"])
def test_gradient_equals_one_pair_at_a_time(grad):
    patches, tokens = case(grad=True)
    patch_mask, token_mask = masks()
    weight = torch.randn(3, 4, dtype=torch.float64)
    got = spa_scores(patches, tokens, 4, patch_mask=patch_mask, token_mask=token_mask, grad=grad, **OPTIONS)
    want = one_by_one(patches, tokens, 4, patch_mask, token_mask, grad=grad, **OPTIONS)
    got = torch.autograd.grad(got, (patches, tokens), weight)
    for g, w in zip(got, torch.autograd.grad(want, (patches, tokens), weight), strict=True):
        torch.testing.assert_close(g, w, rtol=1e-6, atol=1e-8)


def test_implicit_gradient_by_finite_differences():
    patches, tokens = case(B=1, N=5, C=2, M=3, D=4, grad=True)
    options = {"eps": 0.3, "max_iter": 500, "tol": 1e-13}

    def scores(p, s):
        return spa_scores(p, s, 3, grad="implicit", **options)

    assert torch.autograd.gradcheck(scores, (patches, tokens), atol=1e-5)


def test_all_patches_is_sinkhorn_align():
    patches, tokens = case()
    torch.testing.assert_close(
        spa_scores(patches, tokens, 12, **OPTIONS),
        sinkhorn_align(patches, tokens, **OPTIONS),
        rtol=1e-7,
        atol=1e-9,
    )


@pytest.mark.parametrize(("k", "M"), [(1, 5), (4, 1)])
def test_one_patch_or_one_token_is_the_mean_cosine(k, M):
    patches, tokens = case(M=M)
    mean = topk_patches(patches, tokens, k, reduce="mean")[0].mean(-1)
    got = spa_scores(patches, tokens, k, reduce="mean", **OPTIONS)
    torch.testing.assert_close(got, mean, rtol=1e-9, atol=1e-12)


def test_selection_in_another_space():
    patches, tokens = case(grad=True)
    frozen_patches, frozen_tokens = case(D=9, M=7, dtype=torch.float32, grad=True, seed=1)
    got = spa_scores(
        patches, tokens, 4, select_patches=frozen_patches, select_tokens=frozen_tokens, **OPTIONS
    )
    indices = select_indices(frozen_patches, frozen_tokens, 4)
    torch.testing.assert_close(got, align_selected(patches, tokens, indices, **OPTIONS), rtol=0, atol=0)
    got.sum().backward()
    assert patches.grad.any()
    assert frozen_patches.grad is None


def test_same_space_named_twice_changes_nothing():
    patches, tokens = case(grad=True)
    twice = spa_scores(patches, tokens, 4, select_patches=patches, select_tokens=tokens, **OPTIONS)
    once = spa_scores(patches, tokens, 4, **OPTIONS)
    torch.testing.assert_close(once, twice, rtol=1e-12, atol=0)
    grads = [torch.autograd.grad(s.sum(), (patches, tokens)) for s in (once, twice)]
    for g, w in zip(*grads, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("class_conditional", [True, False])
def test_chunks_do_not_change_scores(class_conditional, monkeypatch):
    patches, tokens = case(B=7)
    patch_mask, token_mask = masks(B=7)
    frozen = case(B=7, D=9, seed=1)

    def scores():
        shared = {"patch_mask": patch_mask, "token_mask": token_mask, **OPTIONS}
        both = {"class_conditional": class_conditional, **shared}
        indices = select_indices(*frozen, 4, class_conditional=class_conditional, patch_mask=patch_mask)
        weights = torch.rand(7, 4, 4, generator=torch.Generator().manual_seed(2))
        return (
            spa_scores(patches, tokens, 4, **both),
            spa_scores(patches, tokens, 4, select_patches=frozen[0], select_tokens=frozen[1], **both),
            align_selected(patches, tokens, indices, weights=weights, **shared),
        )

    whole = scores()
    monkeypatch.setattr(module, "_CHUNK", 4 * 5 * 4 * 2)
    for got, want in zip(scores(), whole, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


def test_layouts_do_not_matter():
    """Expanded indices, transposed and expanded features: the same scores and gradients."""
    patches, tokens = case(grad=True)
    indices = torch.arange(3).expand(3, 4, 3)
    inputs = patches.detach().transpose(0, 1).contiguous().transpose(0, 1), tokens.detach().mT.contiguous().mT
    inputs = tuple(x.requires_grad_() for x in inputs)
    results = []
    for p, s, i in ((patches, tokens, indices.contiguous()), (*inputs, indices)):
        score = align_selected(p, s, i, **OPTIONS)
        results.append((score, *torch.autograd.grad(score.square().sum(), (p, s))))
    for plain, strided in zip(*results, strict=True):
        torch.testing.assert_close(strided, plain)


def test_weights_of_the_kept_patches():
    patches, tokens = case()
    indices = select_indices(patches, tokens, 4)
    uniform = align_selected(patches, tokens, indices, **OPTIONS)
    torch.testing.assert_close(
        align_selected(patches, tokens, indices, weights=torch.full((4,), 3.0), **OPTIONS), uniform
    )
    weights = torch.zeros(3, 4, 4)
    weights[..., :2] = 0.5
    torch.testing.assert_close(
        align_selected(patches, tokens, indices, weights=weights, **OPTIONS),
        align_selected(patches, tokens, indices[..., :2], **OPTIONS),
        rtol=1e-8,
        atol=1e-9,
    )


def test_fully_masked_image_or_class_scores_zero_with_gradient_zero():
    patches, tokens = case(grad=True)
    patch_mask, token_mask = torch.ones(3, 12, dtype=torch.bool), torch.ones(4, 5, dtype=torch.bool)
    patch_mask[1], token_mask[2] = False, False
    scores = spa_scores(patches, tokens, 4, patch_mask=patch_mask, token_mask=token_mask)
    assert not scores[1].any()
    assert not scores[:, 2].any()
    scores.sum().backward()
    assert patches.grad.isfinite().all()
    assert not patches.grad[1].any()
    assert not tokens.grad[2].any()


@pytest.mark.parametrize(("B", "C"), [(0, 4), (3, 0)])
def test_empty_batches_are_differentiable(B, C):
    patches, tokens = torch.randn(B, 12, 6, requires_grad=True), torch.randn(C, 5, 6, requires_grad=True)
    scores = spa_scores(patches, tokens, 4)
    assert scores.shape == (B, C)
    scores.sum().backward()
    assert patches.grad.shape == patches.shape


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_low_precision_follows_fp64(dtype):
    patches, tokens = case(B=2, N=63, M=6, D=48, dtype=dtype)
    got = spa_scores(patches, tokens, 9, eps=0.1, max_iter=50, tol=0)
    indices = select_indices(patches, tokens, 9)
    want = align_selected(patches.double(), tokens.double(), indices, eps=0.1, max_iter=50, tol=0)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("grad", [False, True])
def test_compiles_in_one_graph_and_once_for_all_batch_sizes(grad):
    patches, tokens = case(B=5, dtype=torch.float32, grad=grad)
    counter = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()

    @torch.compile(fullgraph=True, backend=counter)
    def scores(p, s):
        return spa_scores(p, s, 4)

    for B in (5, 4, 3):
        p = patches[:B].detach().requires_grad_(grad)
        torch._dynamo.mark_dynamic(p, 0)
        torch.testing.assert_close(scores(p, tokens), spa_scores(p, tokens, 4))
    assert counter.frame_count == 1


def test_refusals():
    patches, tokens = case()
    for k in (0, 13):
        with pytest.raises(ValueError, match=rf"N = 12.*got {k}"):
            spa_scores(patches, tokens, k)
    with pytest.raises(ValueError, match="eps"):
        spa_scores(patches, tokens, 4, eps=0.0)
    with pytest.raises(ValueError, match="M >= 1"):
        spa_scores(patches, tokens[:, :0], 4)
    with pytest.raises(ValueError, match="solver"):
        spa_scores(patches, tokens, 4, solver="emd")
    with pytest.raises(ValueError, match="both or neither"):
        spa_scores(patches, tokens, 4, select_patches=patches)
    with pytest.raises(ValueError, match="select_patches"):
        spa_scores(patches, tokens, 4, select_patches=patches[:, :5], select_tokens=tokens)
    with pytest.raises(ValueError, match="select_tokens"):
        spa_scores(patches, tokens, 4, select_patches=patches, select_tokens=tokens[:2])
    bad = tokens.clone()
    bad[1] = torch.nan
    with pytest.raises(ValueError, match=r"select_tokens: .*class 1"):
        spa_scores(patches, tokens, 4, select_patches=patches, select_tokens=bad)
    indices = select_indices(patches, tokens, 4)
    with pytest.raises(TypeError, match="indices"):
        align_selected(patches, tokens, indices.int())
    with pytest.raises(ValueError, match="indices"):
        align_selected(patches, tokens, indices[:2])
    with pytest.raises(ValueError, match=r"indices: .*N = 12"):
        align_selected(patches, tokens, indices + 12)
    with pytest.raises(ValueError, match="weights"):
        align_selected(patches, tokens, indices, weights=torch.ones(3, 2, 4))
