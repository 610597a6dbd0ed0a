"""Run folders: written whole or not at all; the learned state beside what is needed to use it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from spa_fast.cil.errors import RunError
from spa_fast.cil.json_input import read_json

STATE = "model.safetensors"
RUN = "run.json"
FORMAT = "spa_fast.run/1"


@contextmanager
def new_run_folder(out: Path, replace: bool = False) -> Iterator[Path]:
    """A folder to write a run into: renamed to `out` when the block ends well, removed when it does not.

    With `replace` an earlier run in `out` (a folder with results.json) gives way.

    Raises:
        RunError: `out` exists and is not an empty folder, or cannot be made.
    """
    replace = replace and (out / "results.json").is_file()
    if not replace:
        check_out(out)
    partial = out.with_name(f".{out.name}.{os.getpid()}.partial")
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise RunError(f"--out: {out.parent}: cannot write: {error}") from error
    try:
        yield partial
        if replace:
            shutil.rmtree(out)
        elif out.is_dir():
            out.rmdir()
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def check_out(out: Path) -> None:
    """Refuse a run folder that would overwrite something."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise RunError(f"--out: {out} exists and is not an empty folder; choose another or remove it")


def save_run(folder: Path, run: Mapping[str, Any], state: Mapping[str, Tensor]) -> None:
    """Write the learned tensors and the description of the run."""
    save_file({key: value.detach().contiguous().clone() for key, value in state.items()}, folder / STATE)
    (folder / RUN).write_text(json.dumps({"format": FORMAT, **run}, indent=1) + "\n", encoding="utf-8")


def load_run(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The description of a run and its tensors.

    Raises:
        RunError: missing, unreadable or foreign files.
    """
    if not folder.is_dir():
        raise RunError(f"run: no such folder: {folder}")
    run = read_json(folder / RUN, "run")
    if not isinstance(run, dict) or run.get("format") != FORMAT:
        raise RunError(f"run: {folder / RUN}: expected format {FORMAT!r}")
    try:
        return run, load_file(folder / STATE)
    except (OSError, SafetensorError) as error:
        raise RunError(f"run: {folder / STATE}: unreadable: {error}") from error
