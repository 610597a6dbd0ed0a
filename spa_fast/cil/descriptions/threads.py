"""Calls in threads that nobody has to wait for: who is interrupted leaves at once."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait
from typing import TypeVar

Key = TypeVar("Key")
Result = TypeVar("Result")


def started(call: Callable[[], Result]) -> Future[Result]:
    """The outcome to be of a call in a thread of its own; an executor's threads would hold up the exit."""
    future: Future[Result] = Future()

    def run() -> None:
        try:
            future.set_result(call())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def in_parallel(
    calls: Iterable[tuple[Key, Callable[[], Result]]], most: int
) -> Iterator[tuple[Key, Future[Result]]]:
    """Make calls, at most `most` at a time; each one's key and outcome as it ends.

    Args:
        calls: (key, call); the next is taken, in the caller's thread, when there is room for it.
        most: calls under way, at least 1.
    """
    running: dict[Future[Result], Key] = {}
    for key, call in calls:
        running[started(call)] = key
        if len(running) == most:
            yield from _ended(running)
    while running:
        yield from _ended(running)


def _ended(running: dict[Future[Result], Key]) -> Iterator[tuple[Key, Future[Result]]]:
    """Wait for one at least."""
    for future in wait(running, return_when=FIRST_COMPLETED).done:
        yield running.pop(future), future
