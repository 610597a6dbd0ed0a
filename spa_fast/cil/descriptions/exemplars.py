"""The images of a class that a model is shown."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

from spa_fast.cil.data.cache import FeatureCache
from spa_fast.cil.data.datasets import ImageFolders
from spa_fast.cil.data.images import ImageRef, read_image
from spa_fast.cil.descriptions.describe_config import DescribeConfig
from spa_fast.cil.descriptions.select import select_exemplars
from spa_fast.cil.loading import load_backbone

# Long side in pixels of the images that are sent: what vision models look at in low detail.
SIDE = 512


def chooser(
    config: DescribeConfig, data: ImageFolders, cache: Path, say: Callable[[str], None]
) -> Callable[[int], list[ImageRef]]:
    """Chooses the images of a class by its index; features are extracted now, into `cache`.

    Args:
        config: how many images, by which encoder's features.
        data: the image folders.
        cache: folder of extracted features.
        say: takes one line at a time on what is extracted.
    """
    if not config.exemplars:
        return lambda index: []
    features = FeatureCache(cache, data, load_backbone(config.backbone, device=config.device), say=say)
    features.fill("train")

    def choose(index: int) -> list[ImageRef]:
        points = features.load("train", index).globals
        rows = select_exemplars(points, config.exemplars, config.exemplar_selection)
        return [data.images["train"][index][row] for row in rows]

    return choose


def jpeg(image: ImageRef) -> bytes:
    """The image as it is sent: upright, small, without its metadata (place, time, camera)."""
    picture = read_image(image)
    picture.thumbnail((SIDE, SIDE))
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=90, exif=b"")
    return file.getvalue()
