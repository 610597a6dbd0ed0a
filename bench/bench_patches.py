"""Patch selection and `spa_scores` beside einsum, amax, topk, gather and a kernel-space Sinkhorn loop."""

import pytest
import torch

from spa_fast import spa_scores, topk_patches
from spa_fast.patches import align_selected, select_indices

B, N, D, C, M, K = 8, 196, 192, 100, 6, 16
EPS, STEPS = 0.1, 100
FLOPS = 2 * B * N * C * M * D


@pytest.fixture(scope="module")
def features():
    torch.set_num_threads(1)
    g = torch.Generator().manual_seed(0)
    return torch.randn(B, N, D, generator=g), torch.randn(C, M, D, generator=g)


def unit(x):
    return torch.nn.functional.normalize(x, dim=-1)


def gemm(patches, tokens):
    return patches.view(B * N, D) @ tokens.view(C * M, D).T


def plain_topk(patches, tokens):
    sim = torch.einsum("bnd,cmd->bcnm", unit(patches), unit(tokens))
    scores, indices = sim.amax(-1).topk(K, dim=-1)
    return sim, scores, indices


def plain_scores(patches, tokens):
    sim, _, indices = plain_topk(patches, tokens)
    sim = sim.gather(2, indices[..., None].expand(-1, -1, -1, M))
    with torch.no_grad():
        kernel = ((sim - 1) / EPS).exp()
        c = torch.ones(B, C, M, 1)
        for _ in range(STEPS):
            r = (1 / K) / (kernel @ c)
            c = (1 / M) / (kernel.mT @ r)
        plan = r * kernel * c.mT
    return (plan * sim).sum((-2, -1))


def ours(patches, tokens, tol=0.0):
    return spa_scores(patches, tokens, K, EPS, max_iter=STEPS, tol=tol)


def run(benchmark, function, *args, backend):
    benchmark.extra_info.update(
        shape=f"B={B} N={N} D={D} C={C} M={M} k={K}", dtype="float32", backend=backend, threads=1, flops=FLOPS
    )
    benchmark.pedantic(function, args, rounds=10, iterations=1, warmup_rounds=2)


@pytest.mark.benchmark(group="topk_patches fwd")
@pytest.mark.parametrize("who", ["gemm alone", "torch", "spa_fast"])
def bench_topk_patches(benchmark, features, who):
    _, want, _ = plain_topk(*features)
    torch.testing.assert_close(topk_patches(*features, K)[0], want, rtol=1e-5, atol=1e-6)
    function = {"gemm alone": gemm, "torch": plain_topk, "spa_fast": lambda p, s: topk_patches(p, s, K)}[who]
    run(benchmark, function, *features, backend=who)


@pytest.mark.benchmark(group="spa_scores fwd")
@pytest.mark.parametrize("who", ["gemm alone", "torch T=100", "spa_fast T=100", "spa_fast tol=1e-3"])
def bench_spa_scores(benchmark, features, who):
    torch.testing.assert_close(ours(*features), plain_scores(*features), rtol=1e-4, atol=1e-5)
    function = {
        "gemm alone": gemm,
        "torch T=100": plain_scores,
        "spa_fast T=100": ours,
        "spa_fast tol=1e-3": lambda p, s: ours(p, s, 1e-3),
    }[who]
    run(benchmark, function, *features, backend=who)


@pytest.mark.benchmark(group="spa_scores fwd+bwd")
@pytest.mark.parametrize("who", ["torch T=100", "spa_fast tol=1e-3", "spa_fast, indices given"])
def bench_spa_scores_fwd_bwd(benchmark, features, who):
    leaves = [x.clone().requires_grad_() for x in features]
    indices = select_indices(*features, K)
    function = {
        "torch T=100": plain_scores,
        "spa_fast tol=1e-3": lambda p, s: ours(p, s, 1e-3),
        "spa_fast, indices given": lambda p, s: align_selected(p, s, indices, eps=EPS),
    }[who]

    def step():
        return torch.autograd.grad(function(*leaves).sum(), leaves)

    want = torch.autograd.grad(plain_scores(*leaves).sum(), leaves)
    for got, expected in zip(step(), want, strict=True):
        assert float((got - expected).norm() / expected.norm()) < 2e-2
    run(benchmark, step, backend=who)
