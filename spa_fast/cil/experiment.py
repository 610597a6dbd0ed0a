"""One run from its settings to its folder: checks, stream, method, loop, files."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from spa_fast.cil.backbone import Backbone, Transform, load_backbone
from spa_fast.cil.checkpoint import check_out, load_run, new_run_folder, save_run
from spa_fast.cil.config import SpaConfig
from spa_fast.cil.data.cache import FeatureCache
from spa_fast.cil.data.datasets import ImageFolders, check_images, read_image_folders
from spa_fast.cil.data.order import class_order, split_tasks
from spa_fast.cil.data.stream import TaskStream
from spa_fast.cil.descriptions.schema import read_descriptions
from spa_fast.cil.descriptions.select import select_exemplars
from spa_fast.cil.errors import RunError
from spa_fast.cil.loop import Outcome, run_tasks
from spa_fast.cil.methods.base import Method
from spa_fast.cil.methods.simple_cil import SimpleCil
from spa_fast.cil.methods.spa import Spa
from spa_fast.cil.methods.zero_shot import ZeroShot
from spa_fast.cil.report import append_jsonl, draw_curve, result_row, stage_rows, write_csv, write_json

MethodName = Literal["spa", "zero_shot", "simple_cil"]


@dataclass(frozen=True)
class RunConfig:
    """What a run is made of; paths as the user gave them."""

    data: Path
    """Folder with train/CLASS/* and test/CLASS/* (or val/CLASS/*) images."""
    backbone: str
    """local-dir:FOLDER, or MODEL/PRETRAINED as open_clip lists them (ViT-B-16/laion400m_e32)."""
    descriptions: Path | None = None
    """JSON file of class-wise descriptions; spa and zero_shot by descriptions need it."""
    classnames: Path | None = None
    """JSON file {folder: class name}; without it folder names are class names."""
    method: MethodName = "spa"
    """spa, or a training-free anchor."""
    zero_shot_texts: Literal["templates", "descriptions"] = "templates"
    """Texts that zero_shot classifies by."""
    init_classes: int = 0
    """Classes of the first task; 0 means as many as the increment."""
    increment: int = 10
    """Classes of every later task; a remainder forms a smaller last task."""
    order_seed: int = 1993
    """Seed of the class order."""
    seed: int = 1
    """Seed of training: batches, pseudo-features, initialisation."""
    templates: tuple[str, ...] = ("a photo of a {}.",)
    """Prompt templates; training uses the first, evaluation the mean of all."""
    transform: Transform = "openclip"
    """Preprocessing: the model's own, or LAMDA's squash to a square."""
    cache: Path | None = None
    """Folder of extracted features; default `feature_cache` beside the run folder."""
    device: str = "cpu"
    """Torch device of the encoders."""
    spa: SpaConfig = field(default_factory=SpaConfig)
    """Settings of spa."""

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        values = dataclasses.asdict(self)
        values["templates"] = list(self.templates)
        return {key: str(v) if isinstance(v, Path) else v for key, v in values.items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> RunConfig:
        """Inverse of `as_dict`."""
        paths = {
            key: Path(values[key]) for key in ("data", "descriptions", "classnames", "cache") if values[key]
        }
        spa = SpaConfig.from_dict(values["spa"])
        return cls(**{**values, **paths, "templates": tuple(values["templates"]), "spa": spa})


@dataclass(frozen=True)
class Experiment:
    """A checked run, ready to go.

    Attributes:
        config: its settings.
        data: image folders.
        backbone: the frozen encoder.
        cache: features by class.
        order: folder index of each label.
        stream: the tasks.
    """

    config: RunConfig
    data: ImageFolders
    backbone: Backbone
    cache: FeatureCache
    order: list[int]
    stream: TaskStream

    @property
    def names(self) -> list[str]:
        """Class names in order of arrival."""
        return [self.data.names[i] for i in self.order]


def prepare(config: RunConfig, cache_folder: Path, backbone: Backbone | None = None) -> Experiment:
    """Check every input, cheapest first, and load the backbone; no training, no features.

    Raises:
        RunError: naming the file, class or argument at fault.
    """
    if not config.templates or any("{}" not in t for t in config.templates):
        raise RunError(f"--templates: expected texts with {{}} for the class name, got {config.templates}")
    data = read_image_folders(config.data, config.classnames)
    tasks = split_tasks(len(data.folders), config.init_classes, config.increment)
    needs_texts = config.method == "spa" or config.zero_shot_texts == "descriptions"
    if needs_texts and config.descriptions is None:
        raise RunError(f"--descriptions: {config.method} needs a file of class-wise descriptions")
    descriptions = read_descriptions(config.descriptions, data.names) if config.descriptions else None
    backbone = backbone or load_backbone(config.backbone, transform=config.transform, device=config.device)
    if config.method == "spa" and config.spa.k > backbone.n_patches:
        raise RunError(
            f"--k: expected at most the backbone's {backbone.n_patches} patches, got {config.spa.k}"
        )
    cache = FeatureCache(
        cache_folder, data, backbone, source=config.spa.patch_source, transform=config.transform
    )
    check_images(cache.missing())
    order = class_order(len(data.folders), config.order_seed)
    stream = TaskStream(cache, backbone, order, tasks, descriptions, config.templates, config.spa)
    return Experiment(config, data, backbone, cache, order, stream)


def make_method(config: RunConfig, width: int, logit_scale: float) -> Method:
    """The method named in the settings."""
    if config.method == "zero_shot":
        return ZeroShot(config.zero_shot_texts)
    if config.method == "simple_cil":
        return SimpleCil()
    return Spa(config.spa, width, logit_scale, config.seed)


def train(config: RunConfig, out: Path, say: Callable[[str], None] = lambda line: None) -> dict[str, Any]:
    """Run all tasks and write the run folder `out`; returns the row of results.json.

    The folder appears whole when the run has ended, or not at all. It holds results.json, results.csv,
    metrics.jsonl, curve.png, exemplars.json, run.json and model.safetensors.
    """
    check_out(out)
    experiment = prepare(config, config.cache or out.parent / "feature_cache")
    torch.manual_seed(config.seed)
    method = make_method(config, experiment.backbone.width, experiment.backbone.logit_scale)
    if isinstance(method, Spa):
        say(local_zero_shot(experiment, method))
    with new_run_folder(out) as folder:
        start = time.perf_counter()
        exemplars: dict[str, list[str]] = {}

        def on_stage(outcome: Outcome) -> None:
            stage = len(outcome.matrix.rows) - 1
            matrix = outcome.matrix
            record = {
                "stage": stage,
                "classes": experiment.stream.tasks[stage].stop,
                "accuracy": matrix.accuracies[-1],
                "tasks": matrix.rows[-1],
                "learn_seconds": outcome.learn_seconds[-1],
                "eval_seconds": outcome.eval_seconds[-1],
                **outcome.figures[-1],
            }
            append_jsonl(folder / "metrics.jsonl", record)
            say(f"stage {stage}: {record['classes']:4d} classes, accuracy {matrix.accuracies[-1]:6.2f} %")
            exemplars.update(_exemplars(experiment, stage))

        outcome = run_tasks(experiment.stream, method, on_stage)
        row = result_row(config.method, outcome.matrix, time.perf_counter() - start, config.as_dict())
        row["learn_seconds"] = round(sum(outcome.learn_seconds), 2)
        row["eval_seconds"] = round(sum(outcome.eval_seconds), 2)
        row["protocol"] = {
            "replay": "none",
            "weights_sha256": experiment.backbone.weights_hash,
            "class_order": experiment.order,
            "tasks": [len(t) for t in experiment.stream.tasks],
        }
        write_json(folder / "results.json", row)
        write_csv(folder / "results.csv", stage_rows(outcome.matrix))
        write_json(folder / "exemplars.json", exemplars)
        draw_curve(folder / "curve.png", {config.method: outcome.matrix.accuracies}, config.data.name)
        description = {
            "config": config.as_dict(),
            "names": experiment.names,
            "average": row["average"],
            "last": row["last"],
        }
        save_run(folder, description, method.state_dict())
    figures = {key: f"{key} {row[key]:.2f}" for key in ("average", "last", "forgetting", "bwt")}
    say(f"{', '.join(figures.values())} (%), {row['seconds']:.1f} s: {out}")
    return row


def restore(run: Path) -> tuple[RunConfig, list[str], Backbone, Method]:
    """Settings, class names in order of arrival, backbone and learned method of a run folder.

    Raises:
        RunError: the folder or what it points to cannot be read.
    """
    description, state = load_run(run)
    try:
        config = RunConfig.from_dict(description["config"])
        names = [str(name) for name in description["names"]]
        backbone = load_backbone(config.backbone, transform=config.transform, device=config.device)
        method = make_method(config, backbone.width, backbone.logit_scale)
        method.load_state_dict(state)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise RunError(f"run: {run}: does not describe a usable run: {error}") from error
    return config, names, backbone, method


@torch.no_grad()
def local_zero_shot(experiment: Experiment, method: Spa) -> str:
    """One line on the untrained local branch over the first task's training images: is it alive?"""
    if not method.local:
        return "local branch: off"
    task = next(iter(experiment.stream))
    scores = [method.local.scores(p, task.texts) for p in task.features.patches.split(64)]
    right = (torch.cat(scores).argmax(-1) == task.targets).float().mean().item()
    chance = 100.0 / len(task.labels)
    source = experiment.config.spa.patch_source
    where = "of the first task's training images"
    return f"local branch before training ({source}): {100 * right:.1f} % {where} (chance {chance:.1f} %)"


def _exemplars(experiment: Experiment, stage: int) -> dict[str, list[str]]:
    """Per new class the images that a writer of descriptions would be shown, relative to the data folder."""
    spa, chosen = experiment.config.spa, {}
    for label in experiment.stream.tasks[stage]:
        index = experiment.order[label]
        features = experiment.cache.load("train", index).globals
        rows = select_exemplars(features, spa.exemplars, spa.exemplar_selection, experiment.config.order_seed)
        images = experiment.data.images["train"][index]
        chosen[experiment.data.names[index]] = [
            str(images[r].relative_to(experiment.data.root)) for r in rows
        ]
    return chosen
