import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from spa_fast import PatchAligner, sinkhorn_align, spa_scores, topk_patches
from spa_fast import patches as module
from spa_fast._backends import available
from spa_fast._ops import patches as ops
from spa_fast.patches import align_selected

BENCH = Path(__file__).parents[2] / "bench"
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


def test_envelope_gradient_of_the_value_by_finite_differences():
    patches, tokens = case(B=2, N=5, C=2, M=3, D=4, grad=True)
    patch_mask, token_mask = torch.ones(2, 5, dtype=torch.bool), torch.ones(2, 3, dtype=torch.bool)
    patch_mask[0, 1:4], token_mask[1, 0] = False, False
    options = {"eps": 0.3, "max_iter": 500, "tol": 1e-13, "score": "value"}

    def scores(p, s):
        return spa_scores(p, s, 3, patch_mask=patch_mask, token_mask=token_mask, **options)

    assert torch.autograd.gradcheck(scores, (patches, tokens), atol=1e-6)


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
    indices = topk_patches(frozen_patches, frozen_tokens, 4)[1]
    torch.testing.assert_close(
        got, align_selected(patches, tokens, indices, **OPTIONS), rtol=1e-12, atol=1e-12
    )
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
        indices = topk_patches(*frozen, 4, class_conditional=class_conditional, patch_mask=patch_mask)[1]
        weights = torch.rand(7, 4, 4, generator=torch.Generator().manual_seed(2))
        return (
            spa_scores(patches, tokens, 4, **both),
            spa_scores(patches, tokens, 4, select_patches=frozen[0], select_tokens=frozen[1], **both),
            align_selected(patches, tokens, indices, weights=weights, **shared),
        )

    whole = scores()
    for chunk, tokens_at_once in ((1, 1), (40, 2 * 5 * 6), (4 * 5 * 4 * 2, 1 << 20)):
        monkeypatch.setattr(module, "_CHUNK", chunk)
        monkeypatch.setattr(module, "_TOKEN_CHUNK", tokens_at_once)
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
    indices = topk_patches(patches, tokens, 4)[1]
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


@pytest.mark.parametrize(("B", "C", "D"), [(0, 4, 6), (3, 0, 6), (3, 4, 0)])
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_empty_batches_are_differentiable(B, C, D, backend):
    patches, tokens = torch.randn(B, 12, D, requires_grad=True), torch.randn(C, 5, D, requires_grad=True)
    scores = spa_scores(patches, tokens, 4, backend=backend)
    assert scores.shape == (B, C)
    scores.sum().backward()
    assert patches.grad.shape == patches.shape


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_low_precision_follows_fp64(dtype):
    patches, tokens = case(B=2, N=63, M=6, D=48, dtype=dtype)
    got = spa_scores(patches, tokens, 9, eps=0.1, max_iter=50, tol=0)
    indices = topk_patches(patches, tokens, 9)[1]
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


def on_device(backend_device, grad=False, B=4, N=30, C=5, M=6, D=24, dtype=torch.float32):
    """fp32 leaves on the CPU, for the reference, and on the backend's device."""
    patches, tokens = case(B=B, N=N, C=C, M=M, D=D, dtype=dtype)
    g = torch.Generator().manual_seed(5)
    patch_mask, token_mask = torch.rand(B, N, generator=g) > 0.3, torch.rand(C, M, generator=g) > 0.3
    patch_mask[1], token_mask[2], patch_mask[2, 3:] = False, False, False
    here = [x.detach().requires_grad_(grad) for x in (patches, tokens)]
    there = [x.detach().to(backend_device[1]).requires_grad_(grad) for x in (patches, tokens)]
    return here, there, {"patch_mask": patch_mask, "token_mask": token_mask}


def moved(masks, device):
    return {name: mask.to(device) for name, mask in masks.items()}


@pytest.mark.parametrize("score", ["transport", "value"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("k", [1, 8, 30])
@pytest.mark.parametrize("eps", [0.02, 0.1])
def test_backends_agree_with_the_reference(backend_device, score, masked, k, eps):
    backend, device = backend_device
    here, there, on = on_device(backend_device, grad=True)
    on = on if masked else {}
    options = {"eps": eps, "max_iter": 50, "tol": 0, "score": score, "return_details": True}
    want = spa_scores(*here, k, **options, **on, backend="reference")
    got = spa_scores(*there, k, **options, **moved(on, device), backend=backend)
    assert torch.equal(got.indices.cpu(), want.indices)
    assert got.n_iter.dtype == torch.int32
    torch.testing.assert_close(got.scores.cpu(), want.scores, rtol=1e-5, atol=1e-5)
    weight = torch.randn(4, 5, generator=torch.Generator().manual_seed(6))
    grads = torch.autograd.grad(got.scores, there, weight.to(device))
    for g, w in zip(grads, torch.autograd.grad(want.scores, here, weight), strict=True):
        assert float((g.cpu() - w).norm()) <= 1e-4 * float(w.norm())


@pytest.mark.parametrize("class_conditional", [True, False])
def test_masked_values_reach_nothing_even_nan(backend_device, class_conditional):
    backend, device = backend_device
    _, there, on = on_device(backend_device)
    on = moved(on, device)
    poison = (
        there[0].masked_fill(~on["patch_mask"][..., None], torch.nan),
        there[1].masked_fill(~on["token_mask"][..., None], torch.inf),
    )
    results = []
    for features in (there, poison):
        leaves = [x.detach().requires_grad_() for x in features]
        # Image 2 has 3 patches or fewer: masked ones must be kept.
        out = spa_scores(
            *leaves, 8, class_conditional=class_conditional, return_details=True, backend=backend, **on
        )
        results.append((out.scores, out.indices, *torch.autograd.grad(out.scores.sum(), leaves)))
    for clean, poisoned in zip(*results, strict=True):
        assert torch.equal(clean, poisoned)
    assert not results[1][2][~on["patch_mask"]].any()
    assert not results[1][3][~on["token_mask"]].any()


@pytest.mark.parametrize("class_conditional", [True, False])
@pytest.mark.parametrize("frozen_dtype", [torch.float16, torch.float32])
def test_backends_select_in_another_space(backend_device, class_conditional, frozen_dtype):
    backend, device = backend_device
    here, there, on = on_device(backend_device)
    frozen = case(B=4, N=30, C=5, D=9, M=3, dtype=frozen_dtype, seed=1)
    options = {"eps": 0.1, "max_iter": 30, "tol": 0, "class_conditional": class_conditional}
    options |= {"return_details": True, "reduce": "mean"}
    on = {"patch_mask": on["patch_mask"]}
    select = {"select_patches": frozen[0], "select_tokens": frozen[1]}
    want = spa_scores(*here, 7, **options, **on, **select, backend="reference")
    got = spa_scores(*there, 7, **options, **moved(on | select, device), backend=backend)
    assert torch.equal(got.indices.cpu(), want.indices)
    torch.testing.assert_close(got.scores.cpu(), want.scores, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("grad", ["implicit", "unroll"])
def test_backends_give_exact_gradients_too(backend_device, grad):
    backend, device = backend_device
    here, there, on = on_device(backend_device, grad=True)
    options = {"eps": 0.2, "max_iter": 20, "tol": 0, "grad": grad}
    want = torch.autograd.grad(spa_scores(*here, 8, **options, **on, backend="reference").sum(), here)
    got = spa_scores(*there, 8, **options, **moved(on, device), backend=backend)
    for g, w in zip(torch.autograd.grad(got.sum(), there), want, strict=True):
        assert float((g.cpu() - w).norm()) <= 1e-3 * float(w.norm())


def test_stop_by_tolerance(backend_device):
    backend, _ = backend_device
    _, there, _ = on_device(backend_device)
    out = spa_scores(*there, 8, max_iter=100, tol=1e-3, return_details=True, backend=backend)
    assert int(out.n_iter.min()) > 0
    assert int(out.n_iter.max()) < 100
    plan = out.plan_for(1, 2)
    assert bool(plan.converged)
    assert abs(float(plan.score) - float(out.scores[1, 2])) < 1e-4


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("solver", ["sinkhorn", "uniform", "max_mean"])
def test_plan_for_a_pair(masked, solver):
    patches, tokens = case(grad=True)
    patch_mask, token_mask = masks() if masked else (None, None)
    on = {"patch_mask": patch_mask, "token_mask": token_mask}
    out = spa_scores(patches, tokens, 4, solver=solver, return_details=True, **on, **OPTIONS)
    assert out.indices.shape == (3, 4, 4)
    for i, c in ((0, 1), (2, 3)):
        got = out.plan_for(i, c)
        kept = out.indices[i, c]
        a = None if patch_mask is None else patch_mask[i, kept].double()
        b = None if token_mask is None else token_mask[c].double()
        want = sinkhorn_align(
            *(patches[i : i + 1, kept], tokens[c : c + 1]),
            *(a, b),
            solver=solver,
            return_plan=True,
            **OPTIONS,
        )
        assert got.plan.shape == (4, 5)
        assert not got.plan.requires_grad
        torch.testing.assert_close(got.plan, want.plan[0, 0], rtol=1e-8, atol=1e-10)
        torch.testing.assert_close(got.score, out.scores[i, c].detach(), rtol=1e-8, atol=1e-10)
    for name, *bad in (("i", 3, 0), ("i", -1, 0), ("c", 0, 4)):
        with pytest.raises(ValueError, match=f"{name}: expected 0 <= {name} <"):
            out.plan_for(*bad)
    for bad, message in (
        ((0.5, 0), "i: expected an integer, got float"),
        ((None, 0), "i: expected an integer, got NoneType"),
        ((0, "1"), "c: expected an integer, got str"),
    ):
        with pytest.raises(TypeError, match=message):
            out.plan_for(*bad)
    assert torch.equal(out.plan_for(torch.tensor(2), torch.tensor(3)).plan, got.plan)


def test_ragged_tokens_equal_a_mask():
    patches, tokens = case(grad=True)
    frozen_patches, frozen_tokens = case(D=3, seed=2)
    lengths = [5, 2, 0, 4]
    token_mask = torch.arange(5) < torch.tensor(lengths)[:, None]
    flat, frozen = tokens[token_mask], frozen_tokens[token_mask]
    cu_tokens = (0, 5, 7, 7, 11)
    for select in (False, True):
        here = {"select_patches": frozen_patches, "select_tokens": frozen} if select else {}
        there = {**here, "select_tokens": frozen_tokens} if select else {}
        got = spa_scores(patches, flat, 4, cu_tokens=cu_tokens, **here, **OPTIONS)
        want = spa_scores(patches, tokens, 4, token_mask=token_mask, **there, **OPTIONS)
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)
        assert not got[:, 2].any()
        grads = [torch.autograd.grad(s.sum(), (patches, tokens), retain_graph=True) for s in (got, want)]
        for g, w in zip(*grads, strict=True):
            torch.testing.assert_close(g, w, rtol=1e-10, atol=1e-12)
    with pytest.raises(ValueError, match="select_tokens"):
        spa_scores(patches, flat, 4, cu_tokens=cu_tokens, select_patches=patches, select_tokens=tokens)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("grad", ["envelope", "implicit"])
def test_opcheck(backend_device, masked, grad):
    backend, device = backend_device
    inputs = case(dtype=torch.float32)
    frozen = case(D=9, M=7, dtype=torch.float32, seed=1)
    on = (x.to(device) for x in masks()) if masked else (None, None)
    data = [x.to(device).requires_grad_() for x in inputs], [x.to(device) for x in frozen]
    options = (4, 0.1, 9, 0.0, "max", True, False, grad, backend)
    torch.library.opcheck(ops.spa_scores, (*data[0], *data[1], *on, None, *options))
    torch.library.opcheck(ops.spa_scores, (*data[0], *(None,) * 5, *options))


def test_opcheck_of_the_backward(backend_device):
    backend, device = backend_device
    data = [x.to(device) for x in case(dtype=torch.float32)]
    _, indices, f, g, n_iter = ops.spa_scores(
        *data, *(None,) * 5, 4, 0.1, 9, 0.0, "max", True, False, "envelope", backend
    )
    saved = (*data, indices, None, None, f, g, n_iter)
    for need in ((True, True), (False, True)):
        torch.library.opcheck(
            ops.spa_scores_bwd,
            (torch.randn(3, 4, device=device), *saved, 0.1, False, "envelope", backend, *need),
        )


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_extra_memory_does_not_grow_with_images_and_classes(backend):
    """Without gradient: at most 64 MB beside inputs and result."""
    code = (
        "import sys, torch\n"
        f"sys.path.insert(0, {str(BENCH)!r})\n"
        "from measure import seconds_and_peak_mb\n"
        "from spa_fast import spa_scores\n"
        "torch.set_num_threads(1)\n"
        "patches, tokens = torch.randn(B, 49, 256), torch.randn(C, 6, 256)\n"
        f"run = lambda p, s: spa_scores(p, s, 16, max_iter=2, backend={backend!r})\n"
        "run(patches[:2], tokens[:2])\n"
        "print(seconds_and_peak_mb(lambda: run(patches, tokens))[1])\n"
    )
    for B, C in ((400, 40), (2, 4000)):
        text = code.replace("(B,", f"({B},").replace("(C,", f"({C},")
        run = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, check=True)
        if run.stdout.strip() == "None":
            pytest.skip("nobody counts memory here")
        assert float(run.stdout) <= 64


def test_details_compile_in_one_graph():
    patches, tokens = case(dtype=torch.float32)
    torch._dynamo.reset()
    scores = torch.compile(
        lambda p, s: spa_scores(p, s, 4, return_details=True), fullgraph=True, backend="aot_eager"
    )
    got, want = scores(patches, tokens), spa_scores(patches, tokens, 4, return_details=True)
    torch.testing.assert_close(got.scores, want.scores)
    assert torch.equal(got.indices, want.indices)
    torch.testing.assert_close(got.plan_for(0, 1).plan, want.plan_for(0, 1).plan)


def test_autocast_takes_two_dtypes_and_keeps_fp32():
    patches, tokens = case(dtype=torch.float32, D=64)
    want = spa_scores(patches, tokens.bfloat16().float(), 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = spa_scores(patches, tokens.bfloat16(), 4)
    torch.testing.assert_close(got, want)


def test_aligner_is_the_function():
    patches, tokens = case()
    flat = tokens.flatten(0, 1)
    align = PatchAligner(4, reg=0.2, numItermax=30, thresh=0.0, return_details=True)
    got = align(patches, flat, cu_tokens=(0, 5, 10, 15, 20))
    want = spa_scores(patches, tokens, 4, 0.2, max_iter=30, tol=0)
    torch.testing.assert_close(got.scores, want, rtol=1e-12, atol=1e-12)
    assert "k=4, eps=0.2" in repr(align)
    with pytest.raises(ValueError, match="reduce"):
        PatchAligner(4, reduce="median")


@pytest.mark.skipif(available()["native"] is not None, reason="native is not built")
def test_a_named_backend_aligns_up_to_its_size_and_selects_beyond():
    patches, tokens = torch.randn(1, 300, 4), torch.randn(2, 2, 4)
    with pytest.raises(RuntimeError, match=r"native.*it takes k <= 256, got 299"):
        spa_scores(patches, tokens, 299, backend="native")
    got = spa_scores(patches, tokens, 299, solver="uniform", backend="native")
    torch.testing.assert_close(got, spa_scores(patches, tokens, 299, solver="uniform", backend="reference"))


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
    with pytest.raises(ValueError, match=r"backend.*did you mean 'native'"):
        spa_scores(patches, tokens, 4, backend="nativ")
    with pytest.raises(TypeError, match="tokens: expected the dtype"):
        spa_scores(patches, tokens.float(), 4)
    with pytest.raises(ValueError, match="select_patches: expected the device"):
        spa_scores(patches, tokens, 4, select_patches=patches.to("meta"), select_tokens=tokens)
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
    with pytest.raises(ValueError, match=r"tokens: .*class 1"):
        spa_scores(patches, bad, 4)
    indices = topk_patches(patches, tokens, 4)[1]
    with pytest.raises(TypeError, match="indices"):
        align_selected(patches, tokens, indices.int())
    with pytest.raises(ValueError, match="indices"):
        align_selected(patches, tokens, indices[:2])
    with pytest.raises(ValueError, match=r"indices: .*N = 12"):
        align_selected(patches, tokens, indices + 12)
    with pytest.raises(ValueError, match="weights"):
        align_selected(patches, tokens, indices, weights=torch.ones(3, 2, 4))
