"""Using a finished run: score its test images again, or name the classes of new images."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from spa_fast.cil.backbone import Backbone
from spa_fast.cil.checkpoint import load_run
from spa_fast.cil.data.extract import nearest_patches
from spa_fast.cil.data.images import check_images, read_image
from spa_fast.cil.errors import RunError
from spa_fast.cil.experiment import check_k, make_method, prepare
from spa_fast.cil.loading import load_backbone
from spa_fast.cil.loop import evaluate
from spa_fast.cil.methods.base import Method
from spa_fast.cil.run_config import RunConfig


@dataclasses.dataclass(frozen=True)
class FinishedRun:
    """A run read back.

    Attributes:
        config: its settings.
        names: class names in order of arrival.
        last: accuracy in percent after the last task, as stored.
        backbone: the encoder it was trained with.
        method: the learned method.
    """

    config: RunConfig
    names: list[str]
    last: float
    backbone: Backbone
    method: Method


def read_run(folder: Path) -> FinishedRun:
    """Read a run folder and load its backbone.

    Raises:
        RunError: the folder or what it points to cannot be read, or the backbone is another one.
    """
    run, state = load_run(folder)
    names, last = run.get("names"), run.get("last")
    if not isinstance(names, list) or not all(isinstance(n, str) for n in names):
        raise RunError(f"run: {folder}: expected a list of class names")
    if not isinstance(last, int | float):
        raise RunError(f"run: {folder}: expected the last accuracy as a number, got {last!r}")
    config = RunConfig.from_dict(run.get("config"))
    backbone = load_backbone(config.backbone, transform=config.transform, device=config.device)
    if backbone.fingerprint != run.get("backbone_fingerprint"):
        raise RunError(f"run: {folder}: {config.backbone} is not the backbone it was trained with")
    check_k(config, backbone)
    method = make_method(config, backbone)
    try:
        method.load_state_dict(state)
    except (KeyError, ValueError, RuntimeError, TypeError) as error:
        raise RunError(f"run: {folder}: the learned state does not fit its settings: {error}") from error
    if method.n_classes != len(names):
        raise RunError(f"run: {folder}: {method.n_classes} classes learnt, {len(names)} names")
    return FinishedRun(config, names, last, backbone, method)


def evaluate_run(folder: Path, data: Path | None = None) -> Iterator[str]:
    """Lines of accuracy per task and over all classes after the last task."""
    run = read_run(folder)
    config = dataclasses.replace(run.config, data=data or run.config.data)
    experiment = prepare(config, config.cache or folder.resolve().parent / "feature_cache", run.backbone)
    if experiment.names != run.names:
        raise RunError(f"--data: {config.data}: its classes are not those of {folder}")
    experiment.stream.open_all()
    experiment.cache.fill("test")
    correct, sizes = evaluate(experiment.stream, run.method, len(experiment.stream.tasks) - 1)
    for task, (right, total) in enumerate(zip(correct, sizes, strict=True)):
        yield f"task {task}: {100 * right / total:6.2f} % of {total} images"
    accuracy = 100 * sum(correct) / sum(sizes)
    yield f"all classes: {accuracy:6.2f} % of {sum(sizes)} images (stored: {run.last:.2f} %)"


def predict_images(folder: Path, images: Sequence[Path], top: int = 5) -> Iterator[str]:
    """Lines of the best `top` classes of each image with their scores."""
    if not images:
        raise RunError("predict: expected at least one image")
    if top < 1:
        raise RunError(f"--top: expected at least 1, got {top}")
    for path in images:
        if not path.is_file():
            raise RunError(f"image: no such file: {path}")
    check_images(images)
    run = read_run(folder)
    for path in images:
        pixels = run.backbone.preprocess(read_image(path))
        whole, patches = run.backbone.encode_images(pixels[None], run.config.spa.patch_source)
        patches = nearest_patches(whole, patches, run.config.storage.limit)
        scores = run.method.scores(whole, patches.to(getattr(torch, run.config.cache_dtype)))
        best = scores[0].topk(min(top, len(run.names)))
        yield str(path)
        for score, label in zip(best.values.tolist(), best.indices.tolist(), strict=True):
            yield f"  {score:7.4f}  {run.names[label]}"
