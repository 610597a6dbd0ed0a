"""Experiment files of ENGINE, AREA, C3Box and PILOT, read unchanged: every key is mapped or named."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from spa_fast.cil.data.catalog import DataSet, find_data_set
from spa_fast.cil.errors import RunError, did_you_mean
from spa_fast.cil.json_input import read_json
from spa_fast.cil.presets import BACKBONE, preset_config
from spa_fast.cil.run_config import RunConfig

_METHODS = {
    "spa": "spa",
    "simplecil": "simple_cil",
    "simple_cil": "simple_cil",
    "zs_clip": "zero_shot",
    "zsclip": "zero_shot",
    "zero_shot": "zero_shot",
}
_BACKBONES = {"clip": BACKBONE, "openai_clip": "ViT-B-16/openai", "clip_openai": "ViT-B-16/openai"}
_OPTIMIZERS = {"sgd": "sgd", "adam": "adamw", "adamw": "adamw"}
# Keys that carry over as they are: (our key, of the method or of the run).
_NUMBERS = {
    "tuned_epoch": "epochs",
    "epochs": "epochs",
    "init_lr": "lr",
    "batch_size": "batch_size",
    "weight_decay": "weight_decay",
    "samples_per_class": "pseudo_per_class",
}
_NO_EFFECT = {
    "prefix": "a name for logs; see --out",
    "fixed_memory": "no images are stored",
    "projection_type": "see --projector",
    "frozen_layers": "both encoders are frozen",
    "scheduler_gamma": "a step is always to a tenth",
    "text_des": "ENGINE's weight of descriptions; see --description-loss-weight",
    "text_des_path": "see --descriptions",
    "occ_des_path": "see --descriptions",
    "aug_des_path": "see --descriptions",
    "image_aug": "ENGINE's augmentation; features are extracted once",
    "rerank": "ENGINE's second pass; see --fusion-weight",
    "rerank_top": "ENGINE's second pass; see --fusion-weight",
    "stat": "ENGINE's discriminant branch",
    "sample_num": "ENGINE's pseudo-features; see --pseudo-per-class",
    "sample_noise": "ENGINE's pseudo-features; see --isotropic-std",
    "K": "AREA's subspaces",
    "g_lambda": "AREA's subspaces",
    "precomputed_basis_path": "AREA's subspaces",
}
_MAPPED = {
    *("dataset", "shuffle", "init_cls", "increment", "model_name", "backbone_type", "convnet_type", "device"),
    *("seed", "optimizer", "min_lr", "milestones", "memory_size", "memory_per_class", "total_class_num"),
    *_NUMBERS,
}


class _Reader:
    """Settings collected from one file, and a line per key on what became of it."""

    def __init__(self, path: Path, values: dict[str, Any]) -> None:
        self.path = path
        self.values = values
        self.run: dict[str, Any] = {}
        self.spa: dict[str, Any] = {}
        self.lines: list[str] = []
        self.warnings: list[str] = []
        self._from: dict[str, str] = {}

    def note(self, key: str, became: str) -> None:
        self.lines.append(f"  {key} = {self.values[key]!r}: {became}")

    def take(self, table: dict[str, Any], ours: str, key: str, value: Any) -> None:
        """Set our `ours` by the file's `key`; of two keys for one setting the later wins, with a warning."""
        earlier = self._from.get(ours)
        if earlier and table[ours] != value:
            self.warnings.append(
                f"warning: {self.path}: {earlier} and {key} both give {ours}: {key} wins, {ours}={value}"
            )
        table[ours], self._from[ours] = value, key

    def in_its_words(self, error: str) -> str:
        """A message on one of our settings as one on the file's key that gave it."""
        ours, colon, what = error.partition(":")
        return self._from.get(ours, ours) + colon + what

    def whole(self, key: str, least: int) -> int:
        value = self.first(key)
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise RunError(
                f"--config: {self.path}: {key}: expected a whole number from {least}, got {value!r}"
            )
        return value

    def first(self, key: str) -> Any:
        """The value, or the first of a list."""
        value = self.values[key]
        return value[0] if isinstance(value, list) and value else value


def read_experiment(path: Path, locate: Callable[[DataSet | None], Path]) -> tuple[RunConfig, list[str]]:
    """Settings of an experiment file, and lines that say what every key of it became.

    Args:
        path: a JSON object with the keys `dataset`, `init_cls`, `increment` and others.
        locate: where the images of a known data set lie, or those of an unknown one (None).

    Raises:
        RunError: no such object, or a value that cannot be read.
    """
    values = read_json(path, "--config")
    if not isinstance(values, dict):
        raise RunError(f"--config: {path}: expected an object")
    for key in ("dataset", "init_cls", "increment"):
        if key not in values:
            raise RunError(f"--config: {path}: missing key {key!r}{did_you_mean(key, values)}")
    reader = _Reader(path, values)
    start = _data(reader, locate)
    _protocol(reader)
    _model(reader)
    _optimisation(reader)
    unknown = [key for key in values if key not in _MAPPED and key not in _NO_EFFECT]
    for key, reason in _NO_EFFECT.items():
        if key in values:
            reader.note(key, f"no effect ({reason})")
    for key in unknown:
        reader.note(key, f"UNKNOWN, no effect{did_you_mean(key, [*_MAPPED, *_NO_EFFECT])}")
    if unknown:
        reader.warnings.append(f"warning: {path}: unknown keys, not used: {', '.join(unknown)}")
    try:
        config = dataclasses.replace(start, **reader.run, spa=dataclasses.replace(start.spa, **reader.spa))
    except RunError as error:
        raise RunError(f"--config: {path}: {reader.in_its_words(str(error))}") from error
    return config, [f"{path} read as:", *reader.lines, *reader.warnings]


def _data(reader: _Reader, locate: Callable[[DataSet | None], Path]) -> RunConfig:
    name, first, increment = (
        reader.values["dataset"],
        reader.whole("init_cls", 1),
        reader.whole("increment", 1),
    )
    if not isinstance(name, str):
        raise RunError(f"--config: {reader.path}: dataset: expected a text, got {name!r}")
    try:
        data_set = find_data_set(name, "dataset")
    except RunError as error:
        reader.note("dataset", f"the image folder given by --data ({error})")
        start = RunConfig(locate(None), BACKBONE, init_classes=first, increment=increment)
    else:
        half = 0 if first == increment else first
        start = preset_config(f"{data_set.key}_B{half}_Inc{increment}", locate(data_set))
        reader.note("dataset", f"preset={start.preset}")
    reader.note("init_cls", f"init_classes={start.init_classes}")
    reader.note("increment", f"increment={increment}")
    if "total_class_num" in reader.values:
        reader.take(reader.run, "classes", "total_class_num", reader.whole("total_class_num", 1))
        reader.note("total_class_num", f"classes={reader.run['classes']}")
    return start


def _protocol(reader: _Reader) -> None:
    values = reader.values
    if "shuffle" in values:
        if not isinstance(values["shuffle"], bool):
            raise RunError(
                f"--config: {reader.path}: shuffle: expected true or false, got {values['shuffle']!r}"
            )
        reader.run["shuffle"] = values["shuffle"]
        reader.note("shuffle", f"shuffle={values['shuffle']}")
    if "seed" in values:
        reader.take(reader.run, "order_seed", "seed", reader.whole("seed", 0))
        several = isinstance(values["seed"], list) and len(values["seed"]) > 1
        rest = "; the others need runs of their own" if several else ""
        reader.note("seed", f"order_seed={reader.run['order_seed']}{rest}")
    if "device" in values:
        reader.run["device"] = _device(str(reader.first("device")))
        several = isinstance(values["device"], list) and len(values["device"]) > 1
        reader.note("device", f"device={reader.run['device']}{'; a run uses one' if several else ''}")
    for key in ("memory_size", "memory_per_class"):
        if key in values:
            reader.note(key, "no effect (no images are stored)" if values[key] else "none, as here")


def _device(index: str) -> str:
    import torch

    index = index.removeprefix("cuda:")
    return f"cuda:{index}" if index.isdecimal() and torch.cuda.is_available() else "cpu"


def _model(reader: _Reader) -> None:
    if "model_name" in reader.values:
        name = str(reader.values["model_name"]).lower()
        reader.run["method"] = _METHODS.get(name, "spa")
        instead = "" if name in _METHODS else " in its place: there is no such method here; see --method"
        reader.note("model_name", f"method={reader.run['method']}{instead}")
    for key in ("backbone_type", "convnet_type"):
        if key in reader.values:
            name = str(reader.values[key]).lower()
            reader.take(reader.run, "backbone", key, _BACKBONES.get(name, BACKBONE))
            instead = "" if name in _BACKBONES else " in its place: it is no CLIP; see --backbone"
            reader.note(key, f"backbone={reader.run['backbone']}{instead}")


def _optimisation(reader: _Reader) -> None:
    values = reader.values
    for key, ours in _NUMBERS.items():
        if key in values:
            reader.take(reader.spa, ours, key, values[key])
            reader.note(key, f"{ours}={values[key]}")
    if "optimizer" in values:
        name = str(values["optimizer"]).lower()
        if name not in _OPTIMIZERS:
            raise RunError(f"--config: {reader.path}: optimizer: expected sgd, adam or adamw, got {name!r}")
        reader.spa["optimizer"] = _OPTIMIZERS[name]
        reader.note("optimizer", f"optimizer={_OPTIMIZERS[name]}")
    if "milestones" in values:
        reader.spa["schedule"] = "step"
        reader.note("milestones", "schedule=step (after 40 % and 75 % of the epochs, whatever the numbers)")
    if "min_lr" in values:
        reader.note("min_lr", "no effect (schedules end at 0)" if values["min_lr"] else "0, as here")
