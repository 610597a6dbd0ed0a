"""Presets `DATASET_Bm_Incn`, what a run changes about one, and the name of a run."""

from __future__ import annotations

import hashlib
import json
import re
import textwrap
from pathlib import Path
from typing import Any

from spa_fast.cil.data.catalog import DATA_SETS, DataSet, find_data_set, prompt_templates
from spa_fast.cil.errors import RunError, did_you_mean
from spa_fast.cil.run_config import RunConfig

BACKBONE = "ViT-B-16/laion400m_e32"

# Where things lie on this machine says nothing about the figures.
_PLACES = ("data", "cache", "device", "preset")


def preset_names() -> list[str]:
    """The published settings: both of every known data set."""
    return [name for data_set in DATA_SETS.values() for name in data_set.presets]


def parse_preset(name: str) -> tuple[DataSet, int, int]:
    """Data set, classes of the first task (0: as many as the increment) and increment of a preset's name.

    Raises:
        RunError: not of the form DATASET_Bm_Incn, or an unknown data set.
    """
    found = re.fullmatch(r"(.+?)[ _-]+b(\d{1,6})[ _-]*inc(\d{1,6})", name.strip(), re.IGNORECASE)
    if not found:
        hint = did_you_mean(name, preset_names())
        raise RunError(f"--preset: expected DATASET_Bm_Incn, for example cub_B0_Inc20, got {name!r}{hint}")
    return find_data_set(found[1], "--preset"), int(found[2]), int(found[3])


def preset_config(name: str, data: Path) -> RunConfig:
    """A preset's settings: LAMDA's protocol around SPA's defaults.

    Raises:
        RunError: unknown preset.
    """
    data_set, first, increment = parse_preset(name)
    return RunConfig(
        data=data,
        backbone=BACKBONE,
        preset=f"{data_set.key}_B{first}_Inc{increment}",
        classes=data_set.classes,
        init_classes=first,
        increment=increment,
        templates=prompt_templates(data_set),
        transform="lamda",
    )


def changes(config: RunConfig) -> dict[str, tuple[Any, Any]]:
    """Settings that differ from the preset (without one: from the defaults): {key: (there, here)}."""
    start = preset_config(config.preset, config.data) if config.preset else RunConfig(config.data, BACKBONE)
    there, here = flat(start), flat(config)
    return {key: (there[key], here[key]) for key in here if there[key] != here[key] and key not in _PLACES}


def flat(config: RunConfig) -> dict[str, Any]:
    """All settings in one JSON-ready mapping, those of spa beside the others."""
    values = config.as_dict()
    method = values.pop("spa")
    return {**values, **method}


def describe(config: RunConfig) -> list[str]:
    """The settings as lines to print, and what they change about the preset."""
    text = ", ".join(f"{key}={_shown(value)}" for key, value in flat(config).items())
    wrap = textwrap.TextWrapper(110, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)
    lines = wrap.wrap(f"settings: {text}")
    if config.preset:
        known = (
            config.preset if config.preset in preset_names() else f"{config.preset} (no published setting)"
        )
        changed = changes(config).items()
        differences = [f"{key}={_shown(here)} (preset: {_shown(there)})" for key, (there, here) in changed]
        lines += wrap.wrap(f"preset {known}: " + (", ".join(differences) or "unchanged"))
    return lines


def run_name(config: RunConfig) -> str:
    """A folder name: data and split, method, backbone and weights, seeds, a tag of all other changes."""
    data = config.data_set.key if config.data_set else _slug(config.data.resolve().name)
    first = 0 if config.init_classes == config.increment else config.init_classes
    kind, colon, place = config.backbone.partition(":")
    local = {"local-dir": Path(place).name, "config": f"{Path(place).stem}-random"}
    weights = local.get(kind, config.backbone) if colon else config.backbone
    in_name = ("method", "backbone", "seed", "order_seed", "init_classes", "increment")
    rest = {key: here for key, (_, here) in changes(config).items() if key not in in_name}
    tag = hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()[:6]
    parts = [f"{data}_B{first}_Inc{config.increment}", config.method, _slug(weights), f"seed{config.seed}"]
    order = [f"order{config.order_seed}"] if config.order_seed != RunConfig.order_seed else []
    return "-".join([*parts, *order, *([tag] if rest else [])])


def _shown(value: object) -> str:
    if isinstance(value, list):
        more = f" and {len(value) - 1} more" if len(value) > 1 else ""
        return f"{json.dumps(value[0])}{more}"
    return value if isinstance(value, str) and value and " " not in value else json.dumps(value)


def _slug(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._]+", "-", name)[:60].strip("-.") or "data"
