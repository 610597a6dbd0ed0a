"""Class-wise descriptions in memory and in this project's own file format."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from spa_fast.cil.atomic import replacing

SCHEMA = "spa_fast.descriptions/1"
Status = Literal["ok", "manual", "refused", "empty", "failed", "pending"]
"""Written by a model, written by hand, the model refused, answered nothing, did not answer, not yet asked."""


@dataclass(frozen=True)
class ClassEntry:
    """Descriptions of one class.

    Attributes:
        name: class name.
        texts: descriptions, in order of use.
        status: how they came about.
        images: SHA-256 of the images that they were written from.
        reason: why there are none.
        date: when they were written, where that is not the date of the file.
    """

    name: str
    texts: tuple[str, ...]
    status: Status = "manual"
    images: tuple[str, ...] = ()
    reason: str = ""
    date: str = ""

    @property
    def settled(self) -> bool:
        """Whether nobody has to be asked for it any more."""
        return self.status in ("ok", "manual") and bool(self.texts)


@dataclass(frozen=True)
class Descriptions:
    """A file of class-wise descriptions, whatever its format.

    Attributes:
        classes: in the file's order; a name may come twice.
        form: the file's format, for messages.
        dataset: what the file calls the data set, or "".
        generator: who wrote it: model, parameters, prompt hash, date on which it was begun.
        duplicate_keys: JSON keys that came more than once.
        remarks: what reading had to decide.
    """

    classes: tuple[ClassEntry, ...]
    form: str
    dataset: str = ""
    generator: Mapping[str, Any] = field(default_factory=dict)
    duplicate_keys: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()

    @property
    def from_template(self) -> bool:
        """Whether every class has the same texts by design."""
        return self.generator.get("model") == "template"


def write_descriptions(path: Path, document: Descriptions) -> None:
    """Write the file whole or not at all.

    Raises:
        OSError: the folder cannot be written; an earlier file stays as it was.
    """
    classes = [
        {
            "id": i,
            "name": entry.name,
            "descriptions": list(entry.texts),
            "images": list(entry.images),
            "status": entry.status,
            **({"reason": entry.reason} if entry.reason else {}),
            **({"date": entry.date} if entry.date else {}),
        }
        for i, entry in enumerate(document.classes)
    ]
    whole = {
        "schema": SCHEMA,
        "dataset": document.dataset,
        "generator": dict(document.generator),
        "classes": classes,
    }
    with replacing(path) as partial:
        partial.write_text(json.dumps(whole, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
