"""Draws against theory, within five standard errors or at p 1e-5: moments, marginals, independence."""

import math

import pytest
import torch
from scipy import stats

from spa_fast import GaussianBank, sample_gaussian
from spa_fast._backends import available

BACKENDS = [
    pytest.param(name, marks=[] if reason is None else [pytest.mark.skip(reason=f"{name}: {reason}")])
    for name, reason in available().items()
    if name != "triton"
]
C, D, N = 4, 6, 250_000
SEED = 20260101
KINDS = ("full", "diag", "lowrank", "shared")


def factors(seed=0):
    g = torch.Generator().manual_seed(seed)
    a = torch.randn(C, D, D, generator=g).double()
    return 3 * torch.randn(C, D, generator=g), torch.linalg.cholesky(a @ a.mT + 0.1 * torch.eye(D)).float()


def whitened(x, mean, tril):
    """The normals behind x [C, n, D]."""
    centered = (x - mean[:, None]).double()
    return torch.linalg.solve_triangular(tril.double(), centered.mT, upper=False).mT


@pytest.fixture(scope="module", params=BACKENDS)
def million(request):
    """A million draws: backend, mean, tril, x and the normals behind them."""
    mean, tril = factors()
    x = sample_gaussian(mean, tril, N, seed=SEED, backend=request.param)
    return request.param, mean, tril, x, whitened(x, mean, tril)


def assert_uncorrelated(a, b):
    """Neither the normals a, b nor their squares go together."""
    bound = 5 / math.sqrt(a.numel())
    assert abs(float((a * b).mean())) < bound
    assert abs(float(((a * a - 1) * (b * b - 1)).mean())) < 2 * bound


def assert_moments(x, mean, cov):
    x, n = x.double(), x.shape[1]
    var = cov.diagonal(dim1=1, dim2=2)
    assert ((x.mean(1) - mean).abs() < 5 * (var / n).sqrt()).all()
    x = x - mean[:, None]
    sigma = ((cov**2 + var[:, :, None] * var[:, None, :]) / n).sqrt()
    assert ((x.mT @ x / n - cov).abs() < 5 * sigma).all()


def test_moments_of_a_million_draws(million):
    _, mean, tril, x, _ = million
    assert_moments(x, mean.double(), tril.double() @ tril.double().mT)


def test_every_dimension_is_normal(million):
    *_, z = million
    count = z.numel()
    assert abs(float(z.mean())) < 5 / math.sqrt(count)
    assert abs(float(z.square().mean()) - 1) < 5 * math.sqrt(2 / count)
    for column in z.mT.flatten(0, 1):
        assert stats.kstest(column.numpy(), "norm").pvalue > 1e-5
    third, fourth = (z**3).mean(1), (z**4).mean(1)
    assert (third.abs() < 5 * math.sqrt(15 / N)).all()
    assert ((fourth - 3).abs() < 5 * math.sqrt(96 / N)).all()


def test_tails_are_there(million):
    *_, z = million
    for sigma in (3, 4, 4.5):
        expected = z.numel() * 2 * stats.norm.sf(sigma)
        assert abs(int((z.abs() > sigma).sum()) - expected) < 5 * math.sqrt(expected)


def test_mahalanobis_distances_are_chi_squared(million):
    *_, z = million
    for distance in z.square().sum(2):
        assert stats.kstest(distance.numpy(), "chi2", (D,)).pvalue > 1e-5


def test_classes_samples_and_dimensions_are_independent(million):
    *_, z = million
    for i in range(C):
        for j in range(i):
            assert_uncorrelated(z[i], z[j])
    for lag in (1, 2, 3, 4, 32, 1024):
        assert_uncorrelated(z[:, lag:], z[:, :-lag])
    for i in range(D):
        for j in range(i):
            assert_uncorrelated(z[..., i], z[..., j])
            assert_uncorrelated(z[:, 1:, i], z[:, :-1, j])


@pytest.mark.parametrize("other", [SEED + 1, SEED ^ (1 << 31), SEED + (1 << 32), (1 << 64) - 1 - SEED])
def test_seeds_are_independent(million, other):
    backend, mean, tril, _, z = million
    x = sample_gaussian(mean, tril, 50_000, seed=other, backend=backend)
    assert_uncorrelated(whitened(x, mean, tril), z[:, :50_000])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_bank_draws_have_the_moments_of_the_bank(kind, dtype):
    labels = torch.arange(200) % C
    mean, tril = factors(1)
    g = torch.Generator().manual_seed(0)
    features = mean[labels] + (tril[labels] @ torch.randn(200, D, 1, generator=g)).squeeze(2)
    bank = GaussianBank(covariance=kind, rank=D, dtype=dtype)
    bank.fit(features, labels)
    n = 60_000
    x, drawn = bank.sample(n, generator=g)
    assert torch.equal(drawn, torch.arange(C).repeat_interleave(n))
    assert_moments(x.view(C, n, D), *bank.moments())


def test_low_rank_is_the_full_gaussian_built_from_it():
    """Both have the covariance F F^T + diag^2; without diag they differ in nothing but the normals used."""
    g = torch.Generator().manual_seed(0)
    F, std, mean = torch.randn(C, D, 2, generator=g), torch.rand(C, D, generator=g), torch.zeros(C, D)
    cov = (F @ F.mT + torch.diag_embed(std**2)).double()
    for factor in ((F, std), torch.linalg.cholesky(cov)):
        x = sample_gaussian(mean, factor, 60_000, seed=3)
        assert_moments(x, mean.double(), cov)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_low_rank_bank_is_the_full_bank_of_its_covariance(dtype):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(500, 3, generator=g) @ torch.randn(3, D, generator=g) + 0.1 * torch.randn(
        500, D, generator=g
    )
    low = GaussianBank(covariance="lowrank", rank=3, dtype=dtype)
    low.fit(x, torch.zeros(500, dtype=torch.int64))
    low.freeze()
    full = GaussianBank.from_moments(*low.moments(), ridge=1e-12)
    for bank in (low, full):
        assert_moments(bank.sample(60_000, generator=g)[0][None], *low.moments())


@pytest.mark.parametrize("kind", ["full", "lowrank", "shared"])
def test_ill_conditioned_covariances_keep_every_direction(kind):
    dim = 20
    q, _ = torch.linalg.qr(torch.randn(dim, dim, dtype=torch.float64))
    values = torch.logspace(0, -12, dim, dtype=torch.float64)
    cov = ((q * values) @ q.T)[None]
    bank = GaussianBank.from_moments(
        torch.zeros(1, dim), (cov + cov.mT) / 2, covariance=kind, ridge=1e-16, rank=dim
    )
    x = bank.sample(20_000, generator=torch.Generator().manual_seed(0))[0].double() @ q
    torch.testing.assert_close(x.std(0), values.sqrt(), rtol=0.05, atol=1e-7)


def test_factors_of_any_strides_are_read_as_they_stand():
    mean, tril = factors()
    assert not tril.is_contiguous()
    want = sample_gaussian(mean, tril.contiguous(), 5, seed=2)
    wide = torch.zeros(C, 2 * D, 2 * D)
    wide[:, ::2, ::2] = tril
    upper = torch.full((D, D), torch.nan).triu(1)
    for same in (tril, wide[:, ::2, ::2], tril + upper, torch.stack([tril, tril], 1)[:, 1]):
        assert torch.equal(sample_gaussian(mean, same, 5, seed=2), want)
    shared = sample_gaussian(mean, tril[:1].expand(C, D, D), 5, seed=2)
    assert torch.equal(sample_gaussian(mean, tril[:1], 5, seed=2), shared)
    strided = sample_gaussian(torch.stack([mean, mean], 2)[..., 0], tril, 5, seed=2)
    assert torch.equal(strided, want)


def test_a_draw_takes_one_seed_from_the_generator():
    bank = GaussianBank()
    bank.fit(torch.randn(40, D), torch.arange(40) % C)
    mean, tril = factors()
    for draw in (
        lambda g: bank.sample(2, generator=g),
        lambda g: sample_gaussian(mean, tril, 2, generator=g),
    ):
        ours, theirs = (torch.Generator().manual_seed(4) for _ in range(2))
        draw(ours)
        torch.randint((1 << 63) - 1, (1,), generator=theirs)
        assert torch.equal(ours.get_state(), theirs.get_state())


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_a_captured_graph_draws_anew(kind):
    bank = GaussianBank(covariance=kind, device="cuda", dtype=torch.float16)
    bank.fit(torch.randn(40, 32), torch.arange(40) % 8)
    classes = [1, 2, 5]
    bank.sample(4, classes)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        x, labels = bank.sample(4, classes)
    torch.cuda.manual_seed(0)
    graph.replay()
    first = x.clone()
    graph.replay()
    assert not torch.equal(x, first)
    torch.cuda.manual_seed(0)
    graph.replay()
    assert torch.equal(x, first)
    assert labels.tolist() == [1] * 4 + [2] * 4 + [5] * 4
    torch.cuda.manual_seed(0)
    assert torch.equal(bank.sample(4, classes)[0], first)
    bank.sample(4, [7])
    bank.fit(torch.randn(30, 32), torch.full((30,), 9))
    bank.sample(4)
    torch.cuda.manual_seed(0)
    graph.replay()
    assert torch.equal(x, first)
