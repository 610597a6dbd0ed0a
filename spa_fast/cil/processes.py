"""Runs of `spa-fast` as child processes, as many at a time as there are devices."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch

# Seconds between looks at the children, and what an interrupted one has to clear its folder away.
_POLL = 0.2
_GRACE = 20.0


@dataclass(frozen=True)
class Job:
    """One child.

    Attributes:
        title: what it is called on the screen.
        arguments: of `spa-fast`, all but the device.
        log: file that takes its output.
    """

    title: str
    arguments: tuple[str, ...]
    log: Path


@dataclass(frozen=True)
class _Child:
    job: Job
    device: str
    process: subprocess.Popen[bytes]


def run_jobs(
    jobs: Sequence[Job],
    devices: Sequence[str],
    on_end: Callable[[Job, str], None],
    say: Callable[[str], None],
) -> None:
    """Run every job, in order; whatever interrupts this call ends the children that it started.

    Args:
        jobs: what to run.
        devices: one entry for each job at a time.
        on_end: called as each job ends, with why it failed or an empty text.
        say: gets a line for each start.
    """
    # Jobs at a time share the cores; more threads than cores make each of them slower.
    threads = max(1, torch.get_num_threads() // len(devices))
    waiting, free = list(jobs), list(devices)
    with _children() as active:
        while waiting or active:
            while waiting and free:
                job, device = waiting.pop(0), free.pop(0)
                say(f"started: {job.title} ({device})")
                active.append(_Child(job, device, _start(job, device, threads)))
            time.sleep(_POLL)
            for child in [child for child in active if child.process.poll() is not None]:
                active.remove(child)
                free.append(child.device)
                on_end(child.job, _reason(child))


def _start(job: Job, device: str, threads: int) -> subprocess.Popen[bytes]:
    job.log.parent.mkdir(parents=True, exist_ok=True)
    with job.log.open("wb") as log:
        return subprocess.Popen(
            [
                # OpenMP reads its number of threads only here; `env` adds it to what the child inherits, as
                # this package neither reads nor sets variables of its own process.
                *("env", f"OMP_NUM_THREADS={threads}", sys.executable, "-m", "spa_fast.cli"),
                *(*job.arguments, "--device", device),
            ],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            # Ctrl-C reaches the parent alone, which then ends its children one by one.
            start_new_session=True,
        )


@contextmanager
def _children() -> Iterator[list[_Child]]:
    """A list of children; those still in it at the end are asked to end, then made to."""
    active: list[_Child] = []
    try:
        yield active
    finally:
        for child in active:
            child.process.terminate()
        try:
            until = time.monotonic() + _GRACE
            for child in active:
                with suppress(subprocess.TimeoutExpired):
                    child.process.wait(max(0.0, until - time.monotonic()))
        finally:
            for child in active:
                child.process.kill()
                child.process.wait()


def _reason(child: _Child) -> str:
    code = child.process.returncode
    if code == 0:
        return ""
    if code < 0:
        return f"ended by {signal.Signals(-code).name} ({child.job.log})"
    # Progress bars end in carriage returns, not in lines.
    text = child.job.log.read_text(encoding="utf-8", errors="replace").replace("\r", "\n").splitlines()
    last = next((line.strip() for line in reversed(text) if line.strip()), "no output")
    return f"exit code {code}: {last.removeprefix('spa-fast: error: ')[:300]} ({child.job.log})"
