"""Using a finished run: score its test images again, or name the classes of new images."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path

from PIL import Image

from spa_fast.cil.checkpoint import load_run
from spa_fast.cil.data.datasets import check_images
from spa_fast.cil.errors import RunError
from spa_fast.cil.experiment import prepare, restore
from spa_fast.cil.loop import evaluate


def evaluate_run(run: Path, data: Path | None = None) -> Iterator[str]:
    """Lines of accuracy per task and over all classes after the last task."""
    config, names, backbone, method = restore(run)
    config = dataclasses.replace(config, data=data or config.data)
    experiment = prepare(config, config.cache or run.parent / "feature_cache", backbone)
    if experiment.names != names:
        raise RunError(f"--data: {config.data}: its classes are not those of {run}")
    last = len(experiment.stream.tasks) - 1
    experiment.stream.open_all()
    correct, sizes = evaluate(experiment.stream, method, last)
    for task, (right, total) in enumerate(zip(correct, sizes, strict=True)):
        yield f"task {task}: {100 * right / total:6.2f} % of {total} images"
    stored = load_run(run)[0]["last"]
    accuracy = 100 * sum(correct) / sum(sizes)
    yield f"all classes: {accuracy:6.2f} % of {sum(sizes)} images (stored: {stored:.2f} %)"


def predict_images(run: Path, images: Sequence[Path], top: int = 5) -> Iterator[str]:
    """Lines of the best `top` classes of each image with their scores."""
    for path in images:
        if not path.is_file():
            raise RunError(f"image: no such file: {path}")
    check_images(images)
    config, names, backbone, method = restore(run)
    for path in images:
        with Image.open(path) as image:
            pixels = backbone.preprocess(image.convert("RGB"))
        whole, patches = backbone.encode_images(pixels[None], config.spa.patch_source)
        best = method.scores(whole, patches.half())[0].topk(min(top, len(names)))
        yield str(path)
        for score, label in zip(best.values.tolist(), best.indices.tolist(), strict=True):
            yield f"  {score:7.4f}  {names[label]}"
