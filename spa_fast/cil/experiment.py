"""A run made ready: every input checked, backbone loaded, tasks laid out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from spa_fast._backends import resolve_patches
from spa_fast.cil.backbone import Backbone
from spa_fast.cil.data.cache import FeatureCache
from spa_fast.cil.data.datasets import ImageFolders, read_image_folders
from spa_fast.cil.data.images import check_images, relative_name, stamp
from spa_fast.cil.data.layout import short
from spa_fast.cil.data.order import class_order, split_tasks
from spa_fast.cil.data.shards import digest
from spa_fast.cil.data.stream import TaskStream
from spa_fast.cil.descriptions.lengths import fit_lengths
from spa_fast.cil.descriptions.lint import read_descriptions
from spa_fast.cil.descriptions.readers import fingerprint
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


def prepare(
    config: RunConfig,
    cache_folder: Path,
    backbone: Backbone | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Experiment:
    """Check every input, cheapest first, and load the backbone; no training, no features.

    Raises:
        RunError: naming the file, class or argument at fault.
        OSError: features are missing and the cache cannot be written.
    """
    data = read_data(config)
    tasks = split_tasks(len(data.folders), config.init_classes, config.increment)
    descriptions = None
    if config.reads_descriptions:
        if config.description_file is None:
            raise RunError(
                f"--descriptions: {config.method} needs a file of class-wise descriptions: "
                "`spa-fast describe` has a model write one, or uses none with --from-template"
            )
        # Packaged files may hold more classes than the published subset.
        packaged = config.descriptions is None
        descriptions = read_descriptions(config.description_file, data.names, subset=packaged)
    backbone = backbone or load_backbone(config.backbone, transform=config.transform, device=config.device)
    if descriptions:
        limit = backbone.model.context_length
        descriptions = fit_lengths(data.names, descriptions, config.spa, backbone.tokenizer, limit, say)
    check_patches(config, backbone, descriptions or [])
    source, storage = config.spa.patch_source, config.storage
    cache = FeatureCache(cache_folder, data, backbone, source=source, storage=storage, say=say)
    missing = cache.missing()
    if missing:
        cache.check_writable()
    if odd := check_images(missing):
        named = short([relative_name(image, data.root) for image in odd])
        say(f"warning: {len(odd)} images too small or too large for photographs, used as they are: {named}")
    n = len(data.folders)
    order = class_order(n, config.order_seed) if config.shuffle else list(range(n))
    stream = TaskStream(cache, order, tasks, descriptions, config.templates, config.spa)
    return Experiment(config, data, backbone, cache, order, stream)


def read_data(config: RunConfig) -> ImageFolders:
    """The images that the settings name, listed and checked.

    Raises:
        RunError: as `read_image_folders`.
    """
    return read_image_folders(
        config.data,
        config.classnames,
        data_set=config.data_set,
        classes=config.classes,
        image_list=config.image_list,
        exclude=config.exclude,
    )


def input_hashes(config: RunConfig, data: ImageFolders, weights: str) -> dict[str, str | None]:
    """What figures depend on beside the settings: weights, descriptions, and the data set by class names,
    image names and sizes, which do not change when it is copied.

    Args:
        config: settings of the run.
        data: its images.
        weights: the backbone's fingerprint.
    """
    file = config.description_file
    images = {
        split: [[(relative_name(image, data.root), stamp(image)[1]) for image in found] for found in classes]
        for split, classes in data.images.items()
    }
    return {
        "backbone_fingerprint": weights,
        "descriptions_sha256": fingerprint(file) if file else None,
        "data_sha256": digest([data.names, images]),
    }


def check_patches(config: RunConfig, backbone: Backbone, descriptions: Sequence[Sequence[str]]) -> None:
    """Refuse to keep more patches than the image tower has, or a backend that cannot select them here."""
    if config.method != "spa":
        return
    spa, most = config.spa, backbone.n_patches
    if spa.k > most:
        raise RunError(f"--k: expected at most the backbone's {most} patches, got {spa.k}")
    n_tokens = max(map(len, descriptions), default=0)
    n_tokens *= spa.word_limit if spa.semantic_tokens == "token_level" else 1
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
