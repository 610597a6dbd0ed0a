"""Where the figures of a run go while it runs: metrics.jsonl and train.log always, one tracker by choice."""

from __future__ import annotations

import importlib
import json
import uuid
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, Protocol

from spa_fast.cil.errors import RunError, writing
from spa_fast.cil.report import append_jsonl

TrackerName = Literal["none", "tensorboard", "wandb", "trackio"]
Kind = Literal["epoch", "stage"]
Say = Callable[[str], None]

METRICS = "metrics.jsonl"
LOG = "train.log"


class Tracker(Protocol):
    """The one shape that every tracker is called by. Whatever it raises stops the tracker, not the run."""

    def log(self, kind: Kind, figures: Mapping[str, float], step: int) -> None:
        """Record figures of the step-th epoch or stage of the run, counted from 0."""

    def finish(self, summary: Mapping[str, float] | None) -> None:
        """End with the run's summary; None for a run that failed."""


class TensorBoard:
    """Event files in the run folder."""

    def __init__(self, module: Any, folder: Path, name: str, config: Mapping[str, Any]) -> None:
        self.writer = module.SummaryWriter(str(folder / "tensorboard"))
        self.writer.add_text("config", f"```\n{json.dumps(config, indent=1)}\n```")

    def log(self, kind: Kind, figures: Mapping[str, float], step: int) -> None:
        for key, value in figures.items():
            self.writer.add_scalar(f"{kind}/{key}", value, step)
        self.writer.flush()

    def finish(self, summary: Mapping[str, float] | None) -> None:
        for key, value in (summary or {}).items():
            self.writer.add_scalar(f"summary/{key}", value, 0)
        self.writer.close()


class Wandb:
    """A run of Weights & Biases; project, entity and mode are its own environment variables'."""

    def __init__(self, module: Any, folder: Path, name: str, config: Mapping[str, Any]) -> None:
        # It prints where its files are, for `wandb sync`: beside the run folder, which is renamed at the end.
        self.run = module.init(name=name, config=dict(config), dir=str(folder.parent))
        for kind in ("epoch", "stage"):
            self.run.define_metric(f"{kind}/*", step_metric=kind)

    def log(self, kind: Kind, figures: Mapping[str, float], step: int) -> None:
        self.run.log(_named(kind, figures, step))

    def finish(self, summary: Mapping[str, float] | None) -> None:
        self.run.summary.update(dict(summary or {}))
        self.run.finish(exit_code=1 if summary is None else 0)


class Trackio:
    """A run in Trackio's local project `spa_fast`."""

    def __init__(self, module: Any, folder: Path, name: str, config: Mapping[str, Any]) -> None:
        # Its module remembers the current run and would finish it a second time at exit.
        self.module = module
        module.init(project="spa_fast", name=name, config=dict(config))

    def log(self, kind: Kind, figures: Mapping[str, float], step: int) -> None:
        self.module.log(_named(kind, figures, step))

    def finish(self, summary: Mapping[str, float] | None) -> None:
        if summary:
            self.module.log({f"summary/{key}": value for key, value in summary.items()})
        self.module.finish()


_TRACKERS: dict[str, tuple[str, Callable[[Any, Path, str, Mapping[str, Any]], Tracker]]] = {
    "tensorboard": ("torch.utils.tensorboard", TensorBoard),
    "wandb": ("wandb", Wandb),
    "trackio": ("trackio", Trackio),
}


def tracker_module(name: TrackerName) -> Any:
    """The tracker's library, None for none.

    Raises:
        RunError: it is not installed, naming the extra that brings it, or fails when imported.
    """
    if name == "none":
        return None
    try:
        return importlib.import_module(_TRACKERS[name][0])
    except ModuleNotFoundError as error:
        raise RunError(
            f"--track: {name} is not installed ({error}); pip install 'spa_fast[{name}]' brings it"
        ) from error
    except Exception as error:
        raise RunError(f"--track: {name} cannot be imported: {error}") from error


class RunLog:
    """Everything that a run says and measures, as it happens; every line is on disk before the next.

    Args:
        folder: the run folder, where metrics.jsonl and train.log are appended to.
        say: also gets every line of text.

    Attributes:
        run_id: of this run alone.
        started: when it began, UTC.
    """

    def __init__(self, folder: Path, say: Say) -> None:
        self.folder = folder
        self.run_id = uuid.uuid4().hex[:12]
        self.started = datetime.now(UTC).isoformat(timespec="seconds")
        self._say = say
        self._tracker: Tracker | None = None
        self._tracked = ""
        self._steps = {"epoch": 0, "stage": 0}

    def track(self, track: TrackerName, name: str, config: Mapping[str, Any]) -> None:
        """Start a tracker.

        Args:
            track: which.
            name: of the run.
            config: its settings, JSON-ready.

        Raises:
            RunError: it is not installed or does not start.
        """
        module = tracker_module(track)
        if module is None:
            return
        try:
            self._tracker = _TRACKERS[track][1](module, self.folder, name, {**config, "run_id": self.run_id})
        except Exception as error:
            raise RunError(f"--track: {track} does not start: {_short(error)}") from error
        self._tracked = track

    def say(self, line: str) -> None:
        """One line to the log and to whoever listens."""
        with writing(self.folder / LOG), (self.folder / LOG).open("a", encoding="utf-8") as file:
            file.write(line + "\n")
        self._say(line)

    def record(self, kind: Kind, figures: Mapping[str, Any]) -> None:
        """One line of metrics.jsonl; its numbers also to the tracker, lists entry by entry."""
        append_jsonl(self.folder / METRICS, {"kind": kind, **figures})
        step = self._steps[kind]
        self._steps[kind] += 1
        numbers = {key: float(value) for key, value in _scalars(figures) if key != kind}
        self._guarded(lambda tracker: tracker.log(kind, numbers, step))

    def finish(self, summary: Mapping[str, float] | None) -> None:
        """End the tracker; None for a run that failed. Later calls do nothing."""
        self._guarded(lambda tracker: tracker.finish(summary))
        self._tracker = None

    def _guarded(self, call: Callable[[Tracker], None]) -> None:
        if self._tracker is None:
            return
        try:
            call(self._tracker)
        except Exception as error:
            self._tracker = None
            self.say(f"warning: --track {self._tracked} failed and is off: {_short(error)}; the run goes on")


def _scalars(figures: Mapping[str, Any]) -> list[tuple[str, float]]:
    found: list[tuple[str, float]] = []
    for key, value in figures.items():
        several = isinstance(value, list)
        found += [(f"{key}_{i}", v) for i, v in enumerate(value)] if several else [(key, value)]
    return found


def _named(kind: Kind, figures: Mapping[str, float], step: int) -> dict[str, float]:
    return {**{f"{kind}/{key}": value for key, value in figures.items()}, kind: step}


def _short(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
