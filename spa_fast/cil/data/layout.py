"""What lies where: train and test images of every class folder, listed but not judged.

Layouts: `train/CLASS/*` and `test/CLASS/*` or `val/CLASS/*`; such a tree described by a list file; CIFAR-100.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Literal

from spa_fast.cil.data.cifar import is_cifar, read_cifar
from spa_fast.cil.data.images import IMAGE_SUFFIXES, ImageRef, relative_name
from spa_fast.cil.errors import RunError

Split = Literal["train", "test"]
_SPLITS: dict[str, Split] = {"train": "train", "test": "test", "val": "test"}


@dataclass
class Listing:
    """Images found, by split and class folder, both sorted.

    Attributes:
        images: split -> {folder: images}.
        strays: entries of class folders that are no image files.
        left_out: images that an exclusion list removed.
        test_name: the test split's folder, `test` or `val`.
    """

    images: dict[Split, dict[str, list[ImageRef]]]
    strays: list[Path] = field(default_factory=list)
    left_out: int = 0
    test_name: str = "test"


def list_images(root: Path, image_list: Path | None = None, exclude: Path | None = None) -> Listing:
    """List a data set.

    Args:
        root: its folder.
        image_list: text file that names the images of each split; see `read_image_list`.
        exclude: text file of images to leave out, one path inside `root` per line.

    Raises:
        RunError: no folder, no or too many splits, or a list that cannot be read.
    """
    if not root.is_dir():
        raise RunError(f"--data: no such folder: {root}")
    if image_list:
        listing = Listing(read_image_list(image_list, root))
    elif is_cifar(root):
        names, splits = read_cifar(root)
        train, test = (
            dict(zip(names, map(list[ImageRef], splits[s]), strict=True)) for s in ("train", "test")
        )
        listing = Listing({"train": train, "test": test})
    else:
        listing = _list_folders(root)
    if exclude:
        _leave_out(listing, root, exclude)
    return listing


def split_folders(root: Path) -> tuple[str, str]:
    """The names of the two split folders of a tree.

    Raises:
        RunError: naming what is missing or double.
    """
    tests = [name for name in ("test", "val") if (root / name).is_dir()]
    if not (root / "train").is_dir() or not tests:
        raise RunError(f"--data: {root}: expected train/ and test/ (or val/) inside, found {_listing(root)}")
    if len(tests) == 2:
        raise RunError(f"--data: {root} has both test/ and val/; keep the one to evaluate on")
    return "train", tests[0]


def read_image_list(path: Path, root: Path) -> dict[Split, dict[str, list[ImageRef]]]:
    """Read a list of images: a line `train`, paths inside `root`, a line `test` (or `val`), more paths.

    The class of an image is the folder it lies in. Without such lines the paths themselves start with
    `train/`, `test/` or `val/`.

    Raises:
        RunError: unreadable file, a path that leaves `root`, that has no split or no class, or appears twice.
    """
    images: dict[Split, dict[str, list[ImageRef]]] = {"train": {}, "test": {}}
    current: str | None = None
    tests, seen = set(), set()
    for number, line in enumerate(_lines(path, "--image-list"), 1):
        if line.rstrip(":").lower() in _SPLITS:
            current = line.rstrip(":").lower()
            continue
        where = f"--image-list: {path}, line {number}"
        parts = _inside(line, where)
        split = current or parts[0]
        if split not in _SPLITS:
            raise RunError(f"{where}: expected a line 'train' or 'test' before {line!r}")
        if len(parts) < (2 if current else 3):
            raise RunError(f"{where}: expected CLASS/IMAGE, got {line!r}")
        if line in seen:
            raise RunError(f"{where}: {line!r} is listed twice")
        seen.add(line)
        if split != "train":
            tests.add(split)
        images[_SPLITS[split]].setdefault(parts[-2], []).append(root.joinpath(*parts))
    if len(tests) == 2:
        raise RunError(f"--image-list: {path} has both test and val images; keep those to evaluate on")
    for name, classes in images.items():
        if not classes:
            raise RunError(f"--image-list: {path}: no {name} images")
    return {
        split: {folder: sorted(found, key=str) for folder, found in sorted(classes.items())}
        for split, classes in images.items()
    }


def short(names: Sequence[str], most: int = 5) -> str:
    """The first few names and how many more there are."""
    more = f" (+{len(names) - most} more)" if len(names) > most else ""
    return ", ".join(names[:most]) + more or "none"


def _list_folders(root: Path) -> Listing:
    names = split_folders(root)
    listing = Listing({}, test_name=names[1])
    for name in names:
        classes: dict[str, list[ImageRef]] = {}
        for folder in _visible(root / name):
            if not folder.is_dir():
                continue
            images = classes.setdefault(folder.name, [])
            for entry in _visible(Path(folder)):
                if os.path.splitext(entry.name)[1].lower() in IMAGE_SUFFIXES and entry.is_file():
                    images.append(Path(entry.path))
                else:
                    listing.strays.append(Path(entry.path))
        if not classes:
            raise RunError(f"--data: no class folders in {root / name}")
        listing.images[_SPLITS[name]] = classes
    return listing


def _visible(folder: Path) -> list[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        return sorted((e for e in entries if not e.name.startswith(".")), key=lambda entry: entry.name)


def _leave_out(listing: Listing, root: Path, path: Path) -> None:
    unwanted = {"/".join(_inside(line, f"--exclude: {path}")) for line in _lines(path, "--exclude")}
    found = set()

    def keep(image: ImageRef) -> bool:
        name = relative_name(image, root)
        if name in unwanted:
            found.add(name)
        return name not in unwanted

    for classes in listing.images.values():
        for folder, images in classes.items():
            classes[folder] = [image for image in images if keep(image)]
    listing.strays = [stray for stray in listing.strays if keep(stray)]
    listing.left_out = len(found)
    if unwanted - found:
        raise RunError(f"--exclude: {path}: not in {root}: {short(sorted(unwanted - found))}")


def _lines(path: Path, argument: str) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise RunError(f"{argument}: {path}: cannot be read: {error}") from error
    return [line.strip() for line in text.splitlines() if line.strip()]


def _inside(line: str, where: str) -> tuple[str, ...]:
    parts = PurePosixPath(line).parts
    if not parts or line.startswith("/") or ".." in parts or "\0" in line:
        raise RunError(f"{where}: expected a path inside the data folder, got {line!r}")
    return parts


def _listing(folder: Path) -> str:
    return short(sorted(p.name for p in folder.iterdir())).replace("none", "nothing")
