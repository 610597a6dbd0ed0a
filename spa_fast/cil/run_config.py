"""Settings of one run: data, backbone, method and protocol."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from spa_fast.cil.backbone import Transform
from spa_fast.cil.config import SpaConfig, check_keys, check_range, check_types
from spa_fast.cil.errors import RunError

MethodName = Literal["spa", "zero_shot", "simple_cil"]

_PATHS = ("data", "descriptions", "classnames", "cache")


@dataclass(frozen=True)
class RunConfig:
    """What a run is made of."""

    data: Path
    """Folder with train/CLASS/* and test/CLASS/* (or val/CLASS/*) images."""
    backbone: str
    """MODEL/PRETRAINED of open_clip (ViT-B-16/laion400m_e32), local-dir:FOLDER, config:FILE (random)."""
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
    """cpu or cuda: where the encoders run; training is on the CPU."""
    spa: SpaConfig = field(default_factory=SpaConfig)
    """Settings of spa."""

    def __post_init__(self) -> None:
        check_types(self)
        check_range(self, "order_seed", 0, 2**32)
        check_range(self, "seed", 0, 2**63)
        if not self.templates or any("{}" not in template for template in self.templates):
            got = list(self.templates)
            raise RunError(f"--templates: expected texts with {{}} for the class name, got {got}")

    @property
    def reads_descriptions(self) -> bool:
        """Whether the method uses class-wise descriptions."""
        return self.method == "spa" or (self.method == "zero_shot" and self.zero_shot_texts == "descriptions")

    def absolute(self) -> RunConfig:
        """The same run, named so that it can be found from any folder."""
        paths = {name: getattr(self, name) for name in _PATHS}
        found = {name: path.resolve() for name, path in paths.items() if path}
        kind, colon, rest = self.backbone.partition(":")
        backbone = f"{kind}:{Path(rest).resolve()}" if colon else self.backbone
        return dataclasses.replace(self, backbone=backbone, **found)

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        values = dataclasses.asdict(self)
        values["templates"] = list(self.templates)
        return {key: str(v) if isinstance(v, Path) else v for key, v in values.items()}

    @classmethod
    def from_dict(cls, values: Any) -> RunConfig:
        """Inverse of `as_dict`.

        Raises:
            RunError: unknown or missing key, wrong type, value out of range.
        """
        if not isinstance(values, dict) or not isinstance(values.get("spa"), dict):
            raise RunError("config: expected an object with the settings of a run and of spa")
        check_keys(cls, values)
        values = {**values, "spa": SpaConfig.from_dict(values["spa"])}
        for name in _PATHS:
            if isinstance(values.get(name), str):
                values[name] = Path(values[name])
        if isinstance(values.get("templates"), list):
            values["templates"] = tuple(values["templates"])
        for name in ("data", "backbone"):
            if name not in values:
                raise RunError(f"config: missing key {name!r}")
        return cls(**values)
