"""What a check found, as a table for people."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

from spa_fast.cil.data.layout import short


@dataclass
class Findings:
    """What was found in one thing.

    Attributes:
        title: what was examined, with its sizes.
        faults: kind -> what is wrong, one text each; a run would stop or its figures be wrong.
        notes: kind -> what is odd.
    """

    title: str
    faults: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    notes: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))

    def lines(self) -> list[str]:
        """A readable table."""
        rows = [("FAULT", kind, found) for kind, found in self.faults.items()]
        rows += [("note", kind, found) for kind, found in self.notes.items()]
        width = max((len(kind) for _, kind, _ in rows), default=0)
        table = [
            f"  {level:5}  {kind:{width}}  {len(found):6d}  {short(found)}" for level, kind, found in rows
        ]
        return [self.title, *table, *([] if rows else ["  nothing to report"])]


def file_all(table: dict[str, list[str]], kind: str, found: Sequence[str]) -> None:
    """File findings of a kind, if there are any."""
    if found:
        table[kind].extend(found)
