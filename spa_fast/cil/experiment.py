"""A run made ready: every input checked, backbone loaded, tasks laid out."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from spa_fast._backends import resolve_patches
from spa_fast.cil.backbone import Backbone
from spa_fast.cil.data.cache import FeatureCache
from spa_fast.cil.data.datasets import ImageFolders, check_images, read_image_folders
from spa_fast.cil.data.order import class_order, split_tasks
from spa_fast.cil.data.stream import TaskStream
from spa_fast.cil.descriptions.schema import read_descriptions
from spa_fast.cil.errors import RunError
from spa_fast.cil.loading import load_backbone
from spa_fast.cil.methods.base import Method
from spa_fast.cil.methods.simple_cil import SimpleCil
from spa_fast.cil.methods.spa import Spa
from spa_fast.cil.methods.zero_shot import ZeroShot
from spa_fast.cil.run_config import RunConfig


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
    data = read_image_folders(config.data, config.classnames)
    tasks = split_tasks(len(data.folders), config.init_classes, config.increment)
    descriptions = None
    if config.reads_descriptions:
        if config.descriptions is None:
            raise RunError(f"--descriptions: {config.method} needs a file of class-wise descriptions")
        descriptions = read_descriptions(config.descriptions, data.names)
    backbone = backbone or load_backbone(config.backbone, transform=config.transform, device=config.device)
    check_patches(config, backbone)
    cache = FeatureCache(cache_folder, data, backbone, source=config.spa.patch_source)
    missing = cache.missing()
    if missing:
        cache.check_writable()
    check_images(missing)
    order = class_order(len(data.folders), config.order_seed)
    stream = TaskStream(cache, backbone, order, tasks, descriptions, config.templates, config.spa)
    return Experiment(config, data, backbone, cache, order, stream)


def check_patches(config: RunConfig, backbone: Backbone) -> None:
    """Refuse to keep more patches than the image tower has, or a backend that cannot select them here."""
    if config.method != "spa":
        return
    spa, most = config.spa, backbone.n_patches
    if spa.k > most:
        raise RunError(f"--k: expected at most the backbone's {most} patches, got {spa.k}")
    n_tokens = spa.word_limit if spa.semantic_tokens == "token_level" else spa.n_descriptions
    try:
        aligned = spa.k if spa.solver == "sinkhorn" else None
        resolve_patches(spa.backend, (torch.empty(0, most, 1), torch.empty(0, n_tokens, 1)), aligned)
    except RuntimeError as error:
        raise RunError(f"--backend: {error}") from error


def make_method(config: RunConfig, backbone: Backbone) -> Method:
    """The method named in the settings, not yet trained."""
    if config.method == "zero_shot":
        return ZeroShot(config.zero_shot_texts)
    if config.method == "simple_cil":
        return SimpleCil()
    return Spa(config.spa, backbone.width, backbone.logit_scale, config.seed)
