"""Draws of pseudo-features, a training step's (n=4) and an epoch's (n=256), beside what is commonly used."""

import pytest
import torch
from cases import DEVICE
from measure import record, seconds_and_peak_mb, synchronised
from torch.distributions import MultivariateNormal

from spa_fast import GaussianBank
from spa_fast.reference.gaussian import pack_tril

C = 100
# MultivariateNormal repeats every factor n times when it draws, which takes memory and time.
MAX_BYTES = 3e9
MAX_REPEATED = 256 * 512 * 512
ROUNDS = {4: 20, 256: 3}
CHOLESKY, BATCHED = "Cholesky per class and batch", "batched MultivariateNormal"
WHO = [CHOLESKY, BATCHED, "randn+baddbmm, cached factor", "spa_fast, fp32 factor", "spa_fast, fp16 factor"]


@pytest.fixture(scope="module", params=[192, 512, 768, 1024])
def gaussians(request):
    """mean [C, D], covariance and its factor [C, D, D], fp32, and banks of the factor in fp32 and fp16."""
    D, generator = request.param, torch.Generator().manual_seed(0)
    mean = torch.randn(C, D, generator=generator)
    tril = torch.randn(C, D, D, generator=generator).div_(D**0.5).tril_() + torch.eye(D)
    state = {
        "class_ids": torch.arange(C),
        "count": torch.full((C,), D),
        "mean": mean.double(),
        "scatter": torch.zeros(0, D * (D + 1) // 2, dtype=torch.float64),
        "frozen": torch.arange(C),
        "released": torch.zeros(D, dtype=torch.float64),
        "factor_scale": torch.ones(C),
        "factor_0": pack_tril(tril),
    }
    banks = [GaussianBank(dtype=dtype, device=DEVICE) for dtype in (torch.float32, torch.float16)]
    for bank in banks:
        bank.load_state_dict({**state, "factor_0": state["factor_0"].to(bank.dtype)})
    tril = tril.to(DEVICE)
    return mean.to(DEVICE), tril @ tril.mT, tril, banks


def contender(who, mean, cov, tril, banks):
    """A function from n to draws [C, n, D]."""
    D = mean.shape[1]

    def per_class(n):
        return torch.stack([MultivariateNormal(m, s).sample((n,)) for m, s in zip(mean, cov, strict=True)])

    def batched(n):
        return MultivariateNormal(mean, scale_tril=tril, validate_args=False).sample((n,)).transpose(0, 1)

    def cached(n):
        return torch.baddbmm(mean[:, None], torch.randn(C, n, D, device=DEVICE), tril.mT)

    def ours(bank):
        return lambda n: bank.sample(n)[0].view(C, n, D)

    return dict(zip(WHO, [per_class, batched, cached, *map(ours, banks)], strict=True))[who]


def assert_parity(draws, mean, cov):
    """Means and variances over all classes, within five standard errors (and 0.5 % for fp16)."""
    var = cov.diagonal(dim1=1, dim2=2)
    centered = draws - mean[:, None]
    spread = (centered.square().mean(1) / var).mean(1)
    bias = (centered.mean(1).square() * draws.shape[1] / var).mean(1)
    # A class's dimensions go together: the class is the unit that counts.
    for statistic in (spread, bias):
        assert abs(float(statistic.mean() - 1)) < 5 * float(statistic.std()) / C**0.5 + 5e-3


@pytest.mark.parametrize("n", [4, 256])
@pytest.mark.parametrize("who", WHO)
def bench_sample_gaussian(benchmark, one_thread, not_measured, gaussians, who, n):
    mean, cov, tril, banks = gaussians
    D = mean.shape[1]
    shape = f"C={C} n={n} D={D}"
    benchmark.group = f"sample_gaussian {shape}"
    if who == BATCHED and 4 * C * n * D * D > MAX_BYTES:
        not_measured(benchmark.group, who, f"repeats its factors {n} times, {4 * C * n * D * D / 1e9:.0f} GB")
    if who == CHOLESKY and n * D * D > MAX_REPEATED:
        not_measured(benchmark.group, who, f"repeats each factor {n} times, over half a minute a draw")
    size = 2 if "fp16" in who else 4
    moved = C * (size * D * (D + 1) // 2 + 4 * D * (n + 1))
    draw = contender(who, mean, cov, tril, banks)
    run = synchronised(lambda: draw(n))
    if who in (CHOLESKY, BATCHED):
        # A draw takes seconds: the one that is timed is the one that is checked.
        _, peak, draws = seconds_and_peak_mb(lambda: benchmark.pedantic(run, rounds=1, iterations=1))
        assert_parity(draws, mean, cov)
    else:
        assert_parity(run(), mean, cov)
        _, peak, _ = seconds_and_peak_mb(run)
        benchmark.pedantic(run, rounds=ROUNDS[n], iterations=1, warmup_rounds=1)
    record(benchmark, peak, backend=who, shape=shape, bytes_moved=moved)
