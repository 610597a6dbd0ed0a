import dataclasses

import pytest
import torch
import torch.nn.functional as F

from spa_fast import sinkhorn_align
from spa_fast.cil.config import SpaConfig
from spa_fast.cil.data.stream import ClassTexts
from spa_fast.cil.errors import RunError
from spa_fast.cil.experiment import make_method, prepare
from spa_fast.cil.loop import evaluate, run_tasks
from spa_fast.cil.methods.local_branch import LocalBranch
from spa_fast.cil.methods.spa import Spa
from spa_fast.cil.run_config import RunConfig

QUICK = SpaConfig(k=4, epochs=2, batch_size=8, lr=0.01)


def run(colours, backbone, tmp_path, spa=QUICK, **changes):
    config = RunConfig(
        data=colours[0], backbone=backbone.name, descriptions=colours[1], increment=3, spa=spa, **changes
    )
    experiment = prepare(config, tmp_path / "cache", backbone)
    torch.manual_seed(config.seed)
    method = make_method(config, backbone)
    return experiment, method, run_tasks(experiment.stream, method)


def test_learns_colours(colours, backbone, tmp_path):
    _, _, outcome = run(colours, backbone, tmp_path, dataclasses.replace(QUICK, epochs=10))
    _, _, blind = run(colours, backbone, tmp_path, method="zero_shot")
    assert outcome.matrix.average > blind.matrix.average + 15
    assert outcome.matrix.sizes == [9, 9, 3]


def test_same_seed_same_bits(colours, backbone, tmp_path):
    _, first, a = run(colours, backbone, tmp_path)
    _, second, b = run(colours, backbone, tmp_path)
    assert a.matrix.rows == b.matrix.rows
    states = first.state_dict(), second.state_dict()
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    _, other, _ = run(colours, backbone, tmp_path, seed=2)
    assert not torch.equal(states[0]["visual/tasks.1.weight"], other.state_dict()["visual/tasks.1.weight"])


@pytest.mark.parametrize(
    "changes",
    [
        {"semantic_tokens": "token_level", "word_limit": 3},
        {"patch_source": "penultimate", "patch_score": "mean"},
        {"patch_score": "softmax", "class_conditional": False},
        {"selection_space": "projected"},
        {"solver": "uniform"},
        {"solver": "double_softmax"},
        {"solver": "max_mean"},
        {"grad": "implicit"},
        {"grad": "unroll", "max_iter": 5, "tol": 0.0},
        {"marginals": "score_softmax"},
        {"projector": "linear"},
        {"projector": "identity_first", "projector_aggregate": "mean"},
        {"projector": "mlp", "projector_bias": False},
        {"project_patches": "separate"},
        {"project_patches": "none"},
        {"fusion_weight": 0.0, "local_loss_weight": 0.0},
        {"loss": "joint"},
        {"description_loss_weight": 2.0},
        {"logit_scale_mode": "raw"},
        {"statistics": "normalized"},
        {"covariance": "diag"},
        {"covariance": "shared"},
        {"covariance": "lowrank"},
        {"pseudo_per_class": 0, "local_replay": "none"},
        {"pseudo_classes": 2},
        {"pseudo_form": "isotropic"},
        {"local_replay": "patches"},
        {"optimizer": "adamw", "lr": 1e-3},
        {"decay_old_projectors": True},
        {"shrink": "average"},
        {"shrink": "ledoit_wolf"},
        {"schedule": "step"},
        {"exemplar_selection": "herding", "exemplars": 3},
        {"n_descriptions": 1},
    ],
    ids=lambda changes: "-".join(f"{k}={v}" for k, v in changes.items()),
)
def test_every_choice_runs_and_restores(colours, backbone, tmp_path, changes):
    experiment, method, outcome = run(colours, backbone, tmp_path, dataclasses.replace(QUICK, **changes))
    assert len(outcome.matrix.rows) == 3
    fresh = make_method(experiment.config, backbone)
    fresh.load_state_dict(method.state_dict())
    assert evaluate(experiment.stream, fresh, 2) == evaluate(experiment.stream, method, 2)


def test_choices_change_the_outcome(colours, backbone, tmp_path):
    """A setting that is read nowhere would leave the learned bits alone."""
    _, base, _ = run(colours, backbone, tmp_path)
    weight = base.state_dict()["visual/tasks.2.weight"]
    for changes in (
        {"k": 6},
        {"eps": 0.02},
        {"patch_score": "mean"},
        {"marginals": "score_softmax"},
        {"local_loss_weight": 1.0},
        {"description_loss_weight": 1.0},
        {"pseudo_per_class": 2},
        {"local_pseudo_per_class": 2},
        {"local_replay": "patches"},
        {"ridge": 0.1},
        {"weight_decay": 0.5},
        {"momentum": 0.0},
        {"n_descriptions": 2},
        {"description_template": "{description}"},
    ):
        _, other, _ = run(colours, backbone, tmp_path, dataclasses.replace(QUICK, **changes))
        assert not torch.equal(weight, other.state_dict()["visual/tasks.2.weight"]), changes


def test_old_projectors_are_frozen_unless_decay_is_asked_for(colours, backbone, tmp_path):
    config = RunConfig(
        data=colours[0], backbone=backbone.name, descriptions=colours[1], increment=3, spa=QUICK
    )
    for decays in (False, True):
        spa = dataclasses.replace(QUICK, decay_old_projectors=decays)
        experiment = prepare(config, tmp_path / "cache", backbone)
        method = Spa(spa, backbone.width, backbone.logit_scale)
        tasks = iter(experiment.stream)
        method.learn(next(tasks))
        before = method.projectors["visual"].tasks[0].weight.clone()
        method.learn(next(tasks))
        after = method.projectors["visual"].tasks[0].weight
        assert torch.equal(before, after) is not decays
        if decays:
            ratio = after[before.abs() > 1e-6] / before[before.abs() > 1e-6]
            assert ratio.std() < 1e-4 * ratio.mean()


def test_a_loss_that_is_not_finite_stops_the_run(colours, backbone, tmp_path):
    for spa in (QUICK, dataclasses.replace(QUICK, fusion_weight=0.0, local_loss_weight=0.0)):
        with pytest.raises(RunError, match=r"task \d, epoch \d: .* lower --lr \(1e\+30\)"):
            run(colours, backbone, tmp_path, dataclasses.replace(spa, lr=1e30, epochs=9))


@pytest.mark.parametrize(
    ("epochs", "rates"),
    [(1, [1.0]), (2, [1.0, 0.1]), (10, [1.0] * 4 + [0.1] * 4 + [0.01] * 2)],
)
def test_step_schedule_starts_at_the_full_rate(epochs, rates):
    method = Spa(SpaConfig(schedule="step", epochs=epochs, lr=1.0), width=4, logit_scale=20.0)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    schedule, found = method._schedule(optimizer), []
    for _ in range(epochs):
        found.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    assert found == pytest.approx(rates)


def test_divergence_in_the_last_step_is_seen(colours, backbone, tmp_path):
    spa = dataclasses.replace(
        QUICK,
        projector="identity_first",
        lr=1e3,
        weight_decay=1e38,
        epochs=1,
        batch_size=64,
        fusion_weight=0.0,
        local_loss_weight=0.0,
    )
    with pytest.raises(RunError, match="diverge"):
        run(colours, backbone, tmp_path, spa, seed=3)


def test_explain_refuses_what_it_cannot_show(colours, backbone, tmp_path):
    for changes, message in (
        ({"solver": "uniform"}, "aligns by 'uniform'"),
        ({"fusion_weight": 0.0, "local_loss_weight": 0.0}, "no local branch"),
    ):
        experiment, method, _ = run(colours, backbone, tmp_path, dataclasses.replace(QUICK, **changes))
        patches = experiment.cache.load("test", experiment.order[2]).patches[0]
        with pytest.raises(RunError, match=message):
            method.explain(patches, 2)


def test_explain_shows_what_an_unconditional_selection_keeps(colours, backbone, tmp_path):
    spa = dataclasses.replace(QUICK, class_conditional=False)
    experiment, method, _ = run(colours, backbone, tmp_path, spa)
    patches = experiment.cache.load("test", experiment.order[2]).patches[0]
    kept = method.local.select(patches[None], method.seen_texts()).indices[0]
    for label in (0, 5):
        assert torch.equal(method.explain(patches, label).kept, kept[label])


@pytest.mark.parametrize("changes", [{}, {"patch_score": "mean"}, {"selection_space": "projected"}])
def test_explain_names_patches_and_a_plan(colours, backbone, tmp_path, changes):
    # Far from the identity, the projected space ranks patches in another way.
    spa = dataclasses.replace(QUICK, lr=0.1, **changes)
    experiment, method, _ = run(colours, backbone, tmp_path, spa)
    patches = experiment.cache.load("test", experiment.order[2]).patches[0]
    why = method.explain(patches, 2)
    assert why.kept.shape == (4,)
    assert why.relevance.shape == (16,)
    assert why.transport.plan.shape == (4, 3)
    torch.testing.assert_close(why.transport.plan.sum(), torch.tensor(1.0))
    # Kept patches are the most relevant ones, best first.
    assert torch.equal(why.relevance[why.kept], why.relevance.sort(descending=True).values[:4])


@pytest.mark.parametrize("space", ["frozen", "projected"])
def test_patches_are_chosen_in_their_space_and_aligned_projected(space):
    config = SpaConfig(k=3, selection_space=space)
    visual, textual = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)
    branch = LocalBranch(config, visual, textual, torch.Generator())
    patches, tokens, mask = torch.randn(2, 16, 8), torch.randn(5, 4, 8), torch.ones(5, 4, dtype=torch.bool)
    with torch.no_grad():
        got = branch.scores(patches, ClassTexts(torch.randn(5, 1, 8), tokens, mask))
        aligned, texts = visual(patches), textual(tokens)
        by, of = (patches, tokens) if space == "frozen" else (aligned, texts)
        cosine = torch.einsum("bnd,cmd->bcnm", F.normalize(by, dim=-1), F.normalize(of, dim=-1))
        kept = cosine.amax(-1).topk(3).indices
        options = {"eps": config.eps, "max_iter": config.max_iter, "tol": config.tol, "backend": "reference"}
        for b in range(2):
            for c in range(5):
                want = sinkhorn_align(aligned[b, kept[b, c]][None], texts[c][None], pairwise=False, **options)
                torch.testing.assert_close(got[b, c], want[0], atol=1e-5, rtol=1e-5)


def test_pseudo_features_protect_old_classes(colours, backbone, tmp_path):
    strong = dataclasses.replace(QUICK, epochs=10, lr=0.05)
    _, _, kept = run(colours, backbone, tmp_path, strong)
    _, _, lost = run(
        colours, backbone, tmp_path, dataclasses.replace(strong, pseudo_per_class=0, local_replay="none")
    )
    assert kept.matrix.forgetting < lost.matrix.forgetting - 10
