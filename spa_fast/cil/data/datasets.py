"""Image folders on disk: `train/CLASS/*` and `test/CLASS/*` (or `val/`); class i = i-th folder, sorted."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from PIL import Image, ImageOps
from tqdm import tqdm

from spa_fast.cil.errors import RunError, did_you_mean
from spa_fast.cil.json_input import read_json

Split = Literal["train", "test"]
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".jfif", ".png", ".avif", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm"}


@dataclass(frozen=True)
class ImageFolders:
    """Paths of a data set; holds no pixels.

    Attributes:
        root: the data folder.
        folders: class folder names in sorted order.
        names: the class name used in prompts, one per folder.
        images: split -> per class the sorted image paths.
    """

    root: Path
    folders: tuple[str, ...]
    names: tuple[str, ...]
    images: dict[Split, tuple[tuple[Path, ...], ...]]


def read_image_folders(root: Path, classnames: Path | None = None) -> ImageFolders:
    """List a data set and check it: both splits, equal class lists, no class without images.

    Args:
        root: folder with `train/` and one of `test/`, `val/`.
        classnames: JSON file {folder: class name}; without it folder names, `_` read as a blank, are used.

    Raises:
        RunError: naming the folder, class or file at fault.
    """
    if not root.is_dir():
        raise RunError(f"--data: no such folder: {root}")
    tests = [name for name in ("test", "val") if (root / name).is_dir()]
    if not (root / "train").is_dir() or not tests:
        raise RunError(f"--data: {root}: expected train/ and test/ (or val/) inside, found {_listing(root)}")
    if len(tests) == 2:
        raise RunError(f"--data: {root} has both test/ and val/; keep the one to evaluate on")
    train, test = _class_folders(root / "train"), _class_folders(root / tests[0])
    if list(train) != list(test):
        only = [_short(sorted(set(a) - set(b))) for a, b in ((train, test), (test, train))]
        raise RunError(
            f"--data: {root}: class lists differ; only in train: {only[0]}; only in {tests[0]}: {only[1]}"
        )
    folders = tuple(train)
    names = (
        _read_classnames(classnames, folders) if classnames else tuple(f.replace("_", " ") for f in folders)
    )
    for name in names:
        if names.count(name) > 1:
            same = [folder for folder, n in zip(folders, names, strict=True) if n == name]
            raise RunError(f"--data: {root}: class name {name!r} stands for {_short(same)}; use --classnames")
    return ImageFolders(root, folders, names, {"train": tuple(train.values()), "test": tuple(test.values())})


def check_images(paths: Iterable[Path]) -> None:
    """Decode every image once, coarsely, so that a broken file is found before any long work.

    Raises:
        RunError: naming the first unreadable file.
    """
    for path in tqdm(list(paths), desc="checking images", unit="img", leave=False, disable=None):
        with _opened(path) as image:
            image.draft("RGB", (32, 32))
            image.load()


def read_image(path: Path) -> Image.Image:
    """An image in RGB, turned upright as its EXIF data say.

    Raises:
        RunError: unreadable file, or pixels of more than 8 bits a channel.
    """
    with _opened(path) as image:
        return ImageOps.exif_transpose(image).convert("RGB")


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    try:
        with Image.open(path) as image:
            if image.mode[0] in "IF":
                raise ValueError(f"pixels of mode {image.mode}: convert them to 8 bits a channel")
            yield image
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise RunError(f"unreadable image: {path}: {error}") from error


def _class_folders(split: Path) -> dict[str, tuple[Path, ...]]:
    classes = {}
    for folder in sorted(
        (p for p in split.iterdir() if p.is_dir() and not p.name.startswith(".")), key=lambda p: p.name
    ):
        images = tuple(sorted(p for p in folder.iterdir() if not p.name.startswith(".")))
        for path in images:
            if path.suffix.lower() not in IMAGE_SUFFIXES or not path.is_file():
                raise RunError(f"--data: not an image file: {path}; move it out of the data set")
        if not images:
            raise RunError(f"--data: class without images: {folder}")
        classes[folder.name] = images
    if not classes:
        raise RunError(f"--data: no class folders in {split}")
    return classes


def _read_classnames(path: Path, folders: tuple[str, ...]) -> tuple[str, ...]:
    names = read_json(path, "--classnames")
    if not isinstance(names, dict) or not all(isinstance(v, str) and v.strip() for v in names.values()):
        raise RunError(f"--classnames: {path}: expected an object of folder: class name")
    for folder in folders:
        if folder not in names:
            raise RunError(
                f"--classnames: {path}: no name for folder {folder!r}{did_you_mean(folder, names)}"
            )
    for folder in names:
        if folder not in folders:
            hint = did_you_mean(folder, folders)
            raise RunError(f"--classnames: {path}: unknown folder {folder!r}{hint}")
    chosen = tuple(names[f].strip() for f in folders)
    return chosen


def _listing(folder: Path) -> str:
    return _short(sorted(p.name for p in folder.iterdir())) or "nothing"


def _short(names: list[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (f" (+{len(names) - most} more)" if len(names) > most else "") or "none"
