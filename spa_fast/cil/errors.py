"""What a run refuses (RunError: exit code 2), and what a disk does (OSError: 3); each is one line."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path


class RunError(Exception):
    """Bad input or a run that cannot go on; the message names the file, class or argument."""


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Name the file that a block writes: a full disk's own error names none.

    Raises:
        OSError: the block's, with `path`.
    """
    try:
        yield
    except OSError as error:
        raise OSError(f"{path}: cannot write: {error.strerror or error}") from error


def cannot_write(what: str, error: OSError, why: str = "") -> RunError | OSError:
    """The error to raise for a folder that takes no files: bad input where a file is in its place."""
    kind = RunError if isinstance(error, FileExistsError | NotADirectoryError) else OSError
    return kind(f"{what}: cannot write: {error}{why and '; '}{why}")


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`"; did you mean 'x'?"` for the closest known word, or an empty string."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
