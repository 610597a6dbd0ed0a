"""From a covariance to the factor that is stored: ladder, clipping, low rank, rounding to fp16."""

import math

import pytest
import torch

from spa_fast import GaussianBank
from spa_fast._bank.class_factors import cholesky, low_rank_factor, narrow


def seeded():
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize("condition", [1e0, 1e6, 1e12])
def test_cholesky_reproduces_the_covariance(condition):
    q, _ = torch.linalg.qr(torch.randn(30, 30, dtype=torch.float64))
    cov = q * torch.logspace(0, -math.log10(condition), 30, dtype=torch.float64) @ q.T
    cov = (cov + cov.T) / 2
    tril = cholesky(cov)
    assert not tril.triu(1).any()
    torch.testing.assert_close(tril @ tril.T, cov, rtol=0, atol=1e-10)


@pytest.mark.parametrize("smallest", [-1e-9, -1e-4, -5e-3, -5e-2])
def test_cholesky_climbs_the_ladder_then_clips(smallest):
    q, _ = torch.linalg.qr(torch.randn(20, 20, dtype=torch.float64))
    values = torch.ones(20, dtype=torch.float64)
    values[0] = smallest
    tril = cholesky((q * values) @ q.T)
    assert tril.isfinite().all()
    assert not tril.triu(1).any()
    assert (tril.diagonal() >= 0).all()
    torch.testing.assert_close(tril @ tril.T, (q * values.clamp(min=0)) @ q.T, rtol=0, atol=2e-2)


def test_cholesky_of_rank_deficient_and_zero_matrices():
    x = torch.randn(4, 10, dtype=torch.float64)
    tril = cholesky(x.T @ x)
    torch.testing.assert_close(tril @ tril.T, x.T @ x, rtol=0, atol=1e-4)
    assert not cholesky(torch.zeros(3, 3, dtype=torch.float64)).any()


@pytest.mark.parametrize("function", [cholesky, lambda cov: low_rank_factor(cov, 2)])
def test_indefinite_covariance_is_refused(function):
    with pytest.raises(ValueError, match="not positive semi-definite"):
        function(torch.diag(torch.tensor([1.0, 1.0, -1.0], dtype=torch.float64)))


def test_low_rank_factor_is_exact_for_low_rank_plus_nothing():
    x = torch.randn(10, 3, dtype=torch.float64)
    F, std = low_rank_factor(x @ x.T, 3)
    torch.testing.assert_close(F @ F.T, x @ x.T, rtol=1e-9, atol=1e-9)
    assert float(std.max()) < 1e-6
    a = torch.randn(6, 6, dtype=torch.float64)
    full = a @ a.T
    F, std = low_rank_factor(full, 2)
    assert F.shape == (6, 2)
    torch.testing.assert_close((F @ F.T).diagonal() + std**2, full.diagonal(), rtol=1e-9, atol=1e-9)


def test_clipping_keeps_rows_behind_a_zero_pivot():
    """Two dependent dimensions in front: R then has a zero on its diagonal."""
    x = torch.tensor([[1.0, 1, 0, 2], [0, 0, 1, 1]], dtype=torch.float64)
    cov = x.T @ x
    cov[3, 3] -= 0.05
    tril = cholesky(cov)
    values, vectors = torch.linalg.eigh(cov)
    want = (vectors * values.clamp(min=0)) @ vectors.T
    torch.testing.assert_close(tril @ tril.T, want, rtol=0, atol=0.05)


@pytest.mark.parametrize("scale", [1e-6, 1e-3, 1.0, 1e3, 1e6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_narrow_keeps_every_row(scale, dtype):
    tril = torch.randn(40, 40, dtype=torch.float64).tril() * scale
    (stored,), power = narrow((tril,), dtype)
    assert stored.dtype == dtype
    assert math.frexp(power)[0] == 0.5
    assert power == 1 or (dtype == torch.float16 and scale not in (1.0, 1e3))
    row = torch.linalg.vector_norm(stored.double() * power - tril, dim=1)
    assert (row <= torch.finfo(dtype).eps * torch.linalg.vector_norm(tril, dim=1)).all()


def test_narrow_refuses_what_does_not_fit():
    std = torch.tensor([1e-8, 1e4], dtype=torch.float64)
    with pytest.raises(ValueError, match=r"1e-08 to 1e\+04 do not fit torch.float16"):
        narrow((std,), torch.float16)
    narrow((std,), torch.bfloat16)
    with pytest.raises(ValueError, match=r"do not fit torch.float32"):
        narrow((std * 1e36,), torch.float32)


@pytest.mark.parametrize("kind", ["full", "diag", "lowrank", "shared"])
@pytest.mark.parametrize("scale", [1e-6, 1e5])
def test_badly_scaled_classes_draw_alike_from_fp16(kind, scale):
    sizes = torch.tensor([scale, scale, scale if kind == "shared" else 1.0])
    labels = torch.arange(90) % 3
    x = torch.randn(90, 5) * sizes[labels, None]
    draws = []
    for dtype in (torch.float32, torch.float16):
        bank = GaussianBank(covariance=kind, ridge=1e-4 * min(1, scale**2), dtype=dtype, rank=2)
        bank.fit(x, labels)
        draws.append(bank.sample(50, generator=seeded())[0] / sizes.repeat_interleave(50)[:, None])
    assert draws[0].isfinite().all()
    torch.testing.assert_close(draws[1], draws[0], rtol=2e-3, atol=2e-3)


def test_a_scaled_class_leaves_the_bits_of_others_alone():
    x, labels = torch.randn(60, 5), torch.arange(60) % 2
    alone, beside = GaussianBank(dtype=torch.float16), GaussianBank(dtype=torch.float16)
    alone.fit(x, labels)
    beside.fit(x, labels)
    beside.fit(1e6 * x[:30], torch.full((30,), 2))
    want = alone.sample(4, generator=seeded())[0]
    assert torch.equal(beside.sample(4, generator=seeded())[0][:8], want)


def test_a_class_that_fp16_cannot_hold_is_named():
    x = torch.randn(30, 3) * torch.tensor([1e-7, 1.0, 1e5])
    bank = GaussianBank(dtype=torch.float16, ridge=1e-16)
    bank.fit(x, torch.full((30,), 41))
    with pytest.raises(ValueError, match=r"class 41: standard deviations .* do not fit torch.float16"):
        bank.freeze()
    big = GaussianBank(ridge=1.0)
    big.fit(torch.randn(30, 3).double() * 1e60, torch.full((30,), 6))
    with pytest.raises(ValueError, match=r"class 6: .* do not fit torch.float32"):
        big.sample(1)
    far = GaussianBank()
    far.fit(torch.randn(30, 3).double() + 1e60, torch.full((30,), 6))
    with pytest.raises(ValueError, match=r"class 6: .* do(es)? not fit torch.float32"):
        far.sample(1)
