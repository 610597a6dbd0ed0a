"""From class folders to class names, verified: label i belongs to the i-th folder in sorted order."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from spa_fast.cil.data.catalog import DataSet, folder_names, label_names
from spa_fast.cil.data.layout import short
from spa_fast.cil.errors import RunError, did_you_mean
from spa_fast.cil.json_input import read_json

# Share of folders that must carry their label's name for the rest to be trusted.
AGREEMENT = 0.9


@dataclass(frozen=True)
class Match:
    """How well folders in sorted order carry the names of labels in order.

    Attributes:
        agree: how many do.
        total: folders, or labels if there are more.
        misplaced: (folder, label at its place) where the folder carries another label's name.
        unlike: (folder, label at its place) where the folder carries no label's name.
    """

    agree: int
    total: int
    misplaced: tuple[tuple[str, str], ...]
    unlike: tuple[tuple[str, str], ...]

    @property
    def trusted(self) -> bool:
        """Whether labels may be given by place."""
        return not self.misplaced and self.agree >= AGREEMENT * self.total

    def __str__(self) -> str:
        pairs = [f"{folder!r} at the place of {label!r}" for folder, label in self.misplaced + self.unlike]
        return f"{self.agree} of {self.total} folders carry the name of their label; {short(pairs, 3)}"


def match_labels(folders: Sequence[str], labels: Sequence[str]) -> Match:
    """Compare by name, so that `001.Black_footed_Albatross` is `Black footed Albatross`."""
    known = {plain(label) for label in labels}
    misplaced: list[tuple[str, str]] = []
    unlike: list[tuple[str, str]] = []
    agree = 0
    for folder, label in zip(folders, labels, strict=False):
        if plain(folder) == plain(label):
            agree += 1
        else:
            (misplaced if plain(folder) in known else unlike).append((folder, label))
    return Match(agree, max(len(folders), len(labels)), tuple(misplaced), tuple(unlike))


def plain(name: str) -> str:
    """A name for comparison: no leading `NNN.`, no separators, one case."""
    return "".join(c for c in re.sub(r"^\d+\.", "", name).casefold() if c.isalnum())


def class_names(
    folders: Sequence[str], classnames: Path | None, data_set: DataSet | None, classes: int
) -> tuple[str, ...]:
    """The class name of every folder.

    Args:
        folders: class folders in sorted order.
        classnames: JSON file {folder: name}; or names in folder order, as a list or as {data set: list}.
        data_set: the known data set, whose label names apply without `classnames`.
        classes: how many labels of it are in use; 0 means one per folder.

    Raises:
        RunError: names that do not fit the folders; the message says what does.
    """
    if classnames:
        return _read_classnames(classnames, folders, data_set)
    if data_set is None:
        return tuple(folder.replace("_", " ") for folder in folders)
    by_folder = folder_names(data_set)
    strangers = [folder for folder in folders if folder not in by_folder]
    if not strangers:
        return tuple(by_folder[folder] for folder in folders)
    if len(strangers) <= (1 - AGREEMENT) * len(folders):
        missing = short(sorted(set(by_folder) - set(folders)))
        raise RunError(
            f"--data: folders that {data_set.key} does not have: {short(strangers)}; missing: {missing}; "
            "give --classnames {folder: name}"
        )
    labels = label_names(data_set, classes or len(folders))
    return _by_place(folders, labels, f"--data: folders and {data_set.key} labels")


def _by_place(folders: Sequence[str], labels: Sequence[str], what: str) -> tuple[str, ...]:
    if len(folders) != len(labels):
        raise RunError(f"{what}: {len(folders)} folders, {len(labels)} labels; {_odd_ones(folders, labels)}")
    match = match_labels(folders, labels)
    if not match.trusted:
        needed = (
            f"at least {AGREEMENT:.0%} must, and none another label's; give --classnames {{folder: name}}"
        )
        raise RunError(f"{what}: {match}; {needed}")
    return tuple(labels)


def _odd_ones(folders: Sequence[str], labels: Sequence[str]) -> str:
    known, found = {plain(label) for label in labels}, {plain(folder) for folder in folders}
    extra = short([folder for folder in folders if plain(folder) not in known])
    missing = short([label for label in labels if plain(label) not in found])
    return f"folders without a label: {extra}; labels without a folder: {missing}"


def _read_classnames(path: Path, folders: Sequence[str], data_set: DataSet | None) -> tuple[str, ...]:
    names = read_json(path, "--classnames")
    if isinstance(names, dict) and data_set:
        known = (data_set.key, *data_set.aliases)
        names = next((v for k, v in names.items() if k in known and isinstance(v, list)), names)
    if isinstance(names, list) and all(isinstance(v, str) and v.strip() for v in names):
        return _by_place(folders, [v.strip() for v in names], f"--classnames: {path}: folders and names")
    if not isinstance(names, dict) or not all(isinstance(v, str) and v.strip() for v in names.values()):
        raise RunError(f"--classnames: {path}: expected an object of folder: class name")
    return _by_folder(path, names, folders)


def _by_folder(path: Path, names: Mapping[str, str], folders: Sequence[str]) -> tuple[str, ...]:
    for folder in folders:
        if folder not in names:
            raise RunError(
                f"--classnames: {path}: no name for folder {folder!r}{did_you_mean(folder, names)}"
            )
    for folder in names:
        if folder not in folders:
            hint = did_you_mean(folder, folders)
            raise RunError(f"--classnames: {path}: unknown folder {folder!r}{hint}")
    return tuple(names[folder].strip() for folder in folders)
