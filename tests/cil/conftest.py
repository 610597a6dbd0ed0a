"""A tiny backbone and a tiny data set of flat-coloured images, so that everything runs in seconds."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from spa_fast.cil.loading import load_backbone

CLASSES = ("amber", "blue", "coral", "dark_red", "emerald", "fuchsia", "gold")
COLOURS = (
    (255, 190, 0),
    (0, 0, 255),
    (255, 120, 80),
    (139, 0, 0),
    (80, 200, 120),
    (255, 0, 255),
    (212, 175, 55),
)


@pytest.fixture(scope="session")
def backbone_config(tmp_path_factory):
    """An open_clip config of a 2-block ViT with 16 patches; weights are random."""
    path = tmp_path_factory.mktemp("backbone") / "tiny.json"
    vision = {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8}
    text = {"context_length": 24, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
    path.write_text(json.dumps({"embed_dim": 24, "vision_cfg": vision, "text_cfg": text}))
    return path


@pytest.fixture(scope="session")
def backbone(backbone_config):
    return load_backbone(f"config:{backbone_config}")


def write_images(folder: Path, classes=CLASSES, train: int = 6, test: int = 3) -> Path:
    """Noisy flat images, one colour a class."""
    rng = np.random.default_rng(0)
    for split, count in (("train", train), ("test", test)):
        for name in classes:
            colour = COLOURS[CLASSES.index(name)]
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = np.clip(np.array(colour) + rng.normal(0, 60, (40, 48, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / split / name / f"{i}.png")
    return folder


def write_descriptions(path: Path, names) -> Path:
    classes = [
        {"name": n, "descriptions": [f"surface of {n}", f"plain {n} area", f"{n} edge"]} for n in names
    ]
    path.write_text(json.dumps({"dataset": "colours", "classes": classes}))
    return path


@pytest.fixture
def colours(tmp_path):
    """Data folder and descriptions file."""
    names = [c.replace("_", " ") for c in CLASSES]
    return write_images(tmp_path / "colours"), write_descriptions(tmp_path / "descriptions.json", names)
