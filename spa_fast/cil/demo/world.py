"""The embedded benchmark: 25 classes of creatures with invented names, described by their parts.

A class is one full combination of attributes. Classes come in families of five which share colour and
pattern: the first, and four relatives which each differ from it in one part (ears, horns, tail or legs) and
from each other in two. So colour finds the family, and only the small parts find the class.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from spa_fast.cil.demo.creatures import SIZE, render
from spa_fast.cil.demo.vocabulary import ATTRIBUTES, PARTS, Attributes

__all__ = ["CLASSES", "contact_sheet", "descriptions", "is_class_combination", "render", "write_dataset"]

# Classes of a family.
FAMILY = 5

# Colour and pattern of a family; then name and indices of ears, horns, tail and legs of its members.
_FAMILIES = (
    ("crimson", "stripes", "zelmur 0000 drovik 2000 quenob 0100 plurga 0030 wistrel 0002"),
    ("amber", "spots", "tarbun 1231 yimpol 3231 gresko 1331 foldwen 1211 cazzim 1233"),
    ("green", "plain", "brindok 2312 ulmetta 1312 skivorn 2212 hobblit 2302 pernaq 2310"),
    ("azure", "belly", "jostrel 3123 malvix 0123 orbisk 3023 trunvel 3113 velkot 3121"),
    ("violet", "spots", "nixaro 0221 krellup 2221 fenduvo 0321 glimmox 0231 sarquin 0220"),
)


def _classes() -> Iterator[tuple[str, dict[str, str]]]:
    for colour, pattern, members in _FAMILIES:
        words = members.split()
        for name, indices in zip(words[::2], words[1::2], strict=True):
            parts = {key: list(ATTRIBUTES[key])[int(i)] for key, i in zip(PARTS, indices, strict=True)}
            yield name, {"colour": colour, "pattern": pattern, **parts}


CLASSES: dict[str, dict[str, str]] = dict(_classes())


def is_class_combination(attributes: Attributes) -> bool:
    """Whether `attributes` is the full combination of one of `CLASSES`."""
    return dict(attributes) in CLASSES.values()


def descriptions(attributes: Attributes) -> list[str]:
    """Six short texts, one per attribute, that hold for every creature with these attributes."""
    return [ATTRIBUTES[key][value][0] for key, value in attributes.items()]


def write_dataset(folder: Path, seed: int, train_per_class: int, test_per_class: int) -> None:
    """Write the 25 classes as an image folder with class names and descriptions.

    Layout: `train/<name>/*.png`, `test/<name>/*.png`, `names.json` (folder to class name) and
    `descriptions.json`. Every image has a generator of its own, seeded by `seed`, split, class and number.
    """
    for split, (part, count) in enumerate((("train", train_per_class), ("test", test_per_class))):
        for index, (name, attributes) in enumerate(CLASSES.items()):
            target = folder / part / name
            target.mkdir(parents=True, exist_ok=True)
            for i in range(count):
                image = render(attributes, np.random.default_rng((seed, split, index, i)))
                image.save(target / f"{i:03d}.png", compress_level=1)
    _write_json(folder / "names.json", {name: name for name in CLASSES})
    classes = [{"name": name, "descriptions": descriptions(a)} for name, a in CLASSES.items()]
    _write_json(folder / "descriptions.json", {"dataset": "creatures", "classes": classes})


def contact_sheet(per_class: int, seed: int) -> Image.Image:
    """A row of creatures a family, `per_class` of each of its classes side by side."""
    sheet = Image.new("RGB", (FAMILY * per_class * SIZE, len(CLASSES) // FAMILY * SIZE))
    for index, attributes in enumerate(CLASSES.values()):
        row, member = divmod(index, FAMILY)
        for i in range(per_class):
            picture = render(attributes, np.random.default_rng((seed, index, i)))
            sheet.paste(picture, ((member * per_class + i) * SIZE, row * SIZE))
    return sheet


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n")
