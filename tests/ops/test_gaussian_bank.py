import math
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from sklearn.covariance import OAS, LedoitWolf

from spa_fast import GaussianBank, sample_gaussian

KINDS = ("full", "diag", "lowrank", "shared")
# Kinds and shrinkage, one of each beside the plain ones.
FORMS = (
    *((kind, "none") for kind in KINDS),
    ("full", "ledoit_wolf"),
    ("lowrank", "ledoit_wolf"),
    ("shared", "oas"),
)


def data(n=120, D=6, classes=4, seed=0, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % classes
    mix = torch.randn(classes, D, D, generator=g)
    features = torch.einsum("nd,nde->ne", torch.randn(n, D, generator=g), mix[labels]) + 3 * labels[:, None]
    return features.to(dtype), labels


def fitted(kind="full", **settings):
    bank = GaussianBank(covariance=kind, **settings)
    bank.fit(*data())
    return bank


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def assert_same_moments(a, b, rtol=1e-12):
    for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True):
        torch.testing.assert_close(x, y, rtol=rtol, atol=1e-11)


def test_moments_are_those_of_the_data():
    features, labels = data()
    bank = GaussianBank(ridge=1e-3)
    bank.fit(features, labels)
    mean, cov = bank.moments()
    for c in range(4):
        x = features[labels == c].double()
        torch.testing.assert_close(mean[c], x.mean(0), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(cov[c], x.T.cov() + 1e-3 * torch.eye(6).double(), rtol=1e-11, atol=1e-12)


def test_shrink_adds_the_average_variance_and_covariance():
    features, labels = data()
    _, cov = fitted(shrink="average").moments([2])
    raw = features[labels == 2].double().T.cov()
    off = (raw.sum() - raw.trace()) / 30
    eye = torch.eye(6).double()
    torch.testing.assert_close(cov[0], raw + raw.trace() / 6 * eye + off * (1 - eye) + 1e-4 * eye)


@pytest.mark.parametrize("n", [2, 5, 40])
@pytest.mark.parametrize("D", [1, 3, 20])
@pytest.mark.parametrize(("shrink", "estimator"), [("ledoit_wolf", LedoitWolf), ("oas", OAS)])
def test_shrinkage_is_that_of_scikit_learn(shrink, estimator, n, D):
    x = torch.randn(n, D).double() * torch.linspace(0.1, 3, D) + 5
    bank = GaussianBank(shrink=shrink, ridge=1e-9)
    for part in x.split([1, *([1] if n > 2 else []), n - (2 if n > 2 else 1)]):
        bank.fit(part, torch.zeros(len(part), dtype=torch.int64))
    cov = bank.moments()[1][0] - 1e-9 * torch.eye(D)
    want = torch.from_numpy(estimator().fit(x.numpy()).covariance_)
    torch.testing.assert_close(cov, want, rtol=1e-9, atol=1e-9)


def test_shared_oas_is_that_of_the_residuals():
    features, labels = data(dtype=torch.float64)
    means = torch.stack([features[labels == c].mean(0) for c in range(4)])
    want = OAS(assume_centered=True).fit((features - means[labels]).numpy()).covariance_
    bank = GaussianBank(covariance="shared", shrink="oas")
    bank.fit(features, labels)
    torch.testing.assert_close(bank.moments([1])[1][0] - 1e-4 * torch.eye(6), torch.from_numpy(want))


def test_shared_is_the_pooled_within_class_covariance():
    features, labels = data()
    _, cov = fitted("shared").moments()
    means = torch.stack([features[labels == c].double().mean(0) for c in range(4)])
    x = features.double() - means[labels]
    torch.testing.assert_close(cov[3], x.T @ x / (120 - 4) + 1e-4 * torch.eye(6).double())
    assert torch.equal(cov[0], cov[3])


@pytest.mark.parametrize(("kind", "shrink"), FORMS)
@pytest.mark.parametrize("parts", [2, 7, 120])
def test_any_split_and_order_gives_the_same_moments(kind, shrink, parts):
    features, labels = data()
    bank = GaussianBank(covariance=kind, shrink=shrink)
    for index in torch.randperm(120, generator=seeded()).chunk(parts):
        bank.fit(features[index], labels[index])
    assert_same_moments(bank, fitted(kind, shrink=shrink), rtol=1e-11)


@pytest.mark.parametrize(("kind", "shrink"), FORMS)
def test_merge_is_the_fit_of_all(kind, shrink):
    features, labels = data()
    first, second = (torch.arange(120) < 50) & (labels != 3), (torch.arange(120) >= 50) | (labels == 3)
    banks = [GaussianBank(covariance=kind, shrink=shrink) for _ in range(3)]
    banks[0].fit(features[first], labels[first])
    banks[1].fit(features[second], labels[second])
    for bank in banks[:2]:
        banks[2].merge(bank)
    banks[2].merge(GaussianBank(covariance=kind, shrink=shrink))
    assert_same_moments(banks[2], fitted(kind, shrink=shrink), rtol=1e-11)


def test_moments_far_from_the_origin_keep_their_digits():
    features, labels = data(dtype=torch.float64)
    bank = GaussianBank()
    for index in torch.arange(120).chunk(9):
        bank.fit(features[index] + 1e6, labels[index])
    near = GaussianBank()
    near.fit(features, labels)
    torch.testing.assert_close(bank.moments()[1], near.moments()[1], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_a_class_draws_alike_whatever_the_subset(kind):
    bank = fitted(kind)
    whole = bank.sample(5, generator=seeded())[0].view(4, 5, 6)
    for classes in ([3], [1, 3], [3, 0], [1, 2]):
        part, labels = bank.sample(5, classes, seeded())
        torch.testing.assert_close(part.view(-1, 5, 6), whole[classes], rtol=1e-6, atol=1e-6)
        assert torch.equal(labels, torch.tensor(classes).repeat_interleave(5))
    fewer = bank.sample(2, generator=seeded())[0].view(4, 2, 6)
    torch.testing.assert_close(fewer, whole[:, :2], rtol=1e-6, atol=1e-6)


def test_a_draw_is_sample_gaussian_with_the_labels_as_ids():
    bank = GaussianBank()
    features, labels = data()
    bank.fit(features, labels * 10 + 3)
    mean, cov = bank.moments()
    seed = int(torch.randint((1 << 63) - 1, (), generator=seeded(9)))
    want = sample_gaussian(
        mean, torch.linalg.cholesky(cov), 3, seed=seed, class_ids=torch.tensor(bank.class_ids)
    )
    got, _ = bank.sample(3, generator=seeded(9))
    torch.testing.assert_close(got.view(4, 3, 6).double(), want, rtol=1e-5, atol=1e-5)


def test_generator_advances_and_repeats():
    bank, generator = fitted(), seeded()
    first, second = bank.sample(3, generator=generator)[0], bank.sample(3, generator=generator)[0]
    assert not torch.equal(first, second)
    generator.manual_seed(0)
    assert torch.equal(bank.sample(3, generator=generator)[0], first)
    torch.manual_seed(5)
    third = bank.sample(3)[0]
    torch.manual_seed(5)
    assert torch.equal(bank.sample(3)[0], third)


def test_classes_added_later_leave_the_others_alone():
    features, labels = data()
    bank = GaussianBank()
    early = labels < 2
    bank.fit(features[early], labels[early] + 5)
    before = bank.sample(4, generator=seeded())[0]
    bank.fit(features[~early], labels[~early] - 2)
    assert bank.class_ids == [0, 1, 5, 6]
    torch.testing.assert_close(bank.sample(4, [5, 6], seeded())[0], before)
    assert_same = bank.sample(4, generator=seeded())[0].view(4, 4, 6)[2:].flatten(0, 1)
    torch.testing.assert_close(assert_same, before)


def test_diag_bank_is_the_full_bank_of_its_diagonal():
    diag = fitted("diag")
    mean, cov = diag.moments()
    full = GaussianBank.from_moments(mean, cov, ridge=1e-12)
    torch.testing.assert_close(full.sample(7, generator=seeded())[0], diag.sample(7, generator=seeded())[0])


def test_rank_deficient_classes_draw():
    features, labels = torch.randn(12, 40), torch.arange(12) % 3
    bank = GaussianBank()
    bank.fit(features, labels)
    x, _ = bank.sample(2000, generator=seeded())
    assert x.isfinite().all()
    _, basis = torch.linalg.eigh(bank.moments([0])[1][0])
    away = (x[:2000].double() - bank.moments([0])[0]) @ basis[:, :30]
    assert float(away.std()) == pytest.approx(1e-2, rel=0.05)


def test_constant_features_draw_the_ridge():
    bank = GaussianBank(ridge=0.25)
    bank.fit(torch.ones(10, 5), torch.zeros(10, dtype=torch.int64))
    x, _ = bank.sample(20_000, generator=seeded())
    assert float(x.std()) == pytest.approx(0.5, rel=0.02)


@pytest.mark.parametrize("kind", ["full", "diag", "lowrank"])
def test_single_images_take_the_pooled_diagonal_and_warn_once(kind):
    bank = fitted(kind)
    bank.fit(torch.full((2, 6), 100.0), torch.tensor([17, 11]))
    pooled = torch.stack([bank.moments([c])[1][0] for c in range(4)]).mean(0).diagonal()
    with pytest.warns(UserWarning, match=r"class 11, 17: one image only"):
        bank.sample(1)
    _, cov = bank.moments([11])
    torch.testing.assert_close(cov[0], pooled.diag())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        x, _ = bank.sample(40_000, [17], seeded())
        bank.fit(*data(seed=3))
        bank.sample(1)
    torch.testing.assert_close(x.double().var(0), pooled, rtol=0.05, atol=0)


def test_only_single_images_draw_the_ridge():
    bank = GaussianBank(ridge=0.01)
    bank.fit(torch.randn(2, 3), torch.arange(2))
    with pytest.warns(UserWarning, match="class 0, 1"):
        x, _ = bank.sample(20_000, [1], seeded())
    assert float((x - x.mean(0)).std()) == pytest.approx(0.1, rel=0.03)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("kind", "shrink"), FORMS)
def test_state_round_trip_is_exact(kind, shrink, dtype, tmp_path):
    settings = {"ridge": 0.003, "rank": 3, "shrink": shrink, "dtype": dtype}
    bank = fitted(kind, **settings)
    bank.save(tmp_path / "bank.safetensors")
    loaded = GaussianBank.load(tmp_path / "bank.safetensors")
    copy = GaussianBank(covariance=kind, **settings)
    copy.load_state_dict(bank.state_dict())
    for other in (loaded, copy):
        for x, y in zip(bank.state_dict().values(), other.state_dict().values(), strict=True):
            assert torch.equal(x, y)
        assert torch.equal(bank.sample(4, generator=seeded())[0], other.sample(4, generator=seeded())[0])
    more = data(seed=4)
    for other in (bank, loaded):
        other.fit(*more)
    assert_same_moments(bank, loaded, rtol=0)
    assert [p.name for p in tmp_path.iterdir()] == ["bank.safetensors"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("kind", "shrink"), FORMS)
def test_frozen_classes_draw_the_same_bits_before_after_and_from_a_file(kind, shrink, dtype, tmp_path):
    features, labels = data()
    early = labels % 2 == 1
    bank = GaussianBank(covariance=kind, shrink=shrink, dtype=dtype, rank=3)
    bank.fit(1e5 * features[early], labels[early])
    want, (_, cov) = bank.sample(4, generator=seeded())[0], bank.moments()
    bank.freeze()
    bank.freeze()
    assert torch.equal(bank.sample(4, generator=seeded())[0], want)
    torch.testing.assert_close(
        bank.moments()[1], cov, rtol=0, atol=(1 if kind == "lowrank" else 1e-3) * cov.max()
    )
    bank.fit(1e5 * features[~early], labels[~early])
    bank.save(tmp_path / "bank.safetensors")
    loaded = GaussianBank.load(tmp_path / "bank.safetensors")
    for a, b in zip(bank.state_dict().items(), loaded.state_dict().items(), strict=True):
        assert a[0] == b[0]
        assert torch.equal(a[1], b[1])
    for other in (bank, loaded):
        whole = other.sample(4, generator=seeded())[0]
        assert torch.equal(other.sample(4, [1, 3], seeded())[0], whole.view(4, 4, 6)[[1, 3]].flatten(0, 1))
        if kind != "shared":
            assert torch.equal(other.sample(4, [1, 3], seeded())[0], want)
        other.freeze()
        assert torch.equal(other.sample(4, generator=seeded())[0], whole)


@pytest.mark.parametrize("kind", ["full", "lowrank"])
def test_frozen_classes_are_fitted_no_more(kind):
    features, labels = data()
    bank = fitted(kind)
    bank.freeze()
    state = bank.state_dict()
    assert state["scatter"].shape == (0, 21)
    for refused in (
        lambda: bank.fit(features, labels + 2),
        lambda: bank.merge(fitted(kind)),
        lambda: fitted(kind).merge(bank),
    ):
        with pytest.raises(ValueError, match=r"class (0, 1, )?2, 3: frozen"):
            refused()
    assert all(torch.equal(a, b) for a, b in zip(state.values(), bank.state_dict().values(), strict=True))


@pytest.mark.parametrize("kind", ["diag", "shared"])
def test_kinds_without_a_scatter_of_their_own_stay_open(kind):
    features, labels = data()
    bank, whole = fitted(kind), fitted(kind)
    bank.freeze()
    for b in (bank, whole):
        b.fit(features + 1, labels)
    assert_same_moments(bank, whole, rtol=0)


def test_single_images_after_a_freeze_take_what_frozen_classes_pooled():
    bank, frozen = fitted(), fitted()
    frozen.freeze()
    for b in (bank, frozen):
        b.fit(torch.full((1, 6), 100.0), torch.tensor([9]))
        with pytest.warns(UserWarning, match="class 9: one image"):
            b.sample(1)
    torch.testing.assert_close(frozen.moments([9])[1], bank.moments([9])[1], rtol=1e-12, atol=0)
    frozen.freeze()
    held = frozen.sample(5, [9], seeded())[0]
    frozen.fit(*(x + 20 for x in data(seed=8)))
    assert torch.equal(frozen.sample(5, [9], seeded())[0], held)


@pytest.mark.parametrize(
    ("dtype", "packed", "live"), [(torch.float32, 53e6, 159e6), (torch.float16, 27e6, 133e6)]
)
def test_memory_of_100_classes_of_512(dtype, packed, live):
    bank = GaussianBank(dtype=dtype)
    for c in range(100):
        bank.fit(torch.randn(3, 512), torch.full((3,), c))
    bank.sample(1)
    # Factor and fp32 means are what draws read.
    held = bank._store.held
    assert 0.9 * packed <= held_bytes(held) <= packed
    assert held_bytes(bank) <= live
    bank.freeze()
    assert held_bytes(bank._store.held) <= packed
    # Beside them the exact means, 0.4 MB.
    assert held_bytes(bank) <= packed + 0.5e6


def held_bytes(x):
    """Bytes of all tensors that x reaches."""
    storages, seen, todo = {}, set(), [x]
    while todo:
        y = todo.pop()
        if id(y) in seen:
            continue
        seen.add(id(y))
        if isinstance(y, torch.Tensor):
            storages[y.data_ptr()] = y.untyped_storage().nbytes()
        elif isinstance(y, dict):
            todo += y.values()
        elif isinstance(y, (list, tuple, set)):
            todo += y
        elif hasattr(y, "__dict__"):
            todo += vars(y).values()
    return sum(storages.values())


def test_empty_bank_round_trip(tmp_path):
    GaussianBank().save(tmp_path / "bank.safetensors")
    bank = GaussianBank.load(tmp_path / "bank.safetensors")
    assert len(bank) == 0
    bank.fit(*data())
    assert len(bank) == 4


def test_state_is_a_copy():
    bank = fitted()
    state = bank.state_dict()
    mean = state["mean"].clone()
    copy = GaussianBank()
    copy.load_state_dict(state)
    bank.fit(*data(seed=1))
    copy.fit(*data(seed=1))
    assert torch.equal(state["mean"], mean)


def test_from_moments_weighs_later_data():
    features, labels = data()
    bank = fitted()
    mean, _ = bank.moments()
    cov = bank.moments()[1] - 1e-4 * torch.eye(6).double()
    again = GaussianBank.from_moments(mean, cov, count=[30] * 4)
    torch.testing.assert_close(again.moments()[1], bank.moments()[1])
    again.fit(features, labels)
    bank.fit(features, labels)
    assert_same_moments(again, bank, rtol=1e-10)


def test_from_moments_refuses_by_class():
    mean, good = torch.zeros(2, 3), torch.eye(3).expand(2, 3, 3).clone()
    for change, message in (
        (lambda c: c[0, 1].fill_(torch.nan), "finite"),
        (lambda c: c[0, 1].fill_(0.5), "not symmetric"),
        (lambda c: c[2, 2].fill_(-1.0), "not positive semi-definite"),
    ):
        cov = good.clone()
        change(cov[1])
        with pytest.raises(ValueError, match=f"class 9: .*{message}"):
            GaussianBank.from_moments(mean, cov, class_ids=[4, 9])
    cov = good.clone()
    cov[1, 2, 2] = -1
    with pytest.raises(ValueError, match=r"class 9: .*variances >= 0, got -1"):
        GaussianBank.from_moments(mean, cov, class_ids=[4, 9], covariance="diag")
    with pytest.raises(ValueError, match="column"):
        GaussianBank.from_moments(mean[:, :0], good[:, :0, :0])
    with pytest.raises(TypeError, match="mean"):
        GaussianBank.from_moments(mean.to(torch.complex64), good)
    with pytest.raises(ValueError, match=r"class 1: .*variances"):
        GaussianBank.from_moments(mean, torch.tensor([[1.0, 1, 1], [1, -1, 1]]), covariance="diag")
    with pytest.raises(ValueError, match="cov: expected"):
        GaussianBank.from_moments(mean, good[0])
    with pytest.raises(ValueError, match="distinct"):
        GaussianBank.from_moments(mean, good, class_ids=[1, 1])
    with pytest.raises(ValueError, match="count"):
        GaussianBank.from_moments(mean, good, count=[2, 1])
    with pytest.raises(ValueError, match="ledoit_wolf"):
        GaussianBank.from_moments(mean, good, shrink="ledoit_wolf")


def test_bad_features_are_refused_and_change_nothing():
    features, labels = data()
    bank = fitted()
    state = bank.state_dict()
    bad = features.clone()
    bad[[2, 7], 3] = torch.nan
    with pytest.raises(ValueError, match=r"not finite or beyond .* for class 2, 3"):
        bank.fit(bad, labels)
    with pytest.raises(ValueError, match=r"width 6 .* got 5"):
        bank.fit(features[:, :5], labels)
    with pytest.raises(ValueError, match="at least one row and column"):
        bank.fit(features[:0], labels[:0])
    with pytest.raises(ValueError, match="labels"):
        bank.fit(features, labels[:-1])
    with pytest.raises(TypeError, match="labels"):
        bank.fit(features, labels.float())
    with pytest.raises(ValueError, match="class ids"):
        bank.fit(features, labels - 1)
    with pytest.raises(TypeError, match="labels"):
        bank.fit(features, labels.tolist())
    with pytest.raises(TypeError, match="features"):
        bank.fit(features.long(), labels)
    with pytest.raises(ValueError, match="covariance"):
        bank.merge(GaussianBank(covariance="diag"))
    with pytest.raises(ValueError, match="shrink"):
        bank.merge(GaussianBank(shrink="oas"))
    wide = GaussianBank()
    wide.fit(torch.randn(3, 7), torch.arange(3))
    with pytest.raises(ValueError, match=r"width 6 .* got 7"):
        bank.merge(wide)
    with pytest.raises(ValueError, match="at least one row and column"):
        GaussianBank().fit(torch.zeros(3, 0), torch.arange(3))
    with pytest.raises(ValueError, match=r"beyond 1e\+75 for class 0, 1, 2"):
        bank.fit(torch.full((3, 6), 1e200, dtype=torch.float64), torch.arange(3))
    assert all(torch.equal(a, b) for a, b in zip(state.values(), bank.state_dict().values(), strict=True))


def test_bad_settings_and_draws_are_refused():
    for settings, message in (
        ({"ridge": 0.0}, "ridge"),
        ({"ridge": -1.0}, "ridge"),
        ({"ridge": math.nan}, "ridge"),
        ({"rank": 0}, "rank"),
        ({"covariance": "spherical"}, "covariance"),
        ({"shrink": "ledoit-wolf"}, r"did you mean 'ledoit_wolf'"),
        ({"shrink": "oas", "covariance": "diag"}, "all covariances"),
        ({"shrink": "ledoit_wolf", "covariance": "diag"}, "all covariances"),
        ({"shrink": "ledoit_wolf", "covariance": "shared"}, "every class's scatter"),
    ):
        with pytest.raises(ValueError, match=message):
            GaussianBank(**settings)
    with pytest.raises(TypeError, match="dtype"):
        GaussianBank(dtype=torch.float64)
    with pytest.raises(TypeError, match="rank"):
        GaussianBank(rank=2.5)
    bank = fitted()
    for n in (2.5, "4", None):
        with pytest.raises(TypeError, match="n: expected an integer"):
            bank.sample(n)
    with pytest.raises(ValueError, match=r"n: expected 0 to 2\^32"):
        bank.sample(10**30)
    for classes in ([1.5], 2, ["a"]):
        with pytest.raises(TypeError, match="classes: expected integers"):
            bank.sample(1, classes)
    with pytest.raises(ValueError, match="n: expected"):
        bank.sample(-1)
    with pytest.raises(ValueError, match="no class 5, 8"):
        bank.sample(1, [8, 0, 5])
    with pytest.raises(ValueError, match="empty"):
        GaussianBank().sample(1)
    for n, classes in ((0, None), (3, [])):
        x, labels = bank.sample(n, classes)
        assert x.shape == (0, 6)
        assert labels.shape == (0,)


def test_bad_states_and_files_are_refused(tmp_path):
    bank, path = fitted(), tmp_path / "bank.safetensors"
    state = bank.state_dict()
    for change in (
        {"mean": state["mean"].float()},
        {"mean": state["mean"] * torch.nan},
        {"count": state["count"] * 0},
        {"class_ids": state["class_ids"].flip(0)},
        {"class_ids": state["class_ids"] - 1},
        {"scatter": state["scatter"][:, 1:]},
    ):
        with pytest.raises(ValueError, match=r"state|class ids"):
            bank.load_state_dict({**state, **change})
    with pytest.raises(ValueError, match="keys"):
        bank.load_state_dict({"mean": state["mean"]})
    with pytest.raises(ValueError, match="does not fit"):
        GaussianBank(covariance="diag").load_state_dict(state)
    with pytest.raises(ValueError, match="keys"):
        GaussianBank(shrink="ledoit_wolf").load_state_dict(state)
    bank.freeze()
    frozen = bank.state_dict()
    for change in (
        {"frozen": frozen["frozen"].flip(0)},
        {"frozen": frozen["frozen"] + 1},
        {"frozen": frozen["frozen"][:2]},
        {"frozen": torch.tensor(1)},
        {"released": frozen["released"][:2]},
        {"factor_0": frozen["factor_0"][:2]},
        {"factor_0": frozen["factor_0"] * torch.nan},
        {"factor_0": frozen["factor_0"].half()},
        {"factor_1": frozen["factor_0"]},
        {"factor_scale": frozen["factor_scale"] * 0},
    ):
        with pytest.raises(ValueError, match="state"):
            bank.load_state_dict({**frozen, **change})
    with pytest.raises(ValueError, match="without frozen"):
        bank.load_state_dict({**state, "factor_0": frozen["factor_0"]})
    bank.load_state_dict(state)
    save_file(state, path)
    with pytest.raises(ValueError, match=r"bank\.safetensors: not a Gaussian bank"):
        GaussianBank.load(path)
    bank.save(path)
    content = path.read_bytes()
    assert set(load_file(path)) == set(state)
    for length in range(0, len(content), 64):
        path.write_bytes(content[:length])
        with pytest.raises(ValueError, match=r"bank\.safetensors"):
            GaussianBank.load(path)
