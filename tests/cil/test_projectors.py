import pytest
import torch

from spa_fast.cil.projectors import ProjectorBank


def grown(form, tasks=3, width=5, **options):
    torch.manual_seed(0)
    bank = ProjectorBank(width, form=form, **options)
    for _ in range(tasks):
        bank.add_task()
        with torch.no_grad():
            for p in bank.trainable():
                p.add_(torch.randn_like(p))
    return bank


def by_hand(bank, z):
    """The sum written out, layer by layer."""
    outs = [layer(z) for layer in bank.tasks]
    outs = outs[-1:] if bank.aggregate == "latest" else outs
    total = sum(outs) / (len(outs) if bank.aggregate == "mean" else 1)
    return total + (z if bank.form in ("residual_zero", "mlp") else 0)


@pytest.mark.parametrize("form", ["residual_zero", "linear", "identity_first", "mlp"])
@pytest.mark.parametrize("aggregate", ["sum", "mean", "latest"])
@pytest.mark.parametrize("bias", [True, False])
def test_forward_is_the_explicit_sum(form, aggregate, bias):
    bank = grown(form, aggregate=aggregate, bias=bias)
    z = torch.randn(4, 3, 5)
    torch.testing.assert_close(bank(z), by_hand(bank, z))


@pytest.mark.parametrize("form", ["residual_zero", "linear", "identity_first"])
def test_fold_equals_forward(form):
    bank = grown(form)
    z = torch.randn(7, 5)
    weight, bias = bank.fold()
    torch.testing.assert_close(z @ weight.T + bias, bank(z))


def test_mlp_refuses_to_fold():
    with pytest.raises(ValueError, match="mlp"):
        grown("mlp").fold()


@pytest.mark.parametrize("form", ["residual_zero", "identity_first", "mlp"])
def test_starts_as_the_identity_and_stays_put_when_a_task_is_added(form):
    bank = ProjectorBank(5, form=form)
    z = torch.randn(2, 5)
    torch.testing.assert_close(bank(z), z)
    bank.add_task()
    torch.testing.assert_close(bank(z), z)
    bank = grown(form)
    before = bank(z)
    bank.add_task()
    torch.testing.assert_close(bank(z), before)


def test_old_projectors_keep_their_bits_under_training_with_weight_decay():
    bank = grown("residual_zero", tasks=2)
    old = [p.clone() for p in bank.parameters()]
    bank.add_task()
    optimizer = torch.optim.SGD(bank.trainable(), lr=0.1, momentum=0.9, weight_decay=0.5)
    for _ in range(5):
        optimizer.zero_grad()
        bank(torch.randn(8, 5)).square().sum().backward()
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(old, bank.parameters(), strict=False))
    assert bank.tasks[-1].weight.abs().max() > 0
    assert len(bank.trainable()) == 2
