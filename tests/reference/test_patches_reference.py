import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spa_fast.reference import patches as ref
from spa_fast.reference import similarity
from spa_fast.reference.sinkhorn import sinkhorn_fwd

REDUCES = ("max", "mean", "softmax")


def case(B=3, N=11, C=4, M=5, D=7, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    patches = torch.randn(B, N, D, generator=g, dtype=torch.float64)
    tokens = torch.randn(C, M, D, generator=g, dtype=torch.float64)
    return patches.to(dtype), tokens.to(dtype)


def masks(B=3, N=11, C=4, M=5):
    g = torch.Generator().manual_seed(1)
    patch_mask = torch.rand(B, N, generator=g) > 0.3
    token_mask = torch.rand(C, M, generator=g) > 0.3
    token_mask[:, 0] = True
    return patch_mask, token_mask


def cosines(patches, tokens):
    p = patches / patches.norm(dim=-1, keepdim=True)
    s = tokens / tokens.norm(dim=-1, keepdim=True)
    return torch.einsum("bnd,cmd->bcnm", p, s)


def brute_relevance(sim, token_mask, reduce):
    """[B, C, N] by loops over Python numbers."""
    B, C, N, _ = sim.shape
    r = torch.zeros(B, C, N, dtype=sim.dtype)
    for b in range(B):
        for c in range(C):
            keep = range(sim.shape[3]) if token_mask is None else token_mask[c].nonzero().flatten().tolist()
            for n in range(N):
                values = [float(sim[b, c, n, j]) for j in keep]
                if reduce == "max":
                    r[b, c, n] = max(values)
                elif reduce == "mean":
                    r[b, c, n] = sum(values) / len(values)
                else:
                    e = [math.exp(v / ref.SOFTMAX_TEMPERATURE) for v in values]
                    r[b, c, n] = sum(x * v for x, v in zip(e, values, strict=True)) / sum(e)
    return r


def brute_topk(r, patch_mask, k):
    """Indices by sorting (masked, -r, index) tuples."""
    B, C, N = r.shape
    out = torch.empty(B, C, k, dtype=torch.int64)
    for b in range(B):
        hidden = [False] * N if patch_mask is None else (~patch_mask[b]).tolist()
        for c in range(C):
            order = sorted(range(N), key=lambda n: (hidden[n], 0.0 if hidden[n] else -float(r[b, c, n]), n))
            out[b, c] = torch.tensor(order[:k])
    return out


@pytest.mark.parametrize("reduce", REDUCES)
@pytest.mark.parametrize("class_conditional", [True, False])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("k", [1, 4, 11])
def test_topk_equals_brute_force(reduce, class_conditional, masked, k):
    patches, tokens = case()
    patch_mask, token_mask = masks() if masked else (None, None)
    sim = cosines(patches, tokens)
    r = brute_relevance(sim, token_mask, reduce)
    best = r if class_conditional else r.amax(1, keepdim=True).expand_as(r)
    want = brute_topk(best, patch_mask, k)
    scores, indices, argmax = ref.topk_patches_fwd(
        patches, tokens, patch_mask, token_mask, k, reduce, class_conditional
    )
    assert torch.equal(indices, want)
    on = torch.ones_like(indices, dtype=torch.bool)
    if masked:
        on = patch_mask[:, None].expand(-1, 4, -1).gather(2, indices)
        sim = sim.masked_fill(~token_mask[None, :, None], -math.inf)
    torch.testing.assert_close(scores, torch.where(on, r.gather(2, want), 0.0), rtol=1e-11, atol=1e-14)
    first = sim.argmax(-1).gather(2, want) if reduce == "max" else torch.zeros_like(want)
    assert torch.equal(argmax[on].long(), first[on])


@given(
    st.lists(
        st.sampled_from([-math.inf, -1.0, -0.25, -0.0, 0.0, 1e-45, 0.25, 0.5, 1.0, math.inf]), min_size=1
    ),
    st.integers(0, 2**31),
)
@settings(max_examples=150, deadline=None)
def test_first_topk_is_the_stable_sort(values, pick):
    r = torch.tensor(values, dtype=torch.float32)
    k = pick % len(values) + 1
    want = r.sort(descending=True, stable=True).indices[:k]
    assert torch.equal(similarity.first_topk(r, k), want)
    assert torch.equal(similarity.first_topk(r.double(), k), want)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_first_topk_puts_nan_of_either_sign_first(sign):
    r = torch.tensor([0.0, 1.0, math.copysign(math.nan, sign), -1.0])
    assert similarity.first_topk(r, 2).tolist() == [2, 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ties_go_to_the_lowest_index(dtype):
    patches = torch.zeros(1, 9, 4, dtype=dtype)
    patches[0, [2, 5, 7], 0] = 1.0
    patches[0, [1, 3], 1] = 1.0
    tokens = torch.zeros(1, 1, 4, dtype=dtype)
    tokens[0, 0, 0] = 2.0
    _, indices, _ = ref.topk_patches_fwd(patches, tokens, None, None, 7, "max", True)
    assert indices.tolist() == [[[2, 5, 7, 0, 1, 3, 4]]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("reduce", REDUCES)
def test_low_precision_follows_the_fp64_oracle(dtype, reduce):
    patches, tokens = case(B=2, N=63, C=3, M=6, D=48, dtype=dtype)
    scores, indices, _ = ref.topk_patches_fwd(patches, tokens, None, None, 9, reduce, True)
    exact = cosines(patches.double(), tokens.double())
    assert scores.dtype == torch.float32
    sim = similarity.selected_sim_fwd(patches, tokens, indices, None, None)
    want = exact.gather(2, indices[..., None].expand_as(sim))
    torch.testing.assert_close(sim.double(), want, rtol=1e-5, atol=1e-6)
    r = brute_relevance(exact, None, reduce)
    torch.testing.assert_close(scores.double(), r.gather(2, indices), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(r.gather(2, indices), r.topk(9).values, rtol=0, atol=1e-6)


@pytest.mark.parametrize("reduce", REDUCES)
@pytest.mark.parametrize("class_conditional", [True, False])
def test_blocks_do_not_change_the_result(reduce, class_conditional, monkeypatch):
    patches, tokens = case(B=5)
    patch_mask, token_mask = masks(B=5)
    grad = torch.randn(5, 4, 3, dtype=torch.float64)

    def all_of_it():
        top = ref.topk_patches_fwd(patches, tokens, patch_mask, token_mask, 3, reduce, class_conditional)
        data = patches, tokens, *top[1:], patch_mask, token_mask
        back = ref.topk_patches_bwd(grad, *data, reduce, True, True)
        sim = similarity.selected_sim_fwd(patches, tokens, top[1], patch_mask, token_mask)
        options = 0.1, 20, 0.0, reduce, class_conditional, False
        out = ref.spa_scores_fwd(patches, tokens, None, None, patch_mask, token_mask, None, 3, *options)
        data = patches, tokens, out[1], patch_mask, token_mask, *out[2:]
        again = ref.spa_scores_bwd(grad[..., 0], *data, 0.1, False, "envelope", True, True)
        return *top, *back, sim, *out, *again

    whole = all_of_it()
    for block, sims, kept in (
        (1, 1, 1),
        (11 * 5 * 3, 3 * 5 * 2, 3 * 7 * 2),
        (11 * 7 * 2, 3 * 5 * 7, 3 * 7 * 9),
    ):
        monkeypatch.setattr(ref, "BLOCK", block)
        monkeypatch.setattr(similarity, "BLOCK", block)
        monkeypatch.setattr(similarity, "_SIM_BLOCK", sims)
        monkeypatch.setattr(similarity, "_KEPT_BLOCK", kept)
        for got, want in zip(all_of_it(), whole, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)


def test_selection_follows_a_permutation_of_patches_and_ignores_one_of_tokens():
    patches, tokens = case()
    order = torch.randperm(11, generator=torch.Generator().manual_seed(2))
    _, indices, _ = ref.topk_patches_fwd(patches, tokens, None, None, 4, "max", True)
    _, moved, _ = ref.topk_patches_fwd(
        patches[:, order], tokens[:, [3, 1, 0, 4, 2]], None, None, 4, "max", True
    )
    assert torch.equal(order[moved], indices)


def test_masked_values_have_no_influence_even_nan():
    patches, tokens = case()
    patch_mask, token_mask = masks()
    grad = torch.randn(3, 4, 6, 5, dtype=torch.float64)

    def outputs(p, s):
        scores, indices, _ = ref.topk_patches_fwd(p, s, patch_mask, token_mask, 6, "softmax", True)
        return (
            indices,
            scores,
            *similarity.selected_sim_bwd(grad, p, s, indices, patch_mask, token_mask, True, True),
        )

    want = outputs(patches, tokens)
    poisoned = outputs(
        patches.masked_fill(~patch_mask[..., None], math.nan),
        tokens.masked_fill(~token_mask[..., None], math.inf),
    )
    for got, expected in zip(poisoned, want, strict=True):
        assert torch.equal(got, expected)


def test_class_or_image_without_anything_unmasked_is_zero():
    patches, tokens = case()
    patch_mask, token_mask = torch.ones(3, 11, dtype=torch.bool), torch.ones(4, 5, dtype=torch.bool)
    patch_mask[1], token_mask[2] = False, False
    for reduce in REDUCES:
        scores, indices, _ = ref.topk_patches_fwd(patches, tokens, patch_mask, token_mask, 4, reduce, True)
        assert torch.equal(indices[1], torch.arange(4).expand(4, 4))
        assert torch.equal(indices[:, 2], torch.arange(4).expand(3, 4))
        assert not scores[1].any()
        assert not scores[:, 2].any()


@pytest.mark.parametrize("reduce", REDUCES)
def test_class_without_tokens_has_no_say_in_a_shared_choice(reduce):
    patches, tokens = -case()[0].abs(), case()[1].abs()
    token_mask = torch.ones(4, 5, dtype=torch.bool)
    token_mask[2] = False
    _, indices, _ = ref.topk_patches_fwd(patches, tokens, None, token_mask, 4, reduce, False)
    _, want, _ = ref.topk_patches_fwd(patches, tokens[[0, 1, 3]], None, None, 4, reduce, False)
    assert torch.equal(indices[:, 0], want[:, 0])


def test_zero_vectors_have_similarity_and_gradient_zero():
    patches, tokens = case()
    patches[0, 3] = 0
    tokens[1, 2] = 0
    indices = torch.arange(11).expand(3, 4, 11)
    sim = similarity.selected_sim_fwd(patches, tokens, indices, None, None)
    d_patches, d_tokens = similarity.selected_sim_bwd(
        torch.ones_like(sim), patches, tokens, indices, None, None, True, True
    )
    assert not sim[0, :, 3].any()
    assert not sim[:, 1, :, 2].any()
    assert not d_patches[0, 3].any()
    assert not d_tokens[1, 2].any()
    assert d_patches.isfinite().all()
    assert d_tokens.isfinite().all()


@pytest.mark.parametrize("masked", [False, True])
def test_selected_sim_bwd_is_the_derivative(masked):
    patches, tokens = case()
    patch_mask, token_mask = masks() if masked else (None, None)
    _, indices, _ = ref.topk_patches_fwd(patches, tokens, patch_mask, token_mask, 8, "max", True)
    grad = torch.randn(3, 4, 8, 5, dtype=torch.float64)
    got = similarity.selected_sim_bwd(grad, patches, tokens, indices, patch_mask, token_mask, True, True)
    p, s = patches.clone().requires_grad_(), tokens.clone().requires_grad_()
    sim = cosines(p, s)
    if masked:
        sim = sim * patch_mask[:, None, :, None] * token_mask[None, :, None, :]
    want = torch.autograd.grad(sim.gather(2, indices[..., None].expand_as(grad)), (p, s), grad)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-9, atol=1e-12)


def test_an_index_named_twice_counts_twice():
    patches, tokens = case(B=1, C=1)
    once, twice = torch.tensor([[[3]]]), torch.tensor([[[3, 3]]])
    one = torch.ones(1, 1, 1, 5, dtype=torch.float64)
    want = similarity.selected_sim_bwd(one, patches, tokens, once, None, None, True, True)
    got = similarity.selected_sim_bwd(one.expand(1, 1, 2, 5), patches, tokens, twice, None, None, True, True)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, 2 * w, rtol=1e-12, atol=0)


@pytest.mark.parametrize(("B", "C"), [(0, 4), (3, 0), (0, 0)])
@pytest.mark.parametrize("class_conditional", [True, False])
def test_empty_batches(B, C, class_conditional):
    patches, tokens = torch.randn(B, 11, 7), torch.randn(C, 5, 7)
    out = ref.topk_patches_fwd(patches, tokens, None, None, 4, "max", class_conditional)
    assert all(x.shape == (B, C, 4) for x in out)
    options = 0.1, 9, 0.0, "max", class_conditional, False
    found = ref.spa_scores_fwd(patches, tokens, None, None, None, None, None, 4, *options)
    assert [tuple(x.shape) for x in found] == [(B, C), (B, C, 4), (B, C, 4), (B, C, 5), (B, C)]
    data = patches, tokens, found[1], None, None, *found[2:]
    for grads in (
        ref.topk_patches_bwd(out[0], patches, tokens, *out[1:], None, None, "max", True, True),
        ref.spa_scores_bwd(found[0], *data, 0.1, False, "envelope", True, True),
    ):
        assert grads[0].shape == patches.shape
        assert grads[1].shape == tokens.shape


@pytest.mark.parametrize("value", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_spa_scores_is_selection_then_transport(masked, value):
    patches, tokens = case()
    by_patches, by_tokens = case(D=3, M=2, seed=1)
    patch_mask, token_mask = masks() if masked else (None, None)
    score, indices, f, g, n_iter = ref.spa_scores_fwd(
        *(patches, tokens, by_patches, by_tokens, patch_mask, token_mask, None),
        *(9, 0.1, 30, 1e-6, "max", True, value),
    )
    assert torch.equal(
        indices, ref.topk_patches_fwd(by_patches, by_tokens, patch_mask, None, 9, "max", True)[1]
    )
    for b in range(3):
        for c in range(4):
            sim = cosines(patches[b : b + 1], tokens[c : c + 1])[0, 0, indices[b, c]]
            rows, cols = torch.ones(1, 9).double(), torch.ones(1, 5).double()
            if masked:
                rows, cols = patch_mask[b, indices[b, c]][None].double(), token_mask[c][None].double()
            rows, cols = rows / rows.sum(), cols / cols.sum()
            want = sinkhorn_fwd(1 - sim[None], rows, cols, 0.1, 30, 1e-6, value)
            torch.testing.assert_close(score[b, c], want[0][0] if value else 1 - want[0][0])
            torch.testing.assert_close(f[b, c], want[1][0])
            torch.testing.assert_close(g[b, c], want[2][0])
            assert n_iter[b, c] == want[3][0]
