"""What lies in a feature cache: listing, verifying and removing it, without images or encoder."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from spa_fast.cil.data.shards import ABOUT, LOCK, Say, ShardFault, ShardFolder
from spa_fast.cil.errors import RunError
from spa_fast.cil.lock import holder
from spa_fast.cil.report import table

HEADER = ("folder", "backbone", "source", "patches", "dtype", "key", "shards", "MB")


def cache_info(cache: Path, say: Say) -> int:
    """Print a table of the cache's folders and who writes to them now."""
    rows, total, writers = [], 0, []
    folders, damaged = _folders(cache)
    for folder in folders:
        sizes = [shard.stat().st_size for shard in _shards(folder)]
        total += sum(sizes)
        about = [folder.about.get(key, "-") for key in HEADER[1:6]]
        rows.append([_name(cache, folder), *about, str(len(sizes)), f"{sum(sizes) / 1e6:.1f}"])
        if writer := holder(folder.path / LOCK):
            writers.append(f"{_name(cache, folder)}: {writer} writes to it")
    for line in (table(HEADER, rows), *writers, *damaged, f"{total / 1e6:.1f} MB in {cache}"):
        say(line)
    return 0


def cache_verify(cache: Path, say: Say) -> int:
    """Compare the checksum of every shard; 1 if one cannot be used. Without images nothing is rebuilt."""

    def fault(at: tuple[ShardFolder, Path]) -> str:
        folder, shard = at
        try:
            folder.read(shard.name)
        except ShardFault as reason:
            return f"{shard}: {reason}"
        return ""

    folders, damaged = _folders(cache)
    shards = [(folder, shard) for folder in folders for shard in _shards(folder)]
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        bad = [line for line in pool.map(fault, shards) if line]
    for line in (*bad, *damaged):
        say(line)
    if bad:
        say(f"{len(bad)} of {len(shards)} shards cannot be used; nothing was changed")
        say("the next train or eval with the same data, backbone and settings extracts these again, alone")
    else:
        say(f"{len(shards)} shards, all whole")
    return 1 if bad or damaged else 0


def cache_clear(cache: Path, say: Say) -> int:
    """Remove the cache's own files, and folders that are empty then; nothing else is touched.

    Raises:
        RunError: a process writes to it.
    """
    (folders, damaged), freed = _folders(cache), 0
    for folder in folders:
        if writer := holder(folder.path / LOCK):
            raise RunError(f"--cache: {folder.path}: {writer} writes to it; nothing was removed")
    for folder in folders:
        for file in (*_shards(folder), *folder.path.glob("*.partial")):
            freed += file.stat().st_size
            file.unlink()
        for name in (ABOUT, LOCK):
            (folder.path / name).unlink(missing_ok=True)
        for empty in (folder.path, folder.path.parent):
            with contextlib.suppress(OSError):
                empty.rmdir()
    for line in damaged:
        say(line)
    say(f"{freed / 1e6:.1f} MB removed from {cache}")
    return 0


ACTIONS: dict[str, Callable[[Path, Say], int]] = {
    "info": cache_info,
    "verify": cache_verify,
    "clear": cache_clear,
}


def _folders(cache: Path) -> tuple[list[ShardFolder], list[str]]:
    """Folders of shards, known by the description that lies in each, and what is wrong with other ones."""
    if not cache.is_dir():
        raise RunError(f"--cache: no such folder: {cache}")
    found, damaged = [], []
    for file in sorted(cache.glob(f"*/*/{ABOUT}")):
        try:
            about = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            damaged.append(
                f"{file}: unreadable ({error}), its folder left alone; the next run over it mends it"
            )
            continue
        if isinstance(about, dict) and str(about.get("format")).startswith("spa_fast.features/"):
            found.append(ShardFolder(file.parent, about))
    if not found and not damaged:
        raise RunError(f"--cache: {cache} holds no features")
    return found, damaged


def _shards(folder: ShardFolder) -> list[Path]:
    return sorted(folder.path.glob("*.safetensors"))


def _name(cache: Path, folder: ShardFolder) -> str:
    return str(folder.path.relative_to(cache))
