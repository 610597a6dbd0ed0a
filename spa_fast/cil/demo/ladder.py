"""The ablation ladder over the embedded world: what each part of the method adds, over several seeds."""

from __future__ import annotations

import dataclasses
import shlex
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from spa_fast.cil.backbone import Backbone
from spa_fast.cil.checkpoint import new_run_folder
from spa_fast.cil.config import SpaConfig
from spa_fast.cil.data.images import read_image
from spa_fast.cil.demo.world import CLASSES, contact_sheet, write_dataset
from spa_fast.cil.experiment import Experiment, make_method, prepare
from spa_fast.cil.loading import load_backbone
from spa_fast.cil.loop import run_tasks
from spa_fast.cil.methods.base import Method
from spa_fast.cil.methods.spa import Spa
from spa_fast.cil.report import (
    append_jsonl,
    draw_curve,
    draw_overlay,
    result_row,
    table,
    write_csv,
    write_json,
)
from spa_fast.cil.run_config import RunConfig
from spa_fast.cil.train import train

FILES = (
    *("results.json", "results.csv", "metrics.jsonl", "curve.png"),
    *("overlay_0.png", "overlay_1.png", "world.png"),
)
CHECKPOINT = Path(__file__).parent / "tiny_clip"
NOTE = (
    "SPA is reconstructed from its abstract. Weights: the demo's own tiny CLIP, "
    "whose patches were trained against text."
)
TRAIN_PER_CLASS = 30
TEST_PER_CLASS = 20
INCREMENT = 5

# Chosen on worlds that the demo does not use (`spa-fast demo --first-seed 777 --seeds 2`): five new classes a
# task leave few images a batch, so old classes are replayed as densely and epochs are more; names without
# meaning make the texts' local evidence worth as much as the prompt's.
SPA = SpaConfig(
    k=8,
    lr=0.03,
    epochs=30,
    pseudo_per_class=16,
    local_pseudo_per_class=16,
    local_replay="patches",
    fusion_weight=1.0,
    local_loss_weight=1.0,
)


def ladder() -> dict[str, dict[str, Any]]:
    """Step name -> changes to the full method's run settings."""
    spa = dataclasses.replace
    return {
        "zero-shot by name": {"method": "zero_shot"},
        "zero-shot by descriptions": {"method": "zero_shot", "zero_shot_texts": "descriptions"},
        "SimpleCIL": {"method": "simple_cil"},
        "SPA without patches": {"spa": spa(SPA, fusion_weight=0.0, local_loss_weight=0.0)},
        "SPA + selection, mean": {"spa": spa(SPA, solver="uniform")},
        "SPA + selection, OT": {},
        "SPA without pseudo-features": {"spa": spa(SPA, pseudo_per_class=0, local_replay="none")},
    }


def run_demo(out: Path, seeds: range, say: Callable[[str], None]) -> dict[str, Any]:
    """Run every step for every seed, write `out` and print the table; returns results.json's content."""
    # Steps are small: a second thread gains little here and loses much beside another busy process.
    torch.set_num_threads(1)
    start = time.perf_counter()
    backbone = load_backbone(f"local-dir:{CHECKPOINT}")
    steps = ladder()
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in steps}
    with new_run_folder(out, replaceable=FILES) as folder, tempfile.TemporaryDirectory() as scratch:
        with tqdm(total=len(seeds) * (len(steps) + 1), desc="demo", unit="run") as bar:
            for seed in seeds:
                world = Path(scratch) / f"world_{seed}"
                write_dataset(world, seed, TRAIN_PER_CLASS, TEST_PER_CLASS)
                base = world_config(world, seed)
                bar.update()
                for name, changes in steps.items():
                    config = dataclasses.replace(base, **changes)
                    experiment = prepare(config, Path(scratch) / "features", backbone)
                    row, method = run_step(experiment, name, folder / "metrics.jsonl")
                    runs[name].append(row)
                    if seed == seeds[0] and name == "SPA + selection, OT":
                        draw_examples(folder, experiment, method, backbone)
                    bar.update()
        contact_sheet(3, seeds[0]).save(folder / "world.png")
        rows = [summary(name, rows) for name, rows in runs.items()]
        results = {
            "note": NOTE,
            "seeds": list(seeds),
            "rows": rows,
            "seconds": round(time.perf_counter() - start, 1),
        }
        write_json(folder / "results.json", results)
        write_csv(folder / "results.csv", [csv_row(row) for row in rows])
        curves = {row["method"]: row["accuracies"] for row in rows}
        draw_curve(folder / "curve.png", curves, f"embedded world, mean of {len(seeds)} seeds")
    say(describe(rows))
    say(NOTE)
    say(f"{results['seconds']} s, {len(seeds)} seeds; {out}: results.json, metrics.jsonl, results.csv, *.png")
    return results


def keep_run(folder: Path, seed: int, say: Callable[[str], None]) -> None:
    """Write one world and a run of the full method over it into `folder`, to be used like any other.

    Args:
        folder: gets `world`, `run` and `feature_cache`; must not exist or be empty.
        seed: of the world, its class order and training.
        say: gets the run's lines, and a command to go on with.
    """
    world, run = folder / "world", folder / "run"
    write_dataset(world, seed, TRAIN_PER_CLASS, TEST_PER_CLASS)
    train(world_config(world, seed), run, say)
    name = next(iter(CLASSES))
    image = world / "test" / name / "000.png"
    command = ["explain", str(run), str(image), "--class", name, "--out", str(folder / "why.png")]
    say(f"to look into it: spa-fast {shlex.join(command)}")


def world_config(world: Path, seed: int) -> RunConfig:
    """Settings of the full method over a written world."""
    return RunConfig(
        data=world,
        backbone=f"local-dir:{CHECKPOINT}",
        descriptions=world / "descriptions.json",
        classnames=world / "names.json",
        increment=INCREMENT,
        order_seed=1993 + seed,
        seed=seed,
        spa=SPA,
    )


def run_step(experiment: Experiment, name: str, log: Path) -> tuple[dict[str, Any], Method]:
    """One step of the ladder on one world."""
    config = experiment.config
    torch.manual_seed(config.seed)
    method = make_method(config, experiment.backbone)
    start = time.perf_counter()
    outcome = run_tasks(experiment.stream, method)
    row = result_row(name, outcome.matrix, time.perf_counter() - start, config.as_dict())
    for stage, accuracy in enumerate(row["accuracies"]):
        append_jsonl(log, {"method": name, "seed": config.seed, "stage": stage, "accuracy": accuracy})
    return row, method


def summary(name: str, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Mean over seeds of every figure, spread (sample standard deviation) of average and last."""

    def mean(key: str) -> float:
        return round(statistics.fmean(row[key] for row in rows), 4)

    def spread(key: str) -> float:
        return round(statistics.stdev(row[key] for row in rows), 4) if len(rows) > 1 else 0.0

    matrix = torch.tensor(
        [[[float("nan") if r is None else r for r in line] for line in row["matrix"]] for row in rows]
    )
    accuracies = torch.tensor([row["accuracies"] for row in rows]).mean(0)
    return {
        "method": name,
        **{key: mean(key) for key in ("average", "last", "forgetting", "bwt", "seconds")},
        "average_spread": spread("average"),
        "last_spread": spread("last"),
        "accuracies": [round(a, 4) for a in accuracies.tolist()],
        "matrix": [[None if r != r else round(r, 4) for r in line] for line in matrix.mean(0).tolist()],
        "seeds": [row["config"]["seed"] for row in rows],
        "per_seed": [{key: row[key] for key in ("average", "last", "matrix")} for row in rows],
        "config": rows[0]["config"],
        "environment": rows[0]["environment"],
    }


def csv_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """A step's line in results.csv."""
    keys = ("method", "average", "average_spread", "last", "last_spread", "forgetting", "bwt", "seconds")
    return {key: row[key] for key in keys}


def describe(rows: Sequence[Mapping[str, Any]]) -> str:
    """The ladder as text."""
    lines = [
        [
            row["method"],
            f"{row['average']:.1f} ± {row['average_spread']:.1f}",
            f"{row['last']:.1f} ± {row['last_spread']:.1f}",
            f"{row['forgetting']:.1f}",
            f"{row['bwt']:.1f}",
        ]
        for row in rows
    ]
    return table(["step", "average %", "last %", "forgetting", "BWT"], lines)


def draw_examples(folder: Path, experiment: Experiment, method: Method, backbone: Backbone) -> None:
    """Two test images with their kept patches and transport plans for the true class."""
    assert isinstance(method, Spa)
    for number, label in enumerate((0, len(experiment.order) - 1)):
        index = experiment.order[label]
        image = read_image(experiment.data.images["test"][index][0])
        patches = experiment.cache.load("test", index).patches[0]
        why = method.explain(patches, label)
        draw_overlay(
            folder / f"overlay_{number}.png",
            image,
            round(backbone.n_patches**0.5),
            why,
            experiment.stream.descriptions(label),
            f"{experiment.names[label]} (test image)",
        )
