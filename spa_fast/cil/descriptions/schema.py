"""Class-wise descriptions: `{"dataset": ..., "classes": [{"name": ..., "descriptions": [...]}]}`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from spa_fast.cil.errors import RunError, did_you_mean
from spa_fast.cil.json_input import read_json


def read_descriptions(path: Path, names: Sequence[str]) -> list[list[str]]:
    """Descriptions of each class, in the order of `names`.

    Raises:
        RunError: unreadable file, a class without descriptions, or a class that the data set does not have.
    """
    document = read_json(path, "--descriptions")
    classes = document.get("classes") if isinstance(document, dict) else None
    if not isinstance(classes, list):
        raise RunError(f"--descriptions: {path}: expected an object with a list 'classes'")
    texts: dict[str, list[str]] = {}
    for i, entry in enumerate(classes):
        name = entry.get("name") if isinstance(entry, dict) else None
        lines = entry.get("descriptions") if isinstance(entry, dict) else None
        if (
            not isinstance(name, str)
            or not isinstance(lines, list)
            or not all(isinstance(x, str) for x in lines)
        ):
            raise RunError(
                f"--descriptions: {path}: classes[{i}]: expected 'name' and a list of strings 'descriptions'"
            )
        if name in texts:
            raise RunError(f"--descriptions: {path}: class {name!r} appears twice")
        texts[name] = [x.strip() for x in lines if x.strip()]
    for name in names:
        if not texts.get(name):
            hint = "" if name in texts else did_you_mean(name, texts)
            raise RunError(f"--descriptions: {path}: class {name!r} has no descriptions{hint}")
    known = set(names)
    for name in texts:
        if name not in known:
            raise RunError(f"--descriptions: {path}: unknown class {name!r}{did_you_mean(name, names)}")
    return [texts[name] for name in names]
