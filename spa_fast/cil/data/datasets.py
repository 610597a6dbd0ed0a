"""A data set ready to be learned from: every class has images in both splits and one name of its own."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from spa_fast.cil.data.catalog import DataSet
from spa_fast.cil.data.images import ImageRef
from spa_fast.cil.data.labels import class_names
from spa_fast.cil.data.layout import Split, list_images, short
from spa_fast.cil.errors import RunError


@dataclass(frozen=True)
class ImageFolders:
    """Images of a data set by class; holds no pixels.

    Attributes:
        root: the data folder.
        folders: class folder names in sorted order.
        names: the class name used in prompts, one per folder.
        images: split -> per class the sorted images.
        left_out: images that an exclusion list removed.
    """

    root: Path
    folders: tuple[str, ...]
    names: tuple[str, ...]
    images: dict[Split, tuple[tuple[ImageRef, ...], ...]]
    left_out: int = 0


def read_image_folders(
    root: Path,
    classnames: Path | None = None,
    *,
    data_set: DataSet | None = None,
    classes: int = 0,
    image_list: Path | None = None,
    exclude: Path | None = None,
) -> ImageFolders:
    """List a data set and check it: both splits, equal class lists, no class without images.

    Args:
        root: folder with `train/` and one of `test/`, `val/`; or CIFAR-100's three files.
        classnames: JSON file {folder: class name}; without it the known data set's label names, or folder
            names with `_` read as a blank.
        data_set: the known data set that this is.
        classes: class folders there must be; 0 takes any number.
        image_list: text file naming the images of each split, in place of the tree.
        exclude: text file of images to leave out.

    Raises:
        RunError: naming the folder, class or file at fault.
    """
    listing = list_images(root, image_list, exclude)
    train, test, tests = listing.images["train"], listing.images["test"], listing.test_name
    if listing.strays:
        raise RunError(f"--data: not an image file: {listing.strays[0]}; move it out of the data set")
    if list(train) != list(test):
        only = [short(sorted(set(a) - set(b))) for a, b in ((train, test), (test, train))]
        raise RunError(
            f"--data: {root}: class lists differ; only in train: {only[0]}; only in {tests}: {only[1]}"
        )
    for where, found in (("train", train), (tests, test)):
        for folder, images in found.items():
            if not images:
                raise RunError(f"--data: class without images: {root / where / folder}")
    folders = tuple(train)
    names = class_names(folders, classnames, data_set, classes)
    if classes and len(folders) != classes:
        raise RunError(
            f"--data: {root}: expected {classes} class folders, found {len(folders)}; see --classes"
        )
    for name in names:
        if names.count(name) > 1:
            same = [folder for folder, n in zip(folders, names, strict=True) if n == name]
            raise RunError(f"--data: {root}: class name {name!r} stands for {short(same)}; use --classnames")
    by_class = {split: tuple(map(tuple, found.values())) for split, found in listing.images.items()}
    return ImageFolders(root, folders, names, by_class, listing.left_out)
