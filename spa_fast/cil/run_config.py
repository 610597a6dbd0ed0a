"""Settings of one run: data, backbone, method and protocol."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from spa_fast.cil.backbone import Transform
from spa_fast.cil.config import SpaConfig, check_keys, check_range, check_types
from spa_fast.cil.data.cache import CacheDtype, CacheKey, Storage
from spa_fast.cil.data.catalog import DataSet, description_file, find_data_set
from spa_fast.cil.errors import RunError

MethodName = Literal["spa", "zero_shot", "simple_cil"]

_PATHS = ("data", "descriptions", "classnames", "image_list", "exclude", "cache")


@dataclass(frozen=True)
class RunConfig:
    """What a run is made of."""

    data: Path
    """Folder with train/CLASS/* and test/CLASS/* (or val/CLASS/*) images."""
    backbone: str
    """MODEL/PRETRAINED of open_clip (ViT-B-16/laion400m_e32), local-dir:FOLDER, config:FILE (random)."""
    descriptions: Path | None = None
    """JSON file of class-wise descriptions; spa and zero_shot by descriptions need it; presets bring one."""
    classnames: Path | None = None
    """JSON file {folder: class name}, or names in folder order; without it a preset's label names, else
    folder names."""
    preset: str = ""
    """DATASET_Bm_Incn, for example cub_B0_Inc20: the data set and where the settings start from."""
    classes: int = 0
    """Class folders that the data set must have; 0 takes any number."""
    image_list: Path | None = None
    """Text file naming the images: a line `train`, paths inside the data folder, a line `test`, paths."""
    exclude: Path | None = None
    """Text file of images to leave out, one path inside the data folder per line."""
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
    shuffle: bool = True
    """Classes arrive in the order drawn from order_seed, or in folder order."""
    seed: int = 1
    """Seed of training: batches, pseudo-features, initialisation."""
    templates: tuple[str, ...] = ("a photo of a {}.",)
    """Prompt templates; training uses the first, evaluation the mean of all. Or one JSON file of them:
    a list, or {data set: list}."""
    transform: Transform = "openclip"
    """Preprocessing: the model's own, or LAMDA's squash to a square."""
    cache: Path | None = None
    """Folder of extracted features; default `feature_cache` beside the run folder."""
    cache_patches: str = "all"
    """Patches stored per image: all, or topk:K for the K closest to the global token (approximate)."""
    cache_dtype: CacheDtype = "float16"
    """Number format of stored patches."""
    cache_key: CacheKey = "stat"
    """How images are known again: by path, size and time (never opened again), or by content."""
    device: str = "cpu"
    """cpu or cuda: where the encoders run; training is on the CPU."""
    spa: SpaConfig = field(default_factory=SpaConfig)
    """Settings of spa."""

    def __post_init__(self) -> None:
        check_types(self)
        check_range(self, "order_seed", 0, 2**32)
        check_range(self, "classes", 0)
        self._check_stored_patches()
        check_range(self, "seed", 0, 2**63)
        if self.preset:
            find_data_set(self.preset.partition("_")[0], "--preset")
        if not self.templates or any("{}" not in template for template in self.templates):
            got = list(self.templates)
            raise RunError(f"--templates: expected texts with {{}} for the class name, got {got}")

    def _check_stored_patches(self) -> None:
        """Refuse settings that choose among more patches than are stored."""
        limit = self.storage.limit
        if not limit or self.method != "spa" or not self.spa.local_branch:
            return
        if self.spa.k > limit:
            raise RunError(f"--k: {self.spa.k} patches kept of the {limit} stored by {self.cache_patches}")
        if self.spa.selection_space == "projected":
            got = self.cache_patches
            raise RunError(f"--selection-space: projected needs --cache-patches all, got {got}")

    @property
    def storage(self) -> Storage:
        """What the feature cache stores."""
        return Storage(self.cache_patches, self.cache_dtype, self.cache_key)

    @property
    def reads_descriptions(self) -> bool:
        """Whether the method uses class-wise descriptions."""
        return self.method == "spa" or (self.method == "zero_shot" and self.zero_shot_texts == "descriptions")

    @property
    def data_set(self) -> DataSet | None:
        """The known data set that the preset names."""
        return find_data_set(self.preset.partition("_")[0], "--preset") if self.preset else None

    @property
    def description_file(self) -> Path | None:
        """The descriptions in use: the file given, else those packaged for the data set."""
        if not self.reads_descriptions:
            return None
        packaged = description_file(self.data_set) if self.data_set else None
        return self.descriptions or packaged

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
