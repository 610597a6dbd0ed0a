import pytest
import torch

from spa_fast import sample_gaussian
from spa_fast.reference.gaussian import pack_tril


def case(C=3, D=5):
    mean = torch.randn(C, D, generator=torch.Generator().manual_seed(0))
    return mean, torch.randn(C, D, D, generator=torch.Generator().manual_seed(1)).tril()


def test_seed_ids_and_number_decide():
    mean, tril = case()
    x = sample_gaussian(mean, tril, 6, seed=3)
    assert x.shape == (3, 6, 5)
    assert torch.equal(sample_gaussian(mean, tril, 6, seed=3, class_ids=torch.arange(3)), x)
    part = sample_gaussian(mean[1:], tril[1:], 4, seed=3, class_ids=torch.tensor([1, 2]))
    torch.testing.assert_close(part, x[1:, :4])
    assert not torch.equal(sample_gaussian(mean, tril, 6, seed=4), x)


def test_forms_agree():
    mean, tril = case()
    want = sample_gaussian(mean, tril, 4, seed=1)
    torch.testing.assert_close(sample_gaussian(mean, pack_tril(tril), 4, seed=1), want)
    torch.testing.assert_close(sample_gaussian(mean, tril.mT.contiguous().mT, 4, seed=1), want)
    std = tril.diagonal(dim1=1, dim2=2).abs()
    diag = sample_gaussian(mean, std, 4, seed=1)
    torch.testing.assert_close(diag, sample_gaussian(mean, torch.diag_embed(std), 4, seed=1))
    low_rank = (torch.zeros(3, 5, 2), std)
    torch.testing.assert_close(sample_gaussian(mean, low_rank, 4, seed=1), diag)


def test_generator_gives_the_seed():
    mean, tril = case()
    generator = torch.Generator().manual_seed(0)
    first = sample_gaussian(mean, tril, 2, generator=generator)
    assert not torch.equal(sample_gaussian(mean, tril, 2, generator=generator), first)
    assert torch.equal(sample_gaussian(mean, tril, 2, generator=generator.manual_seed(0)), first)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtype_is_that_of_the_mean(dtype):
    mean, tril = case()
    assert sample_gaussian(mean.to(dtype), tril, 2, seed=0).dtype == dtype


@pytest.mark.parametrize(("C", "n"), [(0, 3), (3, 0)])
def test_nothing_to_draw(C, n):
    mean, tril = case()
    assert sample_gaussian(mean[:C], tril[:C], n, seed=0).shape == (C, n, 5)


def test_refusals():
    mean, tril = case()
    for factor in (tril[:2], tril[:, :4], torch.zeros(3, 14), (tril, torch.zeros(3, 4))):
        with pytest.raises(ValueError, match="factor: expected"):
            sample_gaussian(mean, factor, 1, seed=0)
    with pytest.raises(ValueError, match="mean: expected"):
        sample_gaussian(mean[0], tril, 1, seed=0)
    with pytest.raises(TypeError, match="mean: expected"):
        sample_gaussian(mean.long(), tril, 1, seed=0)
    with pytest.raises(ValueError, match="n: expected"):
        sample_gaussian(mean, tril, -1, seed=0)
    for seed in (-1, 1 << 64):
        with pytest.raises(ValueError, match="seed: expected"):
            sample_gaussian(mean, tril, 1, seed=seed)
    with pytest.raises(TypeError, match="class_ids"):
        sample_gaussian(mean, tril, 1, seed=0, class_ids=torch.ones(3))
    with pytest.raises(ValueError, match="class_ids"):
        sample_gaussian(mean, tril, 1, seed=0, class_ids=torch.arange(4))
    with pytest.raises(ValueError, match="class ids"):
        sample_gaussian(mean, tril, 1, seed=0, class_ids=torch.tensor([0, 1, 1 << 32]))
