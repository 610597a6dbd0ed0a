"""Several presets over several seeds: one process a run, as many at a time as there are devices."""

from __future__ import annotations

import dataclasses
import shutil
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from spa_fast.cil.atomic import replacing
from spa_fast.cil.errors import RunError
from spa_fast.cil.finished import check_inputs, finished, hash_reader
from spa_fast.cil.lock import exclusive
from spa_fast.cil.presets import changes, run_name
from spa_fast.cil.processes import Job, run_jobs
from spa_fast.cil.report import SUMMARY, label, table, write_csv
from spa_fast.cil.run_config import RunConfig

Vary = Literal["order", "training"]
Say = Callable[[str], None]


@dataclass(frozen=True)
class SweepRun:
    """One run of a sweep.

    Attributes:
        config: its settings, all but the device.
        arguments: of `spa-fast train`, all but the device.
        folder: its run folder.
    """

    config: RunConfig
    arguments: tuple[str, ...]
    folder: Path

    @property
    def title(self) -> str:
        """What it is called on the screen."""
        return f"{self.config.preset}, order {self.config.order_seed}, seed {self.config.seed}"


def plan(config: RunConfig, arguments: Sequence[str], seeds: int, vary: Vary, out: Path) -> list[SweepRun]:
    """The runs of one preset: class orders 1993, 1994, ... as LAMDA's seed lists mean it, or training seeds
    1, 2, ... under one order. The first is the preset's own.

    Args:
        config: settings of the first run.
        arguments: of `spa-fast train` that give these settings.
        seeds: number of runs.
        vary: which seed goes up.
        out: folder of the sweep.
    """
    name = "order_seed" if vary == "order" else "seed"
    runs = []
    for i in range(seeds):
        value = getattr(config, name) + i
        changed = dataclasses.replace(config.absolute(), **{name: value})
        folder = (out / run_name(changed)).resolve()
        flags = (f"--{name.replace('_', '-')}", str(value), "--out", str(folder))
        runs.append(SweepRun(changed, (*arguments, *flags), folder))
    return runs


def slots(device: str | None, jobs: int) -> list[str]:
    """A device for each run at a time: every CUDA device there is, else `jobs` on the CPU.

    Args:
        device: as for `spa-fast train`; None takes CUDA where it is usable.
        jobs: runs at a time where the device is not all of CUDA.
    """
    if device in (None, "cuda") and torch.cuda.is_available():
        return [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    return [device or "cpu"] * jobs


def run_sweep(runs: Sequence[SweepRun], out: Path, devices: Sequence[str], say: Say) -> int:
    """Carry out what is not finished yet, print mean and spread, write sweep.csv; 1 if a run failed.

    Args:
        runs: all runs; those of different presets are started first, so that they do not share features.
        out: folder of the sweep: run folders, logs/NAME.log of every run started, sweep.csv.
        devices: one entry for each run at a time.
        say: gets the lines.
    """
    out.mkdir(parents=True, exist_ok=True)
    with exclusive(out / ".sweep.lock", f"--out: another sweep is filling {out}"):
        rows: dict[SweepRun, dict[str, Any]] = {}
        failed: dict[SweepRun, str] = {}
        pending: dict[Job, SweepRun] = {}

        def fail(run: SweepRun, reason: str) -> None:
            failed[run] = reason
            say(f"failed: {run.title}: {reason}")

        def on_end(job: Job, reason: str) -> None:
            run = pending[job]
            row = None if reason else finished(run.folder, run.config)
            if row is None:
                fail(run, reason or f"it ended well, but its folder is not whole ({job.log})")
            else:
                rows[run] = row
                say(f"finished: {run.title}: {_figures(row)}, {row['seconds']:.1f} s")

        hashes = hash_reader()
        for run in runs:
            try:
                row = finished(run.folder, run.config)
                if row is not None:
                    check_inputs(run.folder, row, hashes(run.config))
            except RunError as error:
                fail(run, str(error))
                continue
            if row is None:
                # What is there is a damaged run: `finished` has seen that the folder holds nothing else.
                shutil.rmtree(run.folder, ignore_errors=True)
                pending[Job(run.title, run.arguments, out / "logs" / f"{run.folder.name}.log")] = run
            else:
                rows[run] = row
                say(f"finished before: {run.title}: {_figures(row)}")
        run_jobs(list(pending), devices, on_end, say)
        summary = [_summary(preset, runs, rows) for preset in dict.fromkeys(r.config.preset for r in runs)]
        with replacing(out / "sweep.csv") as partial:
            write_csv(partial, summary)
        say(_shown(summary))
        if failed:
            say(f"{len(failed)} of {len(runs)} runs failed:")
            for run, reason in failed.items():
                say(f"  {run.title}: {reason}")
        say(f"{out}: sweep.csv, a folder for each run")
    return 1 if failed else 0


def _figures(row: Mapping[str, Any]) -> str:
    return f"average {row['average']:.2f}, last {row['last']:.2f} %"


def _summary(
    preset: str, runs: Sequence[SweepRun], rows: Mapping[SweepRun, Mapping[str, Any]]
) -> dict[str, Any]:
    """A preset's line of sweep.csv: means and sample standard deviations over its finished runs."""
    own = [run for run in runs if run.config.preset == preset]
    done = [run for run in own if run in rows]
    line: dict[str, Any] = {
        "preset": preset,
        "method": own[0].config.method,
        "backbone": own[0].config.backbone,
        "changed": " ".join(key for key in changes(own[0].config) if key not in ("order_seed", "seed")),
        "n": len(done),
        "runs": len(own),
        "order_seeds": " ".join(str(run.config.order_seed) for run in done),
        "seeds": " ".join(str(run.config.seed) for run in done),
    }
    for key in SUMMARY:
        values = [rows[run][key] for run in done]
        line[f"{key}_mean"] = f"{statistics.fmean(values):.4f}" if values else ""
        line[f"{key}_std"] = f"{statistics.stdev(values):.4f}" if len(values) > 1 else ""
    return line


def _shown(summary: Sequence[Mapping[str, Any]]) -> str:
    def cell(line: Mapping[str, Any], key: str) -> str:
        mean, std = line[f"{key}_mean"], line[f"{key}_std"]
        return (f"{float(mean):.2f}" if mean else "-") + (f" ± {float(std):.2f}" if std else "")

    rows = [
        [
            line["preset"],
            label(line["method"]),
            str(line["n"]) if line["n"] == line["runs"] else f"{line['n']} of {line['runs']}",
            *(cell(line, key) for key in SUMMARY),
        ]
        for line in summary
    ]
    header = ["preset", "method", "n", "average %", "last %", "forgetting", "BWT"]
    changed = dict.fromkeys(key for line in summary for key in line["changed"].split())
    note = f"; settings changed from the preset: {', '.join(changed)}" if changed else ""
    return f"mean ± sample standard deviation over n runs{note}\n" + table(header, rows)
