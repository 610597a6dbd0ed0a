"""A lock file that lives no longer than the process that holds it."""

from __future__ import annotations

import fcntl
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TextIO

from spa_fast.cil.errors import RunError


@contextmanager
def exclusive(path: Path, busy: str) -> Iterator[bool]:
    """Hold `path` for the length of the block, then remove it.

    The lock is the kernel's: it goes with its process, however that ends; the file left behind bars nobody.

    Args:
        path: file to create and lock, in a folder that exists.
        busy: what to say if another process, or another block in this one, holds it.

    Yields:
        False where the file system has no locks and nothing is held.

    Raises:
        RunError: it is held, by whom as far as known.
        OSError: the file cannot be written.
    """
    file = _open_locked(path, busy)
    if file is None:
        yield False
        return
    try:
        yield True
    finally:
        # Removed while held: whoever opened it meanwhile sees that the name has gone, and tries again.
        path.unlink(missing_ok=True)
        file.close()


def _open_locked(path: Path, busy: str) -> TextIO | None:
    while True:
        file = path.open("a+", encoding="utf-8")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            holder = file.read(200).strip() or "another process"
            file.close()
            raise RunError(f"{busy} ({holder})") from error
        except OSError:
            file.close()
            path.unlink(missing_ok=True)
            return None
        if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
            break
        file.close()
    file.truncate(0)
    since = datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S")
    file.write(f"process {os.getpid()} on {platform.node()} since {since} UTC")
    file.flush()
    return file
