"""Where the time of one call goes: seconds by stage, a stage within another counting for itself only."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future
from contextlib import contextmanager
from typing import Any

import pytest

Place = tuple[Any, str, str]
"""An object, the name of one of its functions, and the stage that this function is."""


class Stages:
    """Seconds by stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._inner = [0.0]

    @contextmanager
    def of(self, name: str) -> Iterator[None]:
        self._inner.append(0.0)
        start = time.perf_counter()
        try:
            yield
        finally:
            took = time.perf_counter() - start
            self.seconds[name] += took - self._inner.pop()
            self._inner[-1] += took

    def within(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            with self.of(name):
                return function(*args, **kwargs)

        return run

    def percent(self) -> dict[str, int]:
        total = sum(self.seconds.values())
        return {name: round(100 * s / total) for name, s in sorted(self.seconds.items(), key=lambda x: -x[1])}


class InTurn(Executor):
    """In place of a pool of threads: a task is done when it is submitted, in the caller's thread."""

    def __init__(self, *_args: Any) -> None:
        pass

    def submit(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        done: Future[Any] = Future()
        done.set_result(function(*args, **kwargs))
        return done


def shares(
    run: Callable[[Stages], Any], places: Iterable[Place], monkeypatch: pytest.MonkeyPatch
) -> dict[str, int]:
    """Percent of one call by stage; what is at none of the places is the rest."""
    stages = Stages()
    with monkeypatch.context() as patch:
        for owner, name, stage in places:
            patch.setattr(owner, name, stages.within(stage, getattr(owner, name)))
        with stages.of("rest"):
            run(stages)
    return stages.percent()
