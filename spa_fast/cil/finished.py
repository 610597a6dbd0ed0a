"""Whether a run folder holds a whole run of given settings and inputs, so that it need not be done again."""

from __future__ import annotations

import dataclasses
import functools
import math
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from spa_fast.cil.backbone import Transform
from spa_fast.cil.checkpoint import STATE
from spa_fast.cil.errors import RunError
from spa_fast.cil.experiment import input_hashes, read_data
from spa_fast.cil.json_input import read_json
from spa_fast.cil.loading import load_backbone
from spa_fast.cil.presets import flat
from spa_fast.cil.report import SUMMARY
from spa_fast.cil.run_config import RunConfig
from spa_fast.cil.train import FILES

Hashes = Mapping[str, str | None]


def finished(folder: Path, config: RunConfig) -> dict[str, Any] | None:
    """The content of results.json if the run has ended and its files are whole, else None.

    Args:
        folder: run folder, perhaps not there yet.
        config: settings that it should have; where it was computed and its features lie may differ.

    Raises:
        RunError: the folder holds something else, or a run with other settings.
    """
    if not folder.exists():
        return None
    if not folder.is_dir() or not all(path.name in FILES for path in folder.iterdir()):
        raise RunError(f"{folder} exists and is no run folder; remove it")
    try:
        row = read_json(folder / "results.json", "results")
        if not isinstance(row, dict) or not _is_whole(row):
            return None
        stored = RunConfig.from_dict(row["config"])
        # Opening compares the file's length with its header.
        with safe_open(folder / STATE, framework="pt"):
            pass
    except (RunError, KeyError, TypeError, IndexError, ValueError, OSError, SafetensorError):
        return None
    there, here = ({**flat(c), "device": None, "cache": None} for c in (stored, config))
    other = sorted(key for key in here if here[key] != there[key])
    if other:
        raise RunError(f"{folder} holds a run with other settings ({', '.join(other)}); remove it")
    return row


def _is_whole(row: Mapping[str, Any]) -> bool:
    curve, matrix = row["accuracies"], row["matrix"]
    return (
        len(curve) == len(matrix) == len(row["protocol"]["tasks"])
        and math.isclose(row["average"], statistics.fmean(curve), abs_tol=1e-6)
        and math.isclose(row["last"], curve[-1], abs_tol=1e-6)
        and all(math.isfinite(row[key]) for key in SUMMARY)
    )


def hash_reader() -> Callable[[RunConfig], Hashes]:
    """A function from settings to `input_hashes` of what is there now; images and weights are read once."""

    @functools.cache
    def weights(name: str, transform: Transform) -> str:
        return load_backbone(name, transform=transform).fingerprint

    @functools.cache
    def hashes(config: RunConfig) -> Hashes:
        return input_hashes(config, read_data(config), weights(config.backbone, config.transform))

    return lambda config: hashes(dataclasses.replace(config, order_seed=0, seed=0))


def check_inputs(folder: Path, row: Mapping[str, Any], now: Hashes) -> None:
    """Refuse a finished run whose weights, descriptions or images were others than they are now.

    Raises:
        RunError: naming them.
    """
    other = [key for key in now if row["protocol"].get(key) != now[key]]
    if other:
        raise RunError(f"{folder} holds a run from other inputs ({', '.join(other)}); remove it")
