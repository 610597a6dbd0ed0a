"""One run from its settings to its folder."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from spa_fast.cil.checkpoint import RUN, STATE, new_run_folder, save_run
from spa_fast.cil.data.images import relative_name
from spa_fast.cil.descriptions.select import select_exemplars
from spa_fast.cil.errors import RunError
from spa_fast.cil.experiment import Experiment, input_hashes, make_method, prepare
from spa_fast.cil.loop import Outcome, run_tasks
from spa_fast.cil.methods.base import Method
from spa_fast.cil.methods.spa import Spa
from spa_fast.cil.presets import changes, describe
from spa_fast.cil.report import (
    SUMMARY,
    draw_curve,
    lamda_summary,
    result_row,
    stage_rows,
    write_csv,
    write_json,
)
from spa_fast.cil.run_config import RunConfig
from spa_fast.cil.tracking import LOG, METRICS, RunLog, TrackerName, tracker_module

# What a run folder may hold.
FILES = (
    *("results.json", "results.csv", METRICS, LOG, "curve.png", "exemplars.json", RUN, STATE, "tensorboard"),
)


def train(
    config: RunConfig,
    out: Path,
    say: Callable[[str], None] = lambda line: None,
    track: TrackerName = "none",
) -> dict[str, Any]:
    """Run all tasks and write the run folder `out`; returns the row of results.json.

    The folder appears whole when the run has ended, or not at all. It holds results.json, results.csv,
    metrics.jsonl, train.log, curve.png, run.json and model.safetensors, and for spa exemplars.json. A tracker
    that fails on the way is switched off with one warning.

    Raises:
        RunError: bad input, a tracker that is not installed or does not start, or training that diverges.
        OSError: a file that cannot be written, by name.
    """
    config, out = config.absolute(), out.resolve()
    tracker_module(track)
    with new_run_folder(out) as folder:
        log = RunLog(folder, say)
        try:
            row = _run(config, out, folder, log, track)
            log.finish({key: row[key] for key in SUMMARY})
        finally:
            log.finish(None)
    return row


def _run(config: RunConfig, out: Path, folder: Path, log: RunLog, track: TrackerName) -> dict[str, Any]:
    for line in describe(config):
        log.say(line)
    experiment = prepare(config, config.cache or out.parent / "feature_cache", say=log.say)
    log.track(track, out.name, config.as_dict())
    experiment.cache.fill()
    torch.manual_seed(config.seed)
    method = make_method(config, experiment.backbone)
    method.on_epoch = lambda figures: log.record("epoch", figures)
    if isinstance(method, Spa):
        log.say(local_zero_shot(experiment, method))
    start = time.perf_counter()

    def on_stage(outcome: Outcome) -> None:
        record = stage_record(experiment, outcome)
        log.record("stage", record)
        stage, classes, accuracy = (record[key] for key in ("stage", "classes", "accuracy"))
        log.say(f"stage {stage}: {classes:4d} classes, accuracy {accuracy:6.2f} %")

    try:
        outcome = run_tasks(experiment.stream, method, on_stage)
    except ValueError as error:
        raise RunError(f"the run cannot go on: {error}") from error
    row = result_row(config.method, outcome.matrix, time.perf_counter() - start, config.as_dict())
    row |= {"run_id": log.run_id, "started": log.started}
    row["learn_seconds"] = round(sum(outcome.learn_seconds), 2)
    row["eval_seconds"] = round(sum(outcome.eval_seconds), 2)
    row["protocol"] = protocol(experiment)
    write_run(folder, experiment, method, row, outcome)
    for line in lamda_summary(outcome.matrix):
        log.say(line)
    figures = ", ".join(f"{key} {row[key]:.2f}" for key in SUMMARY)
    log.say(f"{row['label']}: {figures} (%), {row['seconds']:.1f} s: {out}")
    return row


def write_run(
    folder: Path, experiment: Experiment, method: Method, row: dict[str, Any], outcome: Outcome
) -> None:
    """Every file of a run folder but those that grow as it runs."""
    config = experiment.config
    write_json(folder / "results.json", row)
    write_csv(folder / "results.csv", stage_rows(outcome.matrix))
    title = f"{row['label']}, {config.preset or config.data.name}"
    draw_curve(folder / "curve.png", {row["label"]: outcome.matrix.accuracies}, title)
    if config.method == "spa":
        write_json(folder / "exemplars.json", exemplars(experiment))
    description = {
        "config": config.as_dict(),
        "names": experiment.names,
        "descriptions": [experiment.stream.descriptions(label) for label in range(len(experiment.order))],
        "backbone_fingerprint": experiment.backbone.fingerprint,
        "last": row["last"],
    }
    save_run(folder, description, method.state_dict())


def stage_record(experiment: Experiment, outcome: Outcome) -> dict[str, Any]:
    """The latest stage's line of metrics.jsonl."""
    stage = len(outcome.matrix.rows) - 1
    return {
        "stage": stage,
        "classes": experiment.stream.tasks[stage].stop,
        "accuracy": outcome.matrix.accuracies[-1],
        "tasks": outcome.matrix.rows[-1],
        "learn_seconds": outcome.learn_seconds[-1],
        "eval_seconds": outcome.eval_seconds[-1],
        **outcome.figures[-1],
    }


def protocol(experiment: Experiment) -> dict[str, Any]:
    """What a figure depends on beside the settings."""
    config = experiment.config
    return {
        "preset": config.preset,
        "changed": {key: {"preset": there, "here": here} for key, (there, here) in changes(config).items()},
        "replay": replay(config),
        "stored_images": 0,
        "excluded_images": experiment.data.left_out,
        "backbone": config.backbone,
        "transform": config.transform,
        "templates": list(config.templates),
        "seeds": {"order": config.order_seed if config.shuffle else None, "training": config.seed},
        **input_hashes(config, experiment.data, experiment.backbone.fingerprint),
        "class_order": experiment.order,
        "tasks": [len(task) for task in experiment.stream.tasks],
    }


def replay(config: RunConfig) -> str:
    """`pseudo` where features are drawn for old classes, else `none`; images are never stored."""
    spa = config.spa
    local_loss = spa.loss != "joint" and spa.project_patches != "none" and spa.local_loss_weight > 0
    local = local_loss and spa.local_replay != "none" and spa.local_pseudo_per_class > 0
    return "pseudo" if config.method == "spa" and (spa.pseudo_per_class > 0 or local) else "none"


@torch.no_grad()
def local_zero_shot(experiment: Experiment, method: Spa) -> str:
    """One line on the untrained local branch over the first task's training images: is it alive?"""
    if not method.local:
        return "local branch: off"
    task = next(iter(experiment.stream))
    scores = [method.local.scores(part, task.texts) for part in task.features.patches.split(64)]
    right = (torch.cat(scores).argmax(-1) == task.targets).float().mean().item()
    source, chance = experiment.config.spa.patch_source, 100.0 / len(task.labels)
    where = "of the first task's training images"
    return f"local branch before training ({source}): {100 * right:.1f} % {where} (chance {chance:.1f} %)"


def exemplars(experiment: Experiment) -> dict[str, list[str]]:
    """Per class the images that a writer of descriptions would be shown, relative to the data folder."""
    config, data = experiment.config, experiment.data
    chosen = {}
    for index in experiment.order:
        features = experiment.cache.load("train", index).globals
        rows = select_exemplars(
            features, config.spa.exemplars, config.spa.exemplar_selection, config.order_seed
        )
        images = data.images["train"][index]
        chosen[data.names[index]] = [relative_name(images[row], data.root) for row in rows]
    return chosen
