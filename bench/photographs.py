"""Images and an encoder for the stages before training: real ones where the checkout has them beside it."""

from __future__ import annotations

import json
import zipfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np

from spa_fast.cil.backbone import Backbone
from spa_fast.cil.demo.creatures import render
from spa_fast.cil.demo.world import CLASSES
from spa_fast.cil.loading import load_backbone

DATA = Path(__file__).parents[1] / ".." / "shared" / "data"
# Images of each class by split; size of the generated ones, the usual one of Caltech-101.
CLASS_COUNT, COUNTS, SIZE = 6, {"train": 4, "test": 2}, (300, 200)
# DeiT-Ti/16 with a text tower of 2 blocks: the same shapes, weights from seed 0.
VISION = {"image_size": 224, "layers": 12, "width": 192, "head_width": 64, "patch_size": 16}
TEXT = {"context_length": 32, "vocab_size": 49408, "width": 192, "heads": 3, "layers": 2}


@dataclass(frozen=True)
class Photographs:
    """An image folder with descriptions, and the encoder that reads it."""

    data: Path
    descriptions: Path
    backbone: Backbone
    about: str

    @property
    def n(self) -> int:
        """Images, both splits."""
        return CLASS_COUNT * sum(COUNTS.values())


def photographs(folder: Path) -> Photographs:
    """Images in `folder`, photographs where there are any."""
    archive, encoder = DATA / "caltech101.zip", DATA / "deit_tiny_clip"
    if archive.is_file() and encoder.is_dir():
        names = _photographed(archive, folder / "data")
        backbone = load_backbone(f"local-dir:{encoder}")
        about = "photographs of Caltech-101, DeiT-Ti/16 at 224 px"
    else:
        names = _drawn(folder / "data")
        config = folder / "encoder.json"
        config.write_text(json.dumps({"embed_dim": 192, "vision_cfg": VISION, "text_cfg": TEXT}))
        backbone = load_backbone(f"config:{config}")
        about = "generated images, ViT-Ti/16 at 224 px with random weights"
    descriptions = folder / "descriptions.json"
    parts = ("head", "body", "edge", "colour", "surface", "outline")
    classes = [{"name": name, "descriptions": [f"{part} of {name}" for part in parts]} for name in names]
    descriptions.write_text(json.dumps({"dataset": "photographs", "classes": classes}))
    return Photographs(folder / "data", descriptions, backbone, about)


def _photographed(archive: Path, folder: Path) -> list[str]:
    """The first classes and images by name; class names in folder order."""
    with zipfile.ZipFile(archive) as packed:
        images = [PurePosixPath(name) for name in sorted(packed.namelist()) if name.endswith(".jpg")]
        folders = sorted({image.parts[1] for image in images})[:CLASS_COUNT]
        for split, count in COUNTS.items():
            for name in folders:
                own = [image for image in images if image.parts[:2] == (split, name)]
                for image in own[:count]:
                    packed.extract(str(image), folder)
    return [name.replace("_", " ") for name in folders]


def _drawn(folder: Path) -> list[str]:
    """Creatures enlarged, as JPEG."""
    names = sorted(CLASSES)[:CLASS_COUNT]
    rng = np.random.default_rng(0)
    for split, count in COUNTS.items():
        for name in names:
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                render(CLASSES[name], rng).resize(SIZE).save(folder / split / name / f"{i}.jpg", quality=90)
    return names
