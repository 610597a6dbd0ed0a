import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spa_fast.reference import patches as ref

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
    kept, indices = ref.topk_patches_fwd(
        patches, tokens, patch_mask, token_mask, k, reduce, class_conditional
    )
    assert torch.equal(indices, want)
    if masked:
        sim = sim * patch_mask[:, None, :, None] * token_mask[None, :, None, :]
    torch.testing.assert_close(kept, sim.gather(2, want[..., None].expand_as(kept)), rtol=1e-11, atol=1e-14)


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
    assert torch.equal(ref._first_topk(r, k), want)
    assert torch.equal(ref._first_topk(r.double(), k), want)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_first_topk_puts_nan_of_either_sign_first(sign):
    r = torch.tensor([0.0, 1.0, math.copysign(math.nan, sign), -1.0])
    assert ref._first_topk(r, 2).tolist() == [2, 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ties_go_to_the_lowest_index(dtype):
    patches = torch.zeros(1, 9, 4, dtype=dtype)
    patches[0, [2, 5, 7], 0] = 1.0
    patches[0, [1, 3], 1] = 1.0
    tokens = torch.zeros(1, 1, 4, dtype=dtype)
    tokens[0, 0, 0] = 2.0
    _, indices = ref.topk_patches_fwd(patches, tokens, None, None, 7, "max", True)
    assert indices.tolist() == [[[2, 5, 7, 0, 1, 3, 4]]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("reduce", REDUCES)
def test_low_precision_follows_the_fp64_oracle(dtype, reduce):
    patches, tokens = case(B=2, N=63, C=3, M=6, D=48, dtype=dtype)
    sim, indices = ref.topk_patches_fwd(patches, tokens, None, None, 9, reduce, True)
    exact = cosines(patches.double(), tokens.double())
    assert sim.dtype == torch.float32
    want = exact.gather(2, indices[..., None].expand_as(sim))
    torch.testing.assert_close(sim.double(), want, rtol=1e-5, atol=1e-6)
    r = brute_relevance(exact, None, reduce)
    torch.testing.assert_close(r.gather(2, indices), r.topk(9).values, rtol=0, atol=1e-6)


@pytest.mark.parametrize("reduce", REDUCES)
@pytest.mark.parametrize("class_conditional", [True, False])
def test_blocks_do_not_change_the_result(reduce, class_conditional, monkeypatch):
    patches, tokens = case(B=5)
    patch_mask, token_mask = masks(B=5)
    grad = torch.randn(5, 4, 3, 5, dtype=torch.float64)

    def all_of_it():
        out = ref.topk_patches_fwd(patches, tokens, patch_mask, token_mask, 3, reduce, class_conditional)
        again = ref.selected_sim_fwd(patches, tokens, out[1], patch_mask, token_mask)
        back = ref.selected_sim_bwd(grad, patches, tokens, out[1], patch_mask, token_mask, True, True)
        return *out, again, *back

    whole = all_of_it()
    for block, kept in ((1, 1), (11 * 5 * 3, 3 * 7 * 2), (11 * 5 * 4 * 2, 3 * 7 * 9)):
        monkeypatch.setattr(ref, "_BLOCK", block)
        monkeypatch.setattr(ref, "_KEPT_BLOCK", kept)
        for got, want in zip(all_of_it(), whole, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)


def test_selection_follows_a_permutation_of_patches_and_ignores_one_of_tokens():
    patches, tokens = case()
    order = torch.randperm(11, generator=torch.Generator().manual_seed(2))
    _, indices = ref.topk_patches_fwd(patches, tokens, None, None, 4, "max", True)
    _, moved = ref.topk_patches_fwd(patches[:, order], tokens[:, [3, 1, 0, 4, 2]], None, None, 4, "max", True)
    assert torch.equal(order[moved], indices)


def test_masked_values_have_no_influence_even_nan():
    patches, tokens = case()
    patch_mask, token_mask = masks()
    grad = torch.randn(3, 4, 6, 5, dtype=torch.float64)

    def outputs(p, s):
        sim, indices = ref.topk_patches_fwd(p, s, patch_mask, token_mask, 6, "softmax", True)
        return indices, sim, *ref.selected_sim_bwd(grad, p, s, indices, patch_mask, token_mask, True, True)

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
        sim, indices = ref.topk_patches_fwd(patches, tokens, patch_mask, token_mask, 4, reduce, True)
        assert torch.equal(indices[1], torch.arange(4).expand(4, 4))
        assert torch.equal(indices[:, 2], torch.arange(4).expand(3, 4))
        assert not sim[1].any()
        assert not sim[:, 2].any()


def test_zero_vectors_have_similarity_and_gradient_zero():
    patches, tokens = case()
    patches[0, 3] = 0
    tokens[1, 2] = 0
    indices = torch.arange(11).expand(3, 4, 11)
    sim = ref.selected_sim_fwd(patches, tokens, indices, None, None)
    d_patches, d_tokens = ref.selected_sim_bwd(
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
    _, indices = ref.topk_patches_fwd(patches, tokens, patch_mask, token_mask, 8, "max", True)
    grad = torch.randn(3, 4, 8, 5, dtype=torch.float64)
    got = ref.selected_sim_bwd(grad, patches, tokens, indices, patch_mask, token_mask, True, True)
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
    want = ref.selected_sim_bwd(one, patches, tokens, once, None, None, True, True)
    got = ref.selected_sim_bwd(one.expand(1, 1, 2, 5), patches, tokens, twice, None, None, True, True)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, 2 * w, rtol=1e-12, atol=0)


@pytest.mark.parametrize(("B", "C"), [(0, 4), (3, 0), (0, 0)])
@pytest.mark.parametrize("class_conditional", [True, False])
def test_empty_batches(B, C, class_conditional):
    patches, tokens = torch.randn(B, 11, 7), torch.randn(C, 5, 7)
    sim, indices = ref.topk_patches_fwd(patches, tokens, None, None, 4, "max", class_conditional)
    assert indices.shape == (B, C, 4)
    assert sim.shape == (B, C, 4, 5)
    grads = ref.selected_sim_bwd(torch.zeros(B, C, 4, 5), patches, tokens, indices, None, None, True, True)
    assert grads[0].shape == patches.shape
    assert grads[1].shape == tokens.shape
