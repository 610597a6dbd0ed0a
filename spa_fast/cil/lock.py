"""A lock file that lives no longer than the process that holds it."""

from __future__ import annotations

import errno
import fcntl
import os
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TextIO

from spa_fast.cil.errors import RunError, writing

# What file systems without locks answer.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


@contextmanager
def exclusive(path: Path, busy: str, wait: Callable[[str], None] | None = None) -> Iterator[bool]:
    """Hold `path` for the length of the block, then remove it.

    The lock is the kernel's: it goes with its process, however that ends; the file left behind bars nobody.

    Args:
        path: file to create and lock, in a folder that exists.
        busy: what to say if another process, or another block in this one, holds it.
        wait: takes `busy` and the holder's name once, before waiting for it; without it nobody waits.

    Yields:
        False where the file system has no locks and nothing is held.

    Raises:
        RunError: it is held, by whom as far as known.
        OSError: the file cannot be written.
    """
    file = _open_locked(path, busy, wait)
    if file is None:
        yield False
        return
    with file:
        try:
            yield True
        finally:
            # Removed while held: whoever opened it meanwhile sees that the name has gone, and tries again.
            if _is_at(file, path):
                path.unlink()


def holder(path: Path) -> str:
    """The process that holds `path` now, or nothing."""
    try:
        with path.open("r", encoding="utf-8") as file:
            try:
                fcntl.flock(file.fileno(), fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return _named(file)
    except OSError:
        pass
    return ""


def _open_locked(path: Path, busy: str, wait: Callable[[str], None] | None) -> TextIO | None:
    while True:
        file = path.open("a+", encoding="utf-8")
        try:
            if not _acquire(file, busy, wait):
                file.close()
                path.unlink(missing_ok=True)
                return None
            if _is_at(file, path):
                _sign(file, path)
                return file
        except BaseException:
            file.close()
            raise
        file.close()


def _sign(file: TextIO, path: Path) -> None:
    """Leave our name in a file that we hold; on a full disk no file."""
    since = datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S")
    try:
        with writing(path):
            file.truncate(0)
            os.write(file.fileno(), f"process {os.getpid()} on {platform.node()} since {since} UTC".encode())
    except OSError:
        path.unlink(missing_ok=True)
        raise


def _acquire(file: TextIO, busy: str, wait: Callable[[str], None] | None) -> bool:
    """Take the lock of an open file; False where the file system has none."""
    try:
        try:
            fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            said = f"{busy} ({_named(file)})"
            if wait is None:
                raise RunError(said) from None
            wait(f"{said}; waiting")
            fcntl.flock(file.fileno(), fcntl.LOCK_EX)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        return False
    return True


def _named(file: TextIO) -> str:
    """Who wrote its name into a lock file."""
    file.seek(0)
    return file.read(200).strip() or "another process"


def _is_at(file: TextIO, path: Path) -> bool:
    """Whether an open file is still the one of that name."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False
