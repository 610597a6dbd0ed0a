"""Reading JSON that people wrote."""

from __future__ import annotations

import json
from pathlib import Path

from spa_fast.cil.errors import RunError


def read_json(path: Path, argument: str) -> object:
    """A JSON document, refusing duplicate keys (plain json keeps the last silently).

    Raises:
        RunError: naming the argument and the file.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=_unique_keys)
    except FileNotFoundError as error:
        raise RunError(f"{argument}: no such file: {path}") from error
    except (OSError, UnicodeDecodeError, ValueError, RecursionError) as error:
        raise RunError(f"{argument}: {path}: not a readable JSON file: {error}") from error


def _unique_keys(pairs: list[tuple[str, object]]) -> dict[str, object]:
    keys = [key for key, _ in pairs]
    for key in keys:
        if keys.count(key) > 1:
            raise ValueError(f"duplicate key {key!r}")
    return dict(pairs)
