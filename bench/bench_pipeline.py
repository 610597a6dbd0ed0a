"""A run in its stages: decoding, encoding, feature cache, one SPA training step, one evaluation pass.

Then one small run whole, from images and from a warm cache. Rows with stages say where their time goes.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import DEVICE
from measure import time_row
from photographs import photographs
from PIL import Image
from stages import InTurn, Place, Stages, shares
from torch import Tensor

from spa_fast._backends import available
from spa_fast.cil import experiment, loop
from spa_fast.cil.backbone import Backbone
from spa_fast.cil.config import SpaConfig
from spa_fast.cil.data import cache as feature_cache
from spa_fast.cil.data import extract
from spa_fast.cil.data.cache import FeatureCache
from spa_fast.cil.data.datasets import read_image_folders
from spa_fast.cil.data.extract import Extractor
from spa_fast.cil.data.features import Stacked
from spa_fast.cil.data.images import read_image
from spa_fast.cil.data.shards import ShardFolder
from spa_fast.cil.data.stream import ClassTexts
from spa_fast.cil.methods import local_branch
from spa_fast.cil.methods.spa import Spa
from spa_fast.cil.run_config import RunConfig

B, N, D, C, M, OLD = 64, 196, 512, 100, 6, 90
SHAPE = f"B={B} N={N} D={D} C={C} M={M} k={SpaConfig.k}"
BACKENDS = ("reference", "native", "triton")


@cache
def batch() -> tuple[Tensor, Tensor, Tensor]:
    """Global tokens, patches as the cache holds them, and labels among the newest classes."""
    g = torch.Generator().manual_seed(0)
    whole, patches = torch.randn(B, D, generator=g), torch.randn(B, N, D, generator=g)
    return whole, patches.half(), torch.randint(OLD, C, (B,), generator=g)


@cache
def method(backend: str) -> Spa:
    """At its last task of ten: old classes have Gaussians, the newest projectors are trained."""
    g = torch.Generator().manual_seed(1)
    spa = Spa(SpaConfig(backend=backend), D, 100.0)
    mask = torch.ones(C, M, dtype=torch.bool)
    spa.texts = ClassTexts(torch.randn(C, 1, D, generator=g), torch.randn(C, M, D, generator=g), mask)
    for bank in spa.projectors.values():
        bank.add_task()
    for replay in (spa.replay, spa.local.replay):
        replay.fit(torch.randn(2 * OLD, D, generator=g), torch.arange(OLD).repeat(2))
    return spa


@cache
def kept(backend: str) -> local_branch.Kept:
    spa = method(backend)
    return spa.local.select(batch()[1], spa.seen_texts())


def train_step(spa: Spa, indices: local_branch.Kept | None, stages: Stages) -> Tensor:
    whole, patches, targets = batch()
    loss = spa._loss(whole, patches, targets, indices, spa.seen_texts(), range(OLD, C))
    # Returned in place of a step, which would change the next call's input.
    with stages.of("backward"):
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, spa._trainable())])


def evaluate(spa: Spa, _indices: Any, _stages: Stages) -> Tensor:
    whole, patches, _ = batch()
    return spa.scores(whole, patches)


def places(spa: Spa) -> list[Place]:
    """Stages of a step; compiled selection and alignment are one."""
    return [
        (local_branch, "spa_scores", "selection and alignment"),
        (local_branch, "align_selected", "alignment"),
        (local_branch, "sinkhorn_align", "alignment"),
        (local_branch, "topk_patches", "selection"),
        *((bank, "forward", "projectors") for bank in spa.projectors.values()),
        *((replay, "draw", "pseudo-features") for replay in (spa.replay, spa.local.replay)),
    ]


def time_stage(
    benchmark: Any, not_measured: Any, monkeypatch: Any, group: str, who: str, work: Any, select: bool
) -> None:
    benchmark.group = group
    backend = who.partition(",")[0]
    reason = available()[backend]
    if reason is None and DEVICE == "cuda":
        reason = "training is on the CPU"
    if reason is not None:
        not_measured(f"{group}, {SHAPE}", who, reason)
    spa, indices = method(backend), kept(backend) if select else None

    def run(stages: Stages | None = None) -> Tensor:
        spa.generator.manual_seed(0)
        return work(spa, indices, stages or Stages())

    def check(got: Tensor) -> None:
        want = expected(work)
        assert (got - want).norm() <= 1e-3 * want.norm()

    # The first draw factorises the covariances of a task; steps share them.
    run()
    time_row(benchmark, run, lambda *out: check(torch.stack(out)), backend=who, shape=SHAPE)
    benchmark.extra_info["shares"] = shares(run, places(spa), monkeypatch)


@cache
def expected(work: Any) -> Tensor:
    spa = method("reference")
    spa.generator.manual_seed(0)
    return work(spa, None, Stages())


@pytest.mark.parametrize("who", ["reference", "native", "native, choices kept", "triton"])
def bench_training_step(
    benchmark: Any, one_thread: None, not_measured: Any, monkeypatch: pytest.MonkeyPatch, who: str
) -> None:
    """Forward and backward, as training does or with patches that were chosen before, by `align_selected`."""
    time_stage(benchmark, not_measured, monkeypatch, "SPA training step", who, train_step, "kept" in who)


@pytest.mark.parametrize("who", BACKENDS)
def bench_evaluation_pass(
    benchmark: Any, one_thread: None, not_measured: Any, monkeypatch: pytest.MonkeyPatch, who: str
) -> None:
    time_stage(benchmark, not_measured, monkeypatch, "SPA evaluation pass", who, evaluate, False)


Encoded = tuple[Tensor, Tensor]
"""Global tokens [n, D] and patches [n, N, D] of all images, class by class, patches as they are stored."""


class Source:
    """Photographs on their way to features, and a feature cache that holds all of them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.images = photographs(folder)
        self.backbone = self.images.backbone
        self.data = read_image_folders(self.images.data)
        self.classes = [images for split in self.data.images.values() for images in split]
        self.pixels = self.decode()
        self.encoded = self.encode()
        self.opened().fill()

    @property
    def shape(self) -> str:
        return f"{self.images.n} {self.images.about}"

    def decode(self) -> list[Tensor]:
        """Pixels [n, 3, H, W] of each class."""
        return [torch.stack([self.backbone.preprocess(read_image(i)) for i in own]) for own in self.classes]

    def encode(self) -> Encoded:
        whole, patches = zip(*map(self.backbone.encode_images, self.pixels), strict=True)
        return torch.cat(whole), torch.cat(patches).half()

    def extract(self) -> Encoded:
        """From image files, decoding ahead of the encoder."""
        extractor = Extractor(self.backbone, "value_path", 0, torch.float16)
        whole, patches = zip(*((f.globals, f.patches) for f in extractor.classes(self.classes)), strict=True)
        return torch.cat(whole), torch.cat(patches)

    def opened(self, name: str = "features") -> FeatureCache:
        """A cache as a new process sees it, which has compared no checksum."""
        return FeatureCache(self.folder / name, self.data, self.backbone)

    def load(self, cache: FeatureCache) -> Encoded:
        """From a cache, patches gathered a batch at a time as in evaluation."""
        splits = self.data.images.items()
        parts = [cache.load(split, label) for split, found in splits for label in range(len(found))]
        patches = Stacked([part.patches for part in parts])
        return torch.cat([part.globals for part in parts]), torch.cat(list(patches.split(B)))

    def writer(self) -> Callable[[], tuple[()]]:
        """A function that writes every shard to the cache `copy`."""
        shards, copy = self.opened().shards, self.opened("copy")
        content = [(path.name, *shards.read(path.name)) for path in shards.path.glob("*.safetensors")]

        def run() -> tuple[()]:
            for name, metadata, tensors in content:
                copy.shards.write(name, metadata, tensors)
            return ()

        return run

    def run(self, folder: Path, backend: str) -> list[float]:
        """Accuracies after each of two tasks, features in a cache in `folder`; the encoder is loaded."""
        config = RunConfig(
            data=self.images.data,
            backbone=self.backbone.name,
            descriptions=self.images.descriptions,
            increment=len(self.data.folders) // 2,
            spa=SpaConfig(backend=backend),
        )
        ready = experiment.prepare(config, folder, self.backbone)
        return loop.run_tasks(ready.stream, experiment.make_method(config, self.backbone)).matrix.accuracies


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    return Source(tmp_path_factory.mktemp("photographs"))


FEATURES: dict[str, Callable[[Source], Callable[[], Any]]] = {
    "decode": lambda source: source.decode,
    "encode": lambda source: source.encode,
    "decode ahead on all cores and encode": lambda source: source.extract,
    "write to the cache": lambda source: source.writer(),
    "read from the cache, checksums compared": lambda source: lambda: source.load(source.opened()),
    "read from the cache again": lambda source: partial(source.load, source.opened()),
}


@pytest.mark.parametrize("who", FEATURES)
def bench_features(benchmark: Any, one_thread: None, source: Source, who: str) -> None:
    """From image files to features in memory."""
    benchmark.group = "images to features"

    def check(*got: Tensor) -> None:
        if who == "decode":
            for own, paths in zip(got, source.classes, strict=True):
                want = [source.backbone.preprocess(Image.open(path).convert("RGB")) for path in paths]
                assert torch.equal(own, torch.stack(want))
            return
        if "write" in who:
            copy = source.opened("copy")
            assert not copy.missing()
            got = source.load(copy)
        with torch.no_grad():
            want = torch.cat([source.backbone.model.encode_image(own) for own in source.pixels])
        torch.testing.assert_close(got[0], want, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(got[1], source.encoded[1], rtol=1e-3, atol=1e-3)

    time_row(benchmark, FEATURES[who](source), check, backend=who, shape=source.shape, device="cpu")


RUN_PLACES: list[Place] = [
    (experiment, "check_images", "images checked"),
    (Extractor, "_pixels", "decode"),
    (Backbone, "encode_images", "encode images"),
    (Backbone, "encode_texts", "encode texts"),
    (ShardFolder, "write", "write to the cache"),
    (ShardFolder, "read", "read from the cache"),
    (Spa, "learn", "training"),
    (loop, "evaluate", "evaluation"),
]


@pytest.mark.parametrize("who", ["from images", "from a warm cache"])
def bench_whole_run(
    benchmark: Any, one_thread: None, monkeypatch: pytest.MonkeyPatch, source: Source, who: str
) -> None:
    """Two tasks of SPA with its default settings."""
    benchmark.group = "one small run"
    warm = source.folder / "features"
    fresh = (source.folder / f"cold{i}" for i in itertools.count())
    folders = itertools.repeat(warm) if "warm" in who else fresh

    def run(_stages: Stages | None = None) -> tuple[list[float]]:
        return (source.run(next(folders), "auto"),)

    def check(accuracies: list[float]) -> None:
        # Within one test image.
        slack = 100 / len(source.data.folders) + 1e-6
        assert accuracies == pytest.approx(source.run(warm, "reference"), abs=slack)

    time_row(benchmark, run, check, backend=who, shape=source.shape, device="cpu")
    with monkeypatch.context() as patch:
        # What threads do at the same time is told apart where they take turns.
        for module in (extract, feature_cache):
            patch.setattr(module, "ThreadPoolExecutor", InTurn)
        benchmark.extra_info["shares"] = shares(run, RUN_PLACES, patch)
