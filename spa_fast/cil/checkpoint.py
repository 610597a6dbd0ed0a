"""Run folders: written whole or not at all; the learned state beside what is needed to use it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from spa_fast.cil.errors import RunError, cannot_write, writing
from spa_fast.cil.json_input import read_json
from spa_fast.cil.lock import exclusive

STATE = "model.safetensors"
RUN = "run.json"
FORMAT = "spa_fast.run/1"


@contextmanager
def new_run_folder(out: Path, replaceable: Collection[str] = ()) -> Iterator[Path]:
    """A folder to write a run into: renamed to `out` when the block ends well, removed when it does not.

    It is `.NAME.partial` beside `out`. A lock, `.NAME.lock`, keeps a second run from the same `out`; what a
    killed run left is cleared away.

    Args:
        out: the run folder to be.
        replaceable: an earlier `out` gives way if it holds files of these names and nothing else.

    Raises:
        RunError: `out` exists and may not be replaced, or is being written by another run.
        OSError: it cannot be made.
    """
    out = out.resolve()
    check_out(out, replaceable)
    partial, earlier = out.with_name(f".{out.name}.partial"), out.with_name(f".{out.name}.earlier")
    lock = exclusive(out.with_name(f".{out.name}.lock"), f"--out: another run is writing to {out}")
    with ExitStack() as held:
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            if held.enter_context(lock):
                # A run may have ended well between the first look and the lock.
                check_out(out, replaceable)
                for left in (partial, earlier):
                    shutil.rmtree(left, ignore_errors=True)
            partial.mkdir()
        except OSError as error:
            if isinstance(error, FileExistsError) and partial.exists():
                raise RunError(
                    f"--out: {partial} exists: another run is writing to {out}, or one was killed; "
                    "then remove it"
                ) from error
            raise cannot_write(f"--out: {out.parent}", error) from error
        try:
            yield partial
            if out.is_dir():
                out.rename(earlier)
            partial.rename(out)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
            shutil.rmtree(earlier, ignore_errors=True)


def check_out(out: Path, replaceable: Collection[str] = (), argument: str = "--out") -> None:
    """Refuse a folder to write that would overwrite something."""
    if out.exists() and not (out.is_dir() and all(p.name in replaceable for p in out.iterdir())):
        raise RunError(f"{argument}: {out} exists and is not an empty folder; choose another or remove it")


def save_run(folder: Path, run: Mapping[str, Any], state: Mapping[str, Tensor]) -> None:
    """Write the learned tensors and the description of the run.

    Raises:
        OSError: naming the file that cannot be written.
    """
    tensors = {key: value.detach().contiguous().clone() for key, value in state.items()}
    with writing(folder / STATE):
        (folder / STATE).write_bytes(save(tensors))
    with writing(folder / RUN):
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
