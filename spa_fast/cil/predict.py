"""Using a finished run: score its test images again, name the classes of new images, show why."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from spa_fast.cil.backbone import Backbone
from spa_fast.cil.checkpoint import load_run
from spa_fast.cil.data.extract import nearest_patches
from spa_fast.cil.data.images import check_images, read_image
from spa_fast.cil.errors import RunError, did_you_mean
from spa_fast.cil.experiment import check_patches, make_method, prepare
from spa_fast.cil.json_input import is_texts
from spa_fast.cil.loading import load_backbone
from spa_fast.cil.loop import evaluate
from spa_fast.cil.methods.base import Method
from spa_fast.cil.methods.spa import Spa
from spa_fast.cil.report import draw_overlay
from spa_fast.cil.run_config import RunConfig


@dataclasses.dataclass(frozen=True)
class FinishedRun:
    """A run read back.

    Attributes:
        config: its settings.
        names: class names in order of arrival.
        descriptions: of each class, those in use; empty where the method reads none.
        last: accuracy in percent after the last task, as stored.
        backbone: the encoder it was trained with.
        method: the learned method.
    """

    config: RunConfig
    names: list[str]
    descriptions: list[list[str]]
    last: float
    backbone: Backbone
    method: Method


def read_run(folder: Path) -> FinishedRun:
    """Read a run folder and load its backbone.

    Raises:
        RunError: the folder or what it points to cannot be read, or the backbone is another one.
    """
    run, state = load_run(folder)
    names, texts, last = run.get("names"), run.get("descriptions"), run.get("last")
    if not is_texts(names):
        raise RunError(f"run: {folder}: expected a list of class names")
    if not isinstance(texts, list) or not all(map(is_texts, texts)):
        raise RunError(f"run: {folder}: expected a list of descriptions for each class")
    if not isinstance(last, int | float):
        raise RunError(f"run: {folder}: expected the last accuracy as a number, got {last!r}")
    config = RunConfig.from_dict(run.get("config"))
    backbone = load_backbone(config.backbone, transform=config.transform, device=config.device)
    if backbone.fingerprint != run.get("backbone_fingerprint"):
        raise RunError(f"run: {folder}: {config.backbone} is not the backbone it was trained with")
    check_patches(config, backbone, texts)
    method = make_method(config, backbone)
    try:
        method.load_state_dict(state)
    except (KeyError, ValueError, RuntimeError, TypeError) as error:
        raise RunError(f"run: {folder}: the learned state does not fit its settings: {error}") from error
    if method.n_classes != len(names):
        raise RunError(f"run: {folder}: {method.n_classes} classes learnt, {len(names)} names")
    if len(texts) != len(names):
        raise RunError(f"run: {folder}: descriptions of {len(texts)} classes, {len(names)} names")
    return FinishedRun(config, names, texts, last, backbone, method)


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
    _check_files(images)
    run = read_run(folder)
    for path in images:
        _, whole, patches = _encoded(run, path)
        best = run.method.scores(whole, patches)[0].topk(min(top, len(run.names)))
        yield str(path)
        for score, label in zip(best.values.tolist(), best.indices.tolist(), strict=True):
            yield f"  {score:7.4f}  {run.names[label]}"


def explain_image(folder: Path, image: Path, name: str, out: Path) -> str:
    """Draw why an image got its local score for class `name`; one line on it.

    Raises:
        RunError: no such class, image or folder of `out`, a name that is no PNG's, a run that has nothing to
            show, or no matplotlib.
    """
    if find_spec("matplotlib") is None:
        raise RunError("explain: needs matplotlib, which is not installed: pip install matplotlib")
    _check_files([image])
    if out.suffix.lower() != ".png":
        raise RunError(f"--out: expected a file ending in .png, got {str(out)!r}")
    if not out.resolve().parent.is_dir():
        raise RunError(f"--out: no such folder: {out.resolve().parent}")
    run = read_run(folder)
    if name not in run.names:
        raise RunError(f"--class: the run has no class {name!r}{did_you_mean(name, run.names)}")
    if not isinstance(run.method, Spa):
        raise RunError(f"explain: the method of {folder} is {run.config.method}, which has no local branch")
    if run.config.spa.semantic_tokens != "sentence_eos":
        raise RunError("explain: shows one token a description; this run aligns with their words")
    if run.config.storage.limit:
        raise RunError("explain: shows all patches; this run was trained on part of them (--cache-patches)")
    label = run.names.index(name)
    pixels, whole, patches = _encoded(run, image)
    why = run.method.explain(patches[0], label)
    rank = int((run.method.scores(whole, patches)[0].argsort(descending=True) == label).nonzero()) + 1
    score = float((why.transport.plan * why.similarity).sum())
    found = f"local score {score:.3f}, rank {rank} of {len(run.names)} classes"
    grid = round(run.backbone.n_patches**0.5)
    seen = run.backbone.seen_image(pixels)
    draw_overlay(out, seen, grid, why, run.descriptions[label], f"{name}: {found}")
    return f"{image}: {name}: {found}: {out}"


def _encoded(run: FinishedRun, path: Path) -> tuple[Tensor, Tensor, Tensor]:
    """Pixels [3, H, W], global token [1, D] and patch tokens [1, N, D] as the cache stores them."""
    pixels = run.backbone.preprocess(read_image(path))
    whole, patches = run.backbone.encode_images(pixels[None], run.config.spa.patch_source)
    patches = nearest_patches(whole, patches, run.config.storage.limit)
    return pixels, whole, patches.to(getattr(torch, run.config.cache_dtype))


def _check_files(images: Sequence[Path]) -> None:
    for path in images:
        if not path.is_file():
            raise RunError(f"image: no such file: {path}")
    check_images(images)
