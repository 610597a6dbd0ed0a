"""One run a folder: a second is refused, a killed one bars nobody."""

import errno
import fcntl
import os
import re
import signal
import subprocess
import sys
import threading
import time

import pytest

from spa_fast.cil.checkpoint import new_run_folder
from spa_fast.cil.errors import RunError
from spa_fast.cil.lock import exclusive, holder
from spa_fast.cli import main


def left(folder):
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("."))


def test_a_second_run_is_refused_and_disturbs_nothing(tmp_path):
    out = tmp_path / "r"
    with new_run_folder(out) as folder:
        (folder / "metrics.jsonl").write_text("first")
        with pytest.raises(
            RunError, match=rf"--out: another run is writing to .*r \(process {os.getpid()} on"
        ):
            new_run_folder(out).__enter__()
        assert (folder / "metrics.jsonl").read_text() == "first"
    assert (out / "metrics.jsonl").read_text() == "first"
    assert left(tmp_path) == []


def test_what_a_killed_run_left_is_cleared_away(tmp_path):
    (tmp_path / ".r.partial").mkdir()
    (tmp_path / ".r.partial" / "metrics.jsonl").write_text("old")
    (tmp_path / ".r.lock").write_text("process 1 on elsewhere")
    with new_run_folder(tmp_path / "r") as folder:
        assert list(folder.iterdir()) == []
    assert left(tmp_path) == []


def test_a_run_that_ended_while_waiting_is_not_overwritten(tmp_path, monkeypatch):
    out, flock = tmp_path / "r", fcntl.flock

    def end_first(*args):
        out.mkdir(exist_ok=True)
        (out / "results.json").write_text("done")
        flock(*args)

    monkeypatch.setattr(fcntl, "flock", end_first)
    with pytest.raises(RunError, match="not an empty folder"):
        new_run_folder(out).__enter__()
    assert (out / "results.json").read_text() == "done"
    assert left(tmp_path) == []


def test_a_lock_file_removed_by_its_holder_is_made_anew(tmp_path, monkeypatch):
    path, flock, calls = tmp_path / "lock", fcntl.flock, []

    def removed_meanwhile(*args):
        if not calls:
            path.unlink()
        calls.append(1)
        flock(*args)

    monkeypatch.setattr(fcntl, "flock", removed_meanwhile)
    with exclusive(path, "busy"):
        assert len(calls) == 2
        with pytest.raises(RunError, match="busy"):
            exclusive(path, "busy").__enter__()
    assert not path.exists()


def test_who_waits_says_so_and_gets_the_lock_next(tmp_path):
    path, said, got = tmp_path / "lock", [], []

    def waiter():
        with exclusive(path, "busy", wait=said.append) as held:
            got.append((held, holder(path)))

    with exclusive(path, "busy"):
        waiting = threading.Thread(target=waiter)
        waiting.start()
        until = time.monotonic() + 60
        while not said and time.monotonic() < until:
            time.sleep(0.01)
        assert re.fullmatch(rf"busy \(process {os.getpid()} on .* UTC\); waiting", said[0])
        assert not got
    waiting.join()
    assert len(said) == 1
    assert got[0][0] is True
    assert got[0][1].startswith(f"process {os.getpid()} on ")
    assert not path.exists()


def test_a_lock_removed_by_hand_leaves_the_next_holder_its_file(tmp_path):
    path = tmp_path / "lock"
    with exclusive(path, "busy"):
        path.unlink()
        second = exclusive(path, "busy")
        second.__enter__()
    assert holder(path)
    second.__exit__(None, None, None)
    assert not path.exists()


def test_a_file_system_without_locks(tmp_path, monkeypatch):
    def none(*args):
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr(fcntl, "flock", none)
    with new_run_folder(tmp_path / "r"), pytest.raises(RunError, match="or one was killed; then remove it"):
        new_run_folder(tmp_path / "r").__enter__()
    assert (tmp_path / "r").is_dir()
    assert left(tmp_path) == []


def test_a_run_killed_outright(colours, backbone_config, tmp_path, capsys):
    """A run in another process: refused beside it, killed, then done in its place."""
    args = ["train", "--data", str(colours[0]), "--descriptions", str(colours[1]), "--k", "4"]
    args += ["--backbone", f"config:{backbone_config}", "--out", str(tmp_path / "runs" / "r")]
    command = [sys.executable, "-m", "spa_fast.cli", *args, "--epochs", "1000000"]
    metrics = tmp_path / "runs" / ".r.partial" / "metrics.jsonl"
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        try:
            until = time.monotonic() + 120
            while not (metrics.exists() and metrics.stat().st_size):
                assert process.poll() is None
                assert time.monotonic() < until
                time.sleep(0.05)
            assert main([*args, "--epochs", "1"]) == 2
            error = capsys.readouterr().err
            assert re.search(rf"another run is writing to .*r \(process {process.pid} on .* UTC\)", error)
            assert metrics.exists()
        finally:
            process.send_signal(signal.SIGKILL)
    # Every epoch was on disk as it ended.
    assert metrics.read_text().startswith('{"kind": "epoch", "stage": 0, "epoch": 0, "loss"')
    assert left(tmp_path / "runs") == [".r.lock", ".r.partial"]
    assert main([*args, "--epochs", "1"]) == 0
    assert left(tmp_path / "runs") == []
