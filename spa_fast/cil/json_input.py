"""Reading text and JSON that people wrote; every fault of a file is named with its remedy."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TypeGuard

from spa_fast.cil.errors import RunError

# More than any file of texts about images needs; above it something else was passed.
MAX_BYTES = 64 << 20
MAX_DEPTH = 32


def read_json(path: Path, argument: str, duplicates: list[str] | None = None) -> object:
    """A JSON document, refusing duplicate keys (plain json keeps the last silently).

    Args:
        path: the file.
        argument: how the user gave it, for messages.
        duplicates: collects duplicate keys, which then are no error; the last value stays.

    Raises:
        RunError: naming the argument, the file, the reason and what to do.
    """
    text = read_text(path, argument, "JSON")
    found: list[str] = []

    def unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
        seen = dict(pairs)
        if len(seen) < len(pairs):
            keys = set(seen)
            for key, _ in pairs:
                keys.discard(key) if key in keys else found.append(key)
        return seen

    try:
        _check_depth(text)
        document: object = json.loads(text, object_pairs_hook=unique)
    except json.JSONDecodeError as error:
        raise _refused(argument, path, "JSON", _why_not_json(text, error)) from error
    except (ValueError, RecursionError) as error:
        raise _refused(argument, path, "JSON", str(error)) from error
    if found and duplicates is None:
        raise _refused(argument, path, "JSON", f"duplicate key {found[0]!r}: keep one")
    if duplicates is not None:
        duplicates += found
    return document


def read_text(path: Path, argument: str, kind: str = "text") -> str:
    """The content of a UTF-8 file, with or without a byte order mark.

    Raises:
        RunError: as for `read_json`.
    """
    try:
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise _refused(argument, path, kind, f"{size} bytes, at most {MAX_BYTES} are read")
        raw = path.read_bytes()
    except FileNotFoundError as error:
        raise RunError(f"{argument}: no such file: {path}") from error
    except OSError as error:
        raise RunError(f"{argument}: {path}: cannot be read: {error.strerror or error}") from error
    if not raw.strip():
        raise _refused(argument, path, kind, f"empty ({len(raw)} bytes): download or write it again")
    if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise _refused(argument, path, kind, "UTF-16: save it as UTF-8")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        what = f"byte {raw[error.start]:#04x} at offset {error.start} is not UTF-8: save it as UTF-8"
        raise _refused(argument, path, kind, what) from error


def is_texts(value: object) -> TypeGuard[list[str]]:
    """Whether it is a list of texts and of nothing else."""
    return isinstance(value, list) and all(isinstance(text, str) for text in value)


def _check_depth(text: str) -> None:
    depth = 0
    for match in re.finditer(r'"[^"\\]*(?:\\.[^"\\]*)*"?|[\[{]|[\]}]', text):
        token = match[0]
        depth += (token in "[{") - (token in "]}")
        if depth > MAX_DEPTH:
            raise ValueError(f"nested more than {MAX_DEPTH} deep at offset {match.start()}")


def _why_not_json(text: str, error: json.JSONDecodeError) -> str:
    start = text.lstrip()[:200].lower()
    if start.startswith("version https://git-lfs"):
        return "a Git LFS pointer, not the file itself: fetch it with `git lfs pull`"
    if start.startswith("<"):
        return "a web page, not the file itself: download the raw file"
    where = f"line {error.lineno}, column {error.colno}"
    if error.pos >= len(text.rstrip()) or error.msg.startswith("Unterminated string"):
        return f"ends in the middle ({where}): truncated, copy it again"
    return f"{error.msg} at {where}"


def _refused(argument: str, path: Path, kind: str, reason: str) -> RunError:
    return RunError(f"{argument}: {path}: not a readable {kind} file: {reason}")
