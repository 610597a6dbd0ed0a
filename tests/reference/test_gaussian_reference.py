import math

import pytest
import torch
from scipy import stats

from spa_fast.reference import gaussian as ref


def spd(C, D, seed=0):
    a = torch.randn(C, D, D, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return a @ a.mT / D + 0.1 * torch.eye(D, dtype=torch.float64)


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ((0, 0, 0, 0), (0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_philox_known_answers(counter, key, words):
    """The vectors published with Random123 for philox4x32-10."""
    out = ref.philox4x32(tuple(torch.tensor(c) for c in counter), key)
    assert " ".join(f"{int(w):08x}" for w in out) == words


def test_philox_against_python_integers():
    g = torch.Generator().manual_seed(0)
    counter = torch.randint(0, 1 << 32, (4, 200), generator=g)
    k = [int(x) for x in torch.randint(0, 1 << 32, (2,), generator=g)]
    got = torch.stack(ref.philox4x32(tuple(counter), (k[0], k[1])))
    for i in range(counter.shape[1]):
        x, key = counter[:, i].tolist(), list(k)
        for _ in range(10):
            p0, p1 = x[0] * 0xD2511F53, x[2] * 0xCD9E8D57
            x = [(p1 >> 32) ^ x[1] ^ key[0], p1 & 0xFFFFFFFF, (p0 >> 32) ^ x[3] ^ key[1], p0 & 0xFFFFFFFF]
            key = [(key[0] + 0x9E3779B9) & 0xFFFFFFFF, (key[1] + 0xBB67AE85) & 0xFFFFFFFF]
        assert got[:, i].tolist() == x


def test_box_muller_at_its_edges():
    words = torch.tensor([0, 1, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF])
    z = torch.stack(ref._box_muller(words[:, None], words[None, :]))
    assert z.isfinite().all()
    assert float(z.abs().max()) == pytest.approx(math.sqrt(66 * math.log(2)))


def test_first_normals_by_hand():
    """Seed 0, class 0, sample 0: the words of the first known answer."""
    w = [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    want = []
    for radius, angle in ((w[0], w[1]), (w[2], w[3])):
        r = math.sqrt(-2 * math.log(radius * 2.0**-32))
        want += [r * math.cos(math.pi * angle * 2.0**-31), r * math.sin(math.pi * angle * 2.0**-31)]
    got = ref.normals(0, torch.tensor([0]), 1, 4)[0, 0]
    torch.testing.assert_close(got, torch.tensor(want, dtype=torch.float64), rtol=1e-6, atol=1e-6)


def test_a_normal_depends_on_its_own_coordinates_only():
    ids = torch.tensor([5, 0, 17, 4_000_000_000])
    z = ref.normals(123, ids, 6, 10)
    assert torch.equal(ref.normals(123, ids[[2, 0]], 6, 10), z[[2, 0]])
    assert torch.equal(ref.normals(123, ids, 3, 10), z[:, :3])
    assert torch.equal(ref.normals(123, ids, 6, 7), z[..., :7])
    assert torch.equal(ref.normals(123, ids, 4, 10, first=2), z[:, 2:])


def test_both_halves_of_the_seed_count():
    ids = torch.arange(2)
    draws = [ref.normals(seed, ids, 2, 4) for seed in (1, 1 << 32, (1 << 64) - 1, 1 + (1 << 32))]
    for i, a in enumerate(draws):
        assert all(not (a == b).any() for b in draws[i + 1 :])


def test_normals_are_normal_and_independent():
    z = ref.normals(2024, torch.arange(8), 1000, 125)
    flat = z.flatten()
    count = flat.numel()
    assert abs(float(flat.mean())) < 5 / math.sqrt(count)
    assert abs(float(flat.var()) - 1) < 5 * math.sqrt(2 / count)
    assert abs(float((flat**4).mean()) - 3) < 5 * math.sqrt(96 / count)
    assert stats.kstest(flat.numpy(), "norm").pvalue > 1e-3
    for d in range(0, 125, 12):
        assert stats.kstest(z[..., d].flatten().numpy(), "norm").pvalue > 1e-4
    bound = 5 / math.sqrt(count)
    for axis in range(3):
        here, there = z.narrow(axis, 0, z.shape[axis] - 1), z.narrow(axis, 1, z.shape[axis] - 1)
        assert abs(float((here * there).mean())) < bound * math.sqrt(count / here.numel())
    assert abs(float((z * ref.normals(2025, torch.arange(8), 1000, 125)).mean())) < bound


def test_moments_over_a_million_draws():
    n, cov = 250_000, spd(4, 5)
    mean = torch.randn(4, 5, dtype=torch.float64)
    x = ref.sample_gaussian(mean, ref.pack_tril(torch.linalg.cholesky(cov)), n, 7, torch.arange(4))
    sd = cov.diagonal(dim1=1, dim2=2).sqrt()
    assert ((x.mean(1) - mean).abs() < 5 * sd / math.sqrt(n)).all()
    centered = x - mean[:, None]
    spread = (cov**2 + (sd[:, :, None] * sd[:, None, :]) ** 2).sqrt()
    assert ((centered.mT @ centered / n - cov).abs() < 5 * spread / math.sqrt(n)).all()
    white = torch.linalg.solve_triangular(torch.linalg.cholesky(cov), centered.mT, upper=False)
    for distance in white.square().sum(1):
        assert stats.kstest(distance[:20000].numpy(), "chi2", (5,)).pvalue > 1e-4


@pytest.mark.parametrize("dim", [1, 3, 64, 65, 130])
def test_packed_triangle_is_the_dense_product(dim):
    mean, tril = torch.randn(3, dim, dtype=torch.float64), torch.linalg.cholesky(spd(3, dim))
    ids = torch.tensor([4, 1, 9])
    z = ref.normals(11, ids, 5, dim)
    packed = ref.pack_tril(tril)
    got = ref.sample_gaussian(mean, packed, 5, 11, ids)
    torch.testing.assert_close(got, mean[:, None] + z @ tril.mT, rtol=1e-12, atol=1e-12)
    shared = ref.sample_gaussian(mean, packed[:1], 5, 11, ids)
    torch.testing.assert_close(shared, mean[:, None] + z @ tril[:1].mT, rtol=1e-12, atol=1e-12)


def test_seed_as_a_tensor_counts_modulo_two_to_the_64():
    ids = torch.arange(2)
    for seed in (0, 5, (1 << 63) - 1, 1 << 63, (1 << 64) - 1):
        as_tensor = torch.tensor([seed - (seed >> 63 << 64)])
        assert torch.equal(ref.normals(as_tensor, ids, 2, 5), ref.normals(seed, ids, 2, 5))


def test_diagonal_is_full_of_diagonal():
    mean, std = torch.randn(3, 6), torch.rand(3, 6)
    ids = torch.arange(3)
    full = ref.sample_gaussian(mean, ref.pack_tril(torch.diag_embed(std)), 4, 3, ids)
    torch.testing.assert_close(ref.sample_gaussian(mean, std, 4, 3, ids), full)


def test_low_rank_is_the_product_of_its_parts():
    F, std, mean = torch.randn(2, 7, 3), torch.rand(2, 7), torch.randn(2, 7)
    z = ref.normals(3, torch.arange(2), 4, 10).float()
    want = mean[:, None] + z[..., 7:] @ F.mT + z[..., :7] * std[:, None]
    torch.testing.assert_close(ref.sample_gaussian(mean, (F, std), 4, 3, torch.arange(2)), want)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_low_precision_rounds_the_fp64_draw_once(dtype):
    mean, tril = torch.randn(3, 20).to(dtype), ref.pack_tril(torch.linalg.cholesky(spd(3, 20))).to(dtype)
    got = ref.sample_gaussian(mean, tril, 4, 3, torch.arange(3))
    want = ref.sample_gaussian(mean.double(), tril.double(), 4, 3, torch.arange(3))
    assert got.dtype == dtype
    unit = torch.finfo(dtype).eps
    torch.testing.assert_close(got.double(), want, rtol=unit, atol=4e-6)


@pytest.mark.parametrize("dim", [1, 2, 5])
def test_packed_triangle_round_trip(dim):
    tril = torch.randn(2, dim, dim).tril()
    packed = ref.pack_tril(tril)
    assert packed.shape == (2, dim * (dim + 1) // 2)
    assert packed[0].tolist() == [float(tril[0, i, j]) for i in range(dim) for j in range(i + 1)]
    assert torch.equal(ref.unpack_tril(packed, dim), tril)
    for same in (tril.mT.contiguous().mT, tril + torch.ones(dim, dim).triu(1)):
        assert torch.equal(ref.pack_tril(same), packed)
