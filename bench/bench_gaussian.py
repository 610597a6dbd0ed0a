"""A training step's draw of pseudo-features beside what is commonly written for it."""

import pytest
import torch
from torch.distributions import MultivariateNormal

from spa_fast import GaussianBank

C, N = 100, 4


@pytest.fixture(scope="module", params=[192, 512])
def bank(request):
    torch.set_num_threads(1)
    D = request.param
    bank = GaussianBank()
    g = torch.Generator().manual_seed(0)
    bank.fit(torch.randn(C * 20, D, generator=g), torch.arange(C * 20) % C)
    mean, cov = (x.float() for x in bank.moments())
    return D, bank, mean, cov, torch.linalg.cholesky(cov)


@pytest.mark.benchmark(group="sample_gaussian n=4")
@pytest.mark.parametrize("who", ["Cholesky per class and step", "randn+baddbmm, cached factor", "spa_fast"])
def bench_step_draw(benchmark, bank, who):
    D, own, mean, cov, tril = bank

    def per_class(n):
        return torch.stack([MultivariateNormal(m, s).sample((n,)) for m, s in zip(mean, cov, strict=True)])

    def cached(n):
        return torch.baddbmm(mean[:, None], torch.randn(C, n, D), tril.mT)

    def ours(n):
        return own.sample(n)[0].view(C, n, D)

    draw = {
        "Cholesky per class and step": per_class,
        "randn+baddbmm, cached factor": cached,
        "spa_fast": ours,
    }[who]
    # Parity: mean over 64 draws of the 100 classes, five standard errors.
    x = draw(64)
    spread = cov.diagonal(dim1=1, dim2=2)
    assert float((x.mean(1) - mean).square().sum() / spread.sum() * 64 - 1) < 5 * (2 / (C * D)) ** 0.5 * 4
    assert float(((x - mean[:, None]).square().sum(-1).mean() / spread.sum(-1).mean()) - 1) < 0.05
    slow = who.startswith("Cholesky")
    benchmark.extra_info.update(shape=f"C={C} n={N} D={D}", dtype="float32", backend=who, threads=1)
    benchmark.extra_info.update(bytes_moved=4 * C * (D * (D + 1) // 2 + 2 * N * D))
    benchmark.pedantic(draw, (N,), rounds=3 if slow else 30, iterations=1, warmup_rounds=1 if slow else 5)
