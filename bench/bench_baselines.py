"""Replay, evaluation and one small run in the style of ENGINE, RAPF and AREA, beside ours; all on the CPU.

Written from what is known of their protocol: every training step encodes the prompts of all classes seen
again (ENGINE) and draws pseudo-features class by class, each covariance factorised anew (RAPF, AREA);
evaluation takes one image at a time and solves its transport problems one by one, each by 50 fixed iterations
in the log domain (AREA, which has one problem a task). The problems are SPA's: one a class. What does not
change between classes or images is computed once.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import unit
from measure import time_row
from torch import Tensor
from torch.distributions import MultivariateNormal

from spa_fast import GaussianBank, spa_scores
from spa_fast.cil.backbone import Backbone
from spa_fast.cil.config import SpaConfig
from spa_fast.cil.data.stream import ClassTexts, TaskStream
from spa_fast.cil.demo.ladder import CHECKPOINT
from spa_fast.cil.demo.vocabulary import ATTRIBUTES
from spa_fast.cil.demo.world import CLASSES, write_dataset
from spa_fast.cil.experiment import Experiment, make_method, prepare
from spa_fast.cil.loading import load_backbone
from spa_fast.cil.loop import run_tasks
from spa_fast.cil.projectors import ProjectorBank
from spa_fast.cil.run_config import RunConfig

EPS, STEPS, RIDGE = 0.1, 50, 1e-4
TEMPLATE = "a photo of a {}."


@cache
def tower() -> Backbone:
    """The demo's encoder: a text tower of 2 blocks of width 64, so encoding again costs little here."""
    return load_backbone(f"local-dir:{CHECKPOINT}")


# Text tower of CLIP ViT-B/16, beside images of 64 patches.
TEXT = {"context_length": 77, "vocab_size": 49408, "width": 512, "heads": 8, "layers": 12}
VISION = {"image_size": 64, "layers": 3, "width": 128, "head_width": 64, "patch_size": 8}


@cache
def large_tower() -> Backbone:
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump({"embed_dim": 512, "vision_cfg": VISION, "text_cfg": TEXT}, file)
        file.flush()
        return load_backbone(f"config:{file.name}")


C, OLD, PER_CLASS = 100, 90, 4


@cache
def prompts() -> list[str]:
    """Of 100 names."""
    colours = list(ATTRIBUTES["colour"])[: C // len(CLASSES)]
    return [TEMPLATE.format(f"{colour} {name}") for colour in colours for name in CLASSES]


@cache
def moments() -> tuple[Tensor, Tensor, Tensor]:
    """Mean [OLD, D], covariance [OLD, D, D] and its factor."""
    g, D = torch.Generator().manual_seed(0), tower().width
    rows = torch.randn(OLD, 2 * D, D, generator=g)
    cov = rows.mT @ rows / (2 * D) + RIDGE * torch.eye(D)
    return torch.randn(OLD, D, generator=g), cov, torch.linalg.cholesky(cov)


def drawn_by_class(means: Tensor, covariances: Tensor, n: int) -> Tensor:
    """n draws of each class [C n, D]."""
    return torch.cat([MultivariateNormal(m, s).sample((n,)) for m, s in zip(means, covariances, strict=True)])


def plain_replay() -> Callable[[], tuple[Tensor, Tensor]]:
    means, covariances, _ = moments()

    def run() -> tuple[Tensor, Tensor]:
        torch.manual_seed(0)
        return tower().encode_texts(prompts()), drawn_by_class(means, covariances, PER_CLASS)

    return run


def our_replay() -> Callable[[], tuple[Tensor, Tensor]]:
    texts, generator = tower().encode_texts(prompts()), torch.Generator()
    bank = GaussianBank.from_moments(*moments()[:2])

    def run() -> tuple[Tensor, Tensor]:
        generator.manual_seed(0)
        return texts, bank.sample(PER_CLASS, generator=generator)[0]

    return run


def check_replay(texts: Tensor, drawn: Tensor) -> None:
    """Equal texts; draws that, whitened, are standard normal within what chance allows."""
    torch.testing.assert_close(texts, tower().encode_texts(prompts()), rtol=1e-5, atol=1e-5)
    means, _, tril = moments()
    centered = drawn.view(OLD, PER_CLASS, -1) - means[:, None]
    white = torch.linalg.solve_triangular(tril, centered.mT, upper=False).mT.flatten(0, 1)
    n, D = white.shape
    assert abs(float(white.mean())) < 5 / (n * D) ** 0.5
    assert abs(float(white.square().mean()) - 1) < 5 * (2 / (n * D)) ** 0.5
    assert float((white.mT @ white / n - torch.eye(D)).abs().max()) < 6 * (2 / n) ** 0.5


REPLAY = {"texts encoded again, Cholesky per class": plain_replay, "spa_fast": our_replay}


@pytest.mark.parametrize("who", REPLAY)
def bench_replay(benchmark: Any, one_thread: None, who: str) -> None:
    shape = f"{C} texts, {OLD} old classes x {PER_CLASS}, D={tower().width}"
    benchmark.group = "replay of a training step"
    time_row(benchmark, REPLAY[who](), check_replay, backend=who, shape=shape, device="cpu")


B, N, D, M, K = 4, 196, 512, 6, SpaConfig.k


def plain_transport(sim: Tensor) -> Tensor:
    """<P, S> of one problem [K, M], cost 1 - S."""
    log_kernel = (sim - 1) / EPS
    log_a, log_b = (-torch.tensor(float(n)).log() for n in sim.shape)
    f, g = sim.new_zeros(len(sim)), sim.new_zeros(sim.shape[1])
    for _ in range(STEPS):
        f = log_a - (log_kernel + g).logsumexp(1)
        g = log_b - (log_kernel + f[:, None]).logsumexp(0)
    return ((log_kernel + f[:, None] + g).exp() * sim).sum()


@torch.no_grad()
def plain_scores(
    patches: Tensor, tokens: Tensor, k: int, aligned_patches: Tensor, aligned_tokens: Tensor
) -> Tensor:
    """Scores [C] of one image: patches [N, D] and tokens [C, M, D] choose, the aligned ones are scored.

    All are unit vectors.
    """
    scores = []
    for chooser, aligned in zip(tokens, aligned_tokens, strict=True):
        rows = (patches @ chooser.T).amax(1).topk(k).indices
        scores.append(plain_transport(aligned_patches[rows] @ aligned.T))
    return torch.stack(scores)


@cache
def batch() -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    return torch.randn(B, N, D, generator=g), torch.randn(C, M, D, generator=g)


def plain_evaluation() -> Tensor:
    patches, tokens = map(unit, batch())
    return torch.stack([plain_scores(image, tokens, K, image, tokens) for image in patches])


def our_evaluation(backend: str = "auto") -> Tensor:
    return spa_scores(*batch(), K, EPS, max_iter=STEPS, tol=0, backend=backend)


@cache
def expected_scores() -> Tensor:
    return our_evaluation("reference")


def check_scores(*rows: Tensor) -> None:
    torch.testing.assert_close(torch.stack(rows), expected_scores(), rtol=0, atol=1e-4)


EVALUATION = {"an image and a class at a time": plain_evaluation, "spa_fast": our_evaluation}


@pytest.mark.parametrize("who", EVALUATION)
def bench_evaluation_by_transport(benchmark: Any, one_thread: None, who: str) -> None:
    benchmark.group = "evaluation by transport"
    shape = f"B={B} N={N} D={D} C={C} M={M} k={K} T={STEPS}"
    time_row(benchmark, EVALUATION[who], check_scores, backend=who, shape=shape, device="cpu")


# Images per class, training and test; classes of the two tasks.
IMAGES, TASKS = (10, 2), (20, 5)


@dataclass(frozen=True)
class Scene:
    """An encoder, and epochs of each task."""

    tower: Callable[[], Backbone]
    epochs: int
    about: str


# Few epochs, as a step of the other way takes over a second: what is saved in training counts for less.
SCENES = [
    Scene(tower, 10, "text tower of 2 blocks (the demo's), D=64"),
    Scene(large_tower, 2, "text tower of CLIP ViT-B/16's size (random weights), D=512"),
]


@dataclass
class Run:
    """What a run over both tasks gave."""

    losses: list[float] = field(default_factory=list)
    """Mean of each task's last epoch."""
    accuracies: list[float] = field(default_factory=list)
    """In percent, on all classes seen after each task."""
    training: float = 0.0
    """Seconds, without the task's features and texts being read and encoded."""
    evaluation: float = 0.0
    """Seconds."""

    def shares(self, total: float) -> dict[str, int]:
        """Percent of a run of so many seconds."""
        parts = {"training": self.training, "evaluation": self.evaluation}
        parts["features and texts of tasks"] = total - sum(parts.values())
        return {name: round(100 * s / total) for name, s in parts.items()}


@pytest.fixture(scope="module", params=SCENES, ids=["demo", "large"])
def scene(request: pytest.FixtureRequest) -> Scene:
    return request.param


@pytest.fixture(scope="module")
def experiment(tmp_path_factory: pytest.TempPathFactory, scene: Scene) -> Experiment:
    """The demo's world with all features in the cache.

    Transport takes part in evaluation only, as in the code compared: training is on global features.
    """
    folder = tmp_path_factory.mktemp("world")
    write_dataset(folder / "data", 0, *IMAGES)
    config = RunConfig(
        data=folder / "data",
        backbone=scene.tower().name,
        descriptions=folder / "data" / "descriptions.json",
        classnames=folder / "data" / "names.json",
        init_classes=TASKS[0],
        increment=TASKS[1],
        templates=(TEMPLATE,),
        spa=SpaConfig(
            eps=EPS,
            max_iter=STEPS,
            tol=0.0,
            ridge=RIDGE,
            epochs=scene.epochs,
            pseudo_per_class=PER_CLASS,
            local_loss_weight=0.0,
            local_replay="none",
        ),
    )
    ready = prepare(config, folder / "cache", scene.tower())
    for split in ready.data.images:
        for index in range(len(ready.data.folders)):
            ready.cache.load(split, index)
    return ready


def our_run(experiment: Experiment) -> Run:
    outcome = run_tasks(experiment.stream, make_method(experiment.config, experiment.backbone))
    return Run(
        [figures["loss"] for figures in outcome.figures],
        outcome.matrix.accuracies,
        sum(outcome.learn_seconds),
        sum(outcome.eval_seconds),
    )


def plain_run(experiment: Experiment) -> Run:
    """The same projectors, loss, optimiser and fused scores; texts, draws and transport the other way."""
    config, backbone, run = experiment.config.spa, experiment.backbone, Run()
    visual, textual = (ProjectorBank(backbone.width) for _ in range(2))
    order = torch.Generator().manual_seed(experiment.config.seed)
    torch.manual_seed(experiment.config.seed)
    means, covariances = [], []
    texts: ClassTexts | None = None
    for task in experiment.stream:
        start = time.perf_counter()
        texts = task.texts if texts is None else texts.joined(task.texts)
        seen = [TEMPLATE.format(name) for name in experiment.names[: task.labels.stop]]
        whole, old = task.features.globals, task.labels.start
        old_targets = torch.arange(old).repeat_interleave(PER_CLASS)
        for bank in (visual, textual):
            bank.add_task()
        optimizer = torch.optim.SGD(
            visual.trainable() + textual.trainable(),
            lr=config.lr,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
        )
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.epochs)
        for _ in range(config.epochs):
            losses = []
            for rows in torch.randperm(len(whole), generator=order).split(config.batch_size):
                inputs, targets = whole[rows], task.targets[rows]
                if old:
                    drawn = drawn_by_class(torch.stack(means), torch.stack(covariances), PER_CLASS)
                    inputs, targets = torch.cat([inputs, drawn]), torch.cat([targets, old_targets])
                classifier = unit(textual(backbone.encode_texts(seen)))
                logits = backbone.logit_scale * unit(visual(inputs)) @ classifier.T
                loss = F.cross_entropy(logits, targets)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses.append(loss.item())
            schedule.step()
        for label in task.labels:
            own = whole[task.targets == label]
            means.append(own.mean(0))
            covariances.append(torch.cov(own.T) + RIDGE * torch.eye(own.shape[1]))
        learnt = time.perf_counter()
        run.losses.append(sum(losses) / len(losses))
        run.accuracies.append(plain_accuracy(experiment.stream, task.index, visual, textual, texts, config))
        run.training += learnt - start
        run.evaluation += time.perf_counter() - learnt
    return run


@torch.no_grad()
def plain_accuracy(
    stream: TaskStream,
    stage: int,
    visual: ProjectorBank,
    textual: ProjectorBank,
    texts: ClassTexts,
    config: SpaConfig,
) -> float:
    """In percent, over the test images of all tasks so far."""
    classifier = unit(textual(texts.templates[:, 0]))
    tokens, aligned_tokens = unit(texts.tokens), unit(textual(texts.tokens))
    right = []
    for task in range(stage + 1):
        features, targets = stream.test(task)
        every = features.patches[torch.arange(len(features))].float()
        for whole, patches, target in zip(features.globals, every, targets, strict=True):
            aligned = unit(visual(patches))
            local = plain_scores(unit(patches), tokens, config.k, aligned, aligned_tokens)
            scores = classifier @ unit(visual(whole)) + config.fusion_weight * local
            right.append(float(scores.argmax() == target))
    return 100 * sum(right) / len(right)


def check_run(got: Run, want: Run) -> None:
    """The first task has no draws: equal. The second differs by chance; a test image is two points."""
    assert got.losses[0] == pytest.approx(want.losses[0], rel=1e-4)
    assert got.losses[1] == pytest.approx(want.losses[1], rel=0.2)
    assert got.accuracies[0] == pytest.approx(want.accuracies[0], abs=2.5)
    assert got.accuracies[1] == pytest.approx(want.accuracies[1], abs=10)


RUNS: dict[str, Callable[[Experiment], Run]] = {
    "texts, draws and transport one by one": plain_run,
    "spa_fast": our_run,
}


@pytest.mark.parametrize("who", RUNS)
def bench_small_run(benchmark: Any, one_thread: None, experiment: Experiment, scene: Scene, who: str) -> None:
    """Tasks of 20 and 5 classes: texts, training with replay, evaluation on all classes seen."""
    benchmark.group = "end to end from a warm cache"
    shape = f"{scene.about}, {scene.epochs} epochs"
    shares: dict[str, int] = {}

    def run() -> tuple[Run]:
        start = time.perf_counter()
        done = RUNS[who](experiment)
        shares.update(done.shares(time.perf_counter() - start))
        return (done,)

    def check(got: Run) -> None:
        check_run(got, our_run(experiment))

    time_row(benchmark, run, check, backend=who, shape=shape, device="cpu")
    benchmark.extra_info["shares"] = shares
