"""`spa-fast data check`: everything about a data set that would stop a run or make its figures wrong.

Only listings, file headers, the last bytes and, for suspects, whole files are read; no pixels are decoded.
"""

from __future__ import annotations

import hashlib
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from spa_fast.cil.data.catalog import (
    DATA_SETS,
    DataSet,
    expected_tree,
    find_data_set,
    find_folder,
    folder_names,
    folders_of,
)
from spa_fast.cil.data.images import ImageRef, StoredImage, relative_name
from spa_fast.cil.data.labels import class_names, match_labels
from spa_fast.cil.data.layout import Listing, Split, list_images
from spa_fast.cil.data.probe import probe
from spa_fast.cil.errors import RunError
from spa_fast.cil.findings import Findings, file_all
from spa_fast.cil.presets import parse_preset


@dataclass
class Report(Findings):
    """What was found in one data set.

    Attributes:
        unusable: images to leave out, relative to the folder.
    """

    unusable: list[str] = field(default_factory=list)


def check_all(
    presets: Sequence[str],
    data_root: Path | None,
    data: Path | None,
    classnames: Path | None,
    image_list: Path | None,
    quarantine: Path | None,
    say: Callable[[str], None],
) -> int:
    """Check one folder, or data sets under a root, print a table each; 1 if any has a fault, else 0.

    Raises:
        RunError: arguments that do not say what to check, or nothing there to check.
    """
    known = [_named(name) for name in presets]
    if data:
        if len(known) > 1:
            raise RunError("--preset: expected at most one beside --data")
        targets: list[tuple[Path, DataSet | None]] = [(data, known[0] if known else None)]
    elif data_root:
        targets = [(find_folder(data_root, data_set), data_set) for data_set in known]
        targets = targets or [*_under(data_root, say)]
    else:
        raise RunError("data check: expected --data FOLDER or --data-root FOLDER")
    if quarantine and len(targets) > 1:
        found = ", ".join(data_set.key for _, data_set in targets if data_set)
        raise RunError(f"--quarantine: expected one data set, got {found}: choose one by --preset")
    if quarantine and not quarantine.resolve().parent.is_dir():
        raise RunError(f"--quarantine: no such folder: {quarantine.resolve().parent}")
    reports = []
    for folder, data_set in targets:
        report = check(folder, data_set, classnames if data else None, image_list if data else None)
        for line in report.lines():
            say(line)
        reports.append(report)
    if quarantine:
        quarantine.write_text("".join(f"{name}\n" for name in reports[0].unusable), encoding="utf-8")
        say(f"{len(reports[0].unusable)} images listed in {quarantine}")
    bad = sum(bool(report.faults) for report in reports)
    say(f"{len(reports)} checked, {bad} with faults")
    return int(bad > 0)


def check(
    root: Path, data_set: DataSet | None, classnames: Path | None = None, image_list: Path | None = None
) -> Report:
    """Examine one data set."""
    start = time.perf_counter()
    report = Report(f"{data_set.key if data_set else 'data'} in {root}")
    try:
        listing = list_images(root, image_list)
    except RunError as error:
        report.faults["layout"].append(str(error))
        report.title += f": {expected_tree(root.parent, data_set) if data_set else 'not read'}"
        return report
    _check_classes(report, listing, data_set)
    _check_names(report, listing, data_set, classnames)
    _check_images(report, listing, root)
    train, test = listing.images["train"], listing.images["test"]
    images = f"{_count(train)} + {_count(test)} images"
    seconds = time.perf_counter() - start
    report.title += f": {len(set(train) | set(test))} classes, {images}, {seconds:.1f} s"
    return report


def _named(name: str) -> DataSet:
    try:
        return parse_preset(name)[0]
    except RunError:
        return find_data_set(name, "--preset")


def _under(root: Path, say: Callable[[str], None]) -> list[tuple[Path, DataSet]]:
    present = [data_set for data_set in DATA_SETS.values() if folders_of(root, data_set)]
    if not present:
        raise RunError(f"--data-root: {root} holds none of {', '.join(DATA_SETS)}")
    missing = [data_set.key for data_set in DATA_SETS.values() if data_set not in present]
    if missing:
        say(f"not in {root}: {', '.join(missing)}")
    return [(find_folder(root, data_set), data_set) for data_set in present]


def _check_classes(report: Report, listing: Listing, data_set: DataSet | None) -> None:
    train, test = listing.images["train"], listing.images["test"]
    file_all(report.faults, "class only in train", sorted(set(train) - set(test)))
    file_all(report.faults, f"class only in {listing.test_name}", sorted(set(test) - set(train)))
    for where, classes in (("train", train), (listing.test_name, test)):
        empty = [f"{where}/{folder}" for folder, images in classes.items() if not images]
        file_all(report.faults, "class without images", empty)
    if data_set is None:
        return
    folders = len(set(train) | set(test))
    if folders != data_set.classes:
        report.faults["number of classes"].append(f"expected {data_set.classes}, found {folders}")
    for where, classes, published in (("train", train, data_set.train), ("test", test, data_set.test)):
        found = _count(classes)
        if found != published:
            report.faults["number of images"].append(f"{where}: published {published}, found {found}")


def _check_names(report: Report, listing: Listing, data_set: DataSet | None, classnames: Path | None) -> None:
    folders = sorted(set(listing.images["train"]) | set(listing.images["test"]))
    try:
        names = class_names(folders, classnames, data_set, data_set.classes if data_set else 0)
    except RunError as error:
        report.faults["class names"].append(str(error))
        return
    twice = sorted({name for name in names if names.count(name) > 1})
    file_all(report.faults, "class name given twice", twice)
    if data_set and not classnames and not folder_names(data_set):
        unlike = match_labels(folders, names).unlike
        file_all(report.notes, "folder unlike its label", [f"{f} is {label}" for f, label in unlike])


def _check_images(report: Report, listing: Listing, root: Path) -> None:
    file_all(report.faults, "not an image file", [relative_name(path, root) for path in listing.strays])
    report.unusable += [relative_name(path, root) for path in listing.strays]
    alike: dict[tuple[int, bytes], list[tuple[Split, ImageRef]]] = defaultdict(list)
    pairs = [
        (split, image) for split, c in listing.images.items() for images in c.values() for image in images
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        for split, image in tqdm(pairs, desc="headers", unit="img", leave=False, disable=None):
            if isinstance(image, StoredImage):
                raw = image.pixels.tobytes()
                alike[len(raw), hashlib.sha256(raw).digest()].append((split, image))
                continue
            found = probe(image)
            for kind in found.notes:
                report.notes[kind].append(relative_name(image, root))
            if found.fault:
                kind, what = found.fault
                name = relative_name(image, root)
                report.faults[kind].append(f"{name}: {what}")
                report.unusable.append(name)
            else:
                alike[found.size, found.tail].append((split, image))
    for group in alike.values():
        if len({split for split, _ in group}) == 2:
            _check_alike(report, group, root)


def _check_alike(report: Report, group: list[tuple[Split, ImageRef]], root: Path) -> None:
    """File as duplicates the images of a group whose whole content is in both splits."""
    by_content: dict[bytes, list[tuple[Split, ImageRef]]] = defaultdict(list)
    for split, image in group:
        raw = image.read_bytes() if isinstance(image, Path) else image.pixels.tobytes()
        by_content[hashlib.sha256(raw).digest()].append((split, image))
    for same in by_content.values():
        train = [relative_name(image, root) for split, image in same if split == "train"]
        test = [relative_name(image, root) for split, image in same if split == "test"]
        if train and test:
            report.faults["image in train and test"].append(f"{train[0]} is {test[0]}")
            report.unusable += train


def _count(classes: dict[str, list[ImageRef]]) -> int:
    return sum(len(images) for images in classes.values())
