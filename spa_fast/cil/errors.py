"""What a run refuses, as one type: the command line prints it in one line and exits with code 2."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class RunError(Exception):
    """Bad input or a run that cannot go on; the message names the file, class or argument."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`"; did you mean 'x'?"` for the closest known word, or an empty string."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
