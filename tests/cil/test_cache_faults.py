"""Damage, crashes, full disks, second writers: what is stored stays whole, what is bad is rebuilt alone."""

import contextlib
import fcntl
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from spa_fast.cil.backbone import Backbone
from spa_fast.cil.checkpoint import STATE, new_run_folder
from spa_fast.cil.data import shards
from spa_fast.cil.data.cache import FeatureCache
from spa_fast.cil.data.cache_folders import cache_clear
from spa_fast.cil.data.datasets import read_image_folders
from spa_fast.cil.errors import RunError
from spa_fast.cil.loading import load_backbone
from spa_fast.cil.lock import holder
from spa_fast.cil.tracking import LOG
from spa_fast.cli import main


@pytest.fixture
def make(colours, backbone, tmp_path):
    """Another process's view of one cache; what it says is in `said`."""
    data = read_image_folders(colours[0])

    def view(folder=tmp_path / "cache"):
        said = []
        cache = FeatureCache(folder, data, backbone, say=said.append)
        cache.said = said
        return cache

    return view


@pytest.fixture
def full(make):
    cache = make()
    cache.fill()
    return cache


def content(cache):
    return {file.name: file.read_bytes() for file in cache.folder.glob("*.safetensors")}


def sealed(cache):
    """Every shard's checksum; the order of a header's keys is safetensors' own."""
    sums = {}
    for file in cache.folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as shard:
            sums[file.name] = shard.metadata()["sha256"]
    return sums


def wait_for(said):
    end = time.monotonic() + 60
    while not said and time.monotonic() < end:
        time.sleep(0.01)
    assert said


@contextlib.contextmanager
def unprivileged():
    """Root may write anywhere; nobody may not."""
    if os.geteuid():
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@contextlib.contextmanager
def small_files(size):
    """No file grows beyond `size` bytes: a write fails as on a full disk, by an error that names no file."""
    old, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, handler)


def rebuilt_alone(cache, before, sums, name, word):
    """One shard is named, extracted again, and equal to what it was."""
    assert len(cache.missing()) == (6 if name.startswith("train") else 3)
    cache.fill()
    after = content(cache)
    assert [other for other in before if after[other] != before[other]] in ([], [name])
    assert sealed(cache) == sums
    assert len(cache.said) == 2
    assert name in cache.said[0]
    assert word in cache.said[0]
    assert not list(cache.folder.glob("*.partial"))


@pytest.mark.parametrize("at", [0, 1, 8, 100, 700, -64, -1])
def test_a_truncated_shard(full, make, at):
    before, sums = content(full), sealed(full)
    [shard] = full.folder.glob("train-0004-*")
    shard.write_bytes(before[shard.name][:at])
    rebuilt_alone(make(), before, sums, shard.name, "unreadable")


def test_a_flipped_bit_anywhere(full, make):
    before, sums = content(full), sealed(full)
    [shard] = full.folder.glob("test-0001-*")
    whole = before[shard.name]
    # The header is padded with blanks, which mean nothing.
    header = len(whole[8 : 8 + int.from_bytes(whole[:8], "little")].rstrip()) + 8
    later, bad = make(), []
    for at in [*range(0, header, 7), *range(len(whole) - 1, header + 8, -997)]:
        damaged = bytearray(whole)
        damaged[at] ^= 1 << (at % 8)
        shard.write_bytes(damaged)
        bad.append(later._fault("test", 1))
    assert all(bad)
    assert "its checksum differs" in bad
    rebuilt_alone(make(), before, sums, shard.name, bad[-1])


@pytest.mark.parametrize("name", ["train-0002-*", "test-0001-*"])
def test_the_next_run_mends_what_verify_names(name, colours, backbone_config, tmp_path, capsys, monkeypatch):
    root, calls, real = tmp_path / "features", [], Backbone.encode_images
    monkeypatch.setattr(Backbone, "encode_images", lambda *a: calls.append(len(a[1])) or real(*a))
    args = [
        "train",
        "--data",
        str(colours[0]),
        "--descriptions",
        str(colours[1]),
        "--k",
        "4",
        "--epochs",
        "1",
    ]
    args += ["--backbone", f"config:{backbone_config}", "--cache", str(root), "--out"]
    verify = ["cache", "verify", "--cache", str(root)]
    assert main([*args, str(tmp_path / "a")]) == 0
    [shard] = root.glob(f"*/*/{name}")
    before = {file: file.stat().st_mtime_ns for file in root.rglob("*.safetensors")}
    damaged = bytearray(shard.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    shard.write_bytes(damaged)
    capsys.readouterr()
    assert main(verify) == 1
    said = capsys.readouterr().out
    assert f"{shard}: its checksum differs" in said
    assert f"1 of {len(before)} shards cannot be used; nothing was changed" in said
    assert "the next train or eval with the same data" in said
    assert shard.read_bytes() == damaged
    calls.clear()
    assert main([*args, str(tmp_path / "b")]) == 0
    assert f"{shard.name}: its checksum differs; extracted again" in capsys.readouterr().out
    assert calls == [6 if name.startswith("train") else 3]
    after = {file: file.stat().st_mtime_ns for file in root.rglob("*.safetensors")}
    assert [file for file in before if after[file] != before[file]] == [shard]
    assert main(verify) == 0
    results = [json.loads((tmp_path / run / "results.json").read_text())["matrix"] for run in "ab"]
    assert results[0] == results[1]


def test_a_damaged_text_shard_is_named_and_encoded_again(full, make):
    kept = full.texts.encode(["a wing"])
    [shard] = full.texts.shards.path.glob("*.safetensors")
    damaged = bytearray(shard.read_bytes())
    damaged[-3] ^= 1
    shard.write_bytes(damaged)
    later = make()
    assert torch.equal(later.texts.encode(["a wing"]), kept)
    assert later.said == [f"feature cache: {shard}: its checksum differs; encoded again"]
    assert torch.equal(make().texts.encode(["a wing"]), kept)
    assert len(later.said) == 1


def test_a_damaged_description_is_named_and_mended(full, make, capsys):
    about = full.folder / shards.ABOUT
    before, root = about.read_bytes(), str(full.folder.parents[1])
    for content in (b"", before[:40]):
        about.write_bytes(content)
        for action, code in (("verify", 1), ("info", 0), ("clear", 0)):
            assert main(["cache", action, "--cache", root]) == code
            assert f"{about}: unreadable" in capsys.readouterr().out
        assert len(list(full.folder.glob("*.safetensors"))) == 14
        make().fill()
        assert about.read_bytes() == before
    assert main(["cache", "verify", "--cache", root]) == 0


def test_swapped_shards(full, make):
    before, sums = content(full), sealed(full)
    first, second = (next(full.folder.glob(f"test-000{i}-*")) for i in (2, 5))
    first.write_bytes(before[second.name])
    second.write_bytes(before[first.name])
    later = make()
    later.fill()
    assert sealed(later) == sums
    assert sum("another class's" in line for line in later.said) == 2


def test_a_shard_of_another_encoder(full, make, backbone_config, tmp_path):
    squash = load_backbone(f"config:{backbone_config}", transform="lamda")
    other = FeatureCache(tmp_path / "cache", full.data, squash)
    other.fill()
    before, sums = content(full), sealed(full)
    [name] = [name for name in before if name.startswith("train-0000")]
    shutil.copy(other.folder / name, full.folder / name)
    rebuilt_alone(make(), before, sums, name, "encoder's")


def test_damage_during_a_run(full):
    kept = full.load("test", 3).globals.clone()
    [shard] = full.folder.glob("test-0003-*")
    damaged = bytearray(shard.read_bytes())
    damaged[-9] ^= 4
    shard.unlink()
    shard.write_bytes(damaged)
    assert torch.equal(full.load("test", 3).globals, kept)
    assert "its checksum differs" in full.said[-2]


CHILD = """
import os, signal, sys
from pathlib import Path
from spa_fast.cil.data.cache import FeatureCache
from spa_fast.cil.data.datasets import read_image_folders
from spa_fast.cil.loading import load_backbone
real, left = os.fsync, [4]
def dying(file):
    left[0] -= 1
    if not left[0]:
        os.truncate(file, 500)
        os.kill(os.getpid(), signal.SIGKILL)
    real(file)
os.fsync = dying
FeatureCache(Path(sys.argv[1]), read_image_folders(Path(sys.argv[2])), load_backbone(sys.argv[3])).fill()
"""


def test_killed_while_writing(make, backbone, monkeypatch):
    cache = make()
    args = [str(cache.folder.parents[1]), str(cache.data.root), backbone.name]
    done = subprocess.run([sys.executable, "-c", CHILD, *args], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert len(list(cache.folder.glob("*.partial"))) == 1
    assert len(content(cache)) == 2
    assert not holder(cache.folder / shards.LOCK)
    calls, real = [], Backbone.encode_images
    monkeypatch.setattr(Backbone, "encode_images", lambda *a: calls.append(1) or real(*a))
    cache.fill()
    assert len(calls) == 12
    assert len(content(cache)) == 14
    assert not list(cache.folder.glob("*.partial"))
    assert len(cache.said) == 1


def test_two_writers_share_the_work(make, monkeypatch):
    calls, real = [], Backbone.encode_images
    monkeypatch.setattr(Backbone, "encode_images", lambda *a: calls.append(1) or real(*a))
    caches = [make() for _ in range(3)]
    threads = [threading.Thread(target=cache.fill) for cache in caches]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 14
    assert not any(cache.missing() for cache in caches)
    said = [line for cache in caches for line in cache.said]
    assert sum(line.startswith("features: 63 images") for line in said) == 1


def test_a_second_writer_says_whom_it_waits_for(make):
    first, second = make(), make()
    with first.shards.lock(first.say):
        assert f"process {os.getpid()} on " in holder(first.folder / shards.LOCK)
        waiting = threading.Thread(target=second.fill)
        waiting.start()
        wait_for(second.said)
        assert f"another process writes to it (process {os.getpid()} on " in second.said[0]
        assert second.said[0].endswith("; waiting")
        assert not content(first)
        # The folder is known by its description, written with the first shard.
        (first.folder / shards.ABOUT).write_text('{"format": "spa_fast.features/2"}')
        with pytest.raises(RunError, match=r"writes to it; nothing was removed"):
            cache_clear(first.folder.parents[1], first.say)
    waiting.join()
    assert len(content(second)) == 14
    assert not holder(first.folder / shards.LOCK)


def test_a_cache_cleared_under_a_waiting_writer(make):
    first, second = make(), make()
    with first.shards.lock(first.say):
        waiting = threading.Thread(target=second.fill)
        waiting.start()
        wait_for(second.said)
        (first.folder / shards.LOCK).unlink()
    waiting.join()
    assert len(content(second)) == 14
    assert not (first.folder / shards.LOCK).exists()


def test_a_file_system_without_locks(make, monkeypatch):
    def refuse(descriptor, flags):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    cache = make()
    cache.fill()
    assert "no locks on this file system" in cache.said[0]
    assert not cache.missing()


def test_a_full_disk_leaves_the_old_state(full, make):
    before = content(full)
    image = full.data.images["train"][0][0]
    image.write_bytes(full.data.images["train"][1][0].read_bytes())
    later, named = make(), r"--cache: .*train-0000.*cannot write.*stored before is whole"
    with small_files(2000), pytest.raises(OSError, match=named):
        later.fill()
    assert content(full) == before
    assert not list(full.folder.glob("*.partial"))
    make().fill()
    assert len([name for name, kept in content(full).items() if kept == before[name]]) == 13


def test_too_little_space_is_found_before_the_work(
    make, monkeypatch, colours, backbone_config, tmp_path, capsys
):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(OSError, match=r"GB needed, 0.00 GB free"):
        make().fill()
    args = ("--backbone", f"config:{backbone_config}", "--method", "simple_cil", "--out", str(tmp_path / "r"))
    assert main(["train", "--data", str(colours[0]), *args]) == 3
    assert "GB free" in capsys.readouterr().err


def test_read_only_folders(colours, backbone):
    with tempfile.TemporaryDirectory() as scratch:
        os.chmod(scratch, 0o755)
        data = read_image_folders(shutil.copytree(colours[0], Path(scratch) / "colours"))

        def make(folder):
            return FeatureCache(folder, data, backbone)

        cache = make(Path(scratch) / "my ü cache")
        cache.fill()
        cache.texts.encode(["a wing"])
        [shard] = cache.folder.glob("test-0003-*")
        for folder in (Path(scratch), *(p for p in Path(scratch).rglob("*") if p.is_dir())):
            folder.chmod(0o555)
        try:
            with unprivileged():
                later = make(cache.folder.parents[1])
                assert not later.missing()
                later.fill()
                assert len(later.load("test", 3)) == 3
                assert later.texts.encode(["a tail"]).shape == (1, 24)
            shard.chmod(0o644)
            os.truncate(shard, 40)
            with unprivileged():
                later = make(cache.folder.parents[1])
                with pytest.raises(OSError, match=r"--cache: .*cannot write.*missing"):
                    later.fill()
        finally:
            for folder in (Path(scratch), *(p for p in Path(scratch).rglob("*") if p.is_dir())):
                folder.chmod(0o755)


def test_a_folder_that_cannot_be_made_is_refused_early(make, tmp_path):
    (tmp_path / "file").write_text("")
    blocked = make(tmp_path / "file")
    for attempt in (blocked.check_writable, blocked.fill, lambda: blocked.load("train", 0)):
        with pytest.raises(RunError, match=r"--cache: .*cannot write"):
            attempt()


def test_an_image_that_breaks_later_is_named_and_leaves_no_shard(make):
    cache = make()
    path = cache.data.images["train"][4][1]
    path.write_bytes(b"broken")
    with pytest.raises(RunError, match=str(path)):
        cache.load("train", 4)
    assert not content(cache)
    with pytest.raises(RunError, match=f"{path}: .*; train --exclude FILE leaves it out; what was stored"):
        cache.fill()
    # What came before it is stored and is not extracted again.
    assert 4 <= len(content(cache)) < 14
    assert not list(cache.folder.glob("*.partial"))


def test_cache_commands(full, make, capsys):
    root = str(full.folder.parents[1])
    full.texts.encode(["a wing"])
    assert main(["cache", "info", "--cache", root]) == 0
    out = capsys.readouterr().out
    assert "value_path" in out
    assert f"{full.folder.parent.name}/{full.key}" in out
    assert main(["cache", "verify", "--cache", root]) == 0
    assert "15 shards, all whole" in capsys.readouterr().out
    [shard] = full.folder.glob("test-0003-*")
    shard.write_bytes(shard.read_bytes()[:-7])
    assert main(["cache", "verify", "--cache", root]) == 1
    out = capsys.readouterr().out
    assert f"{shard}: unreadable" in out
    assert "1 of 15 shards" in out
    mine = full.folder / "notes.txt"
    mine.write_text("mine")
    other = full.folder.parents[1] / "weights" / "x"
    other.mkdir(parents=True)
    (other / "model.safetensors").write_bytes(b"mine")
    assert main(["cache", "clear", "--cache", root]) == 0
    assert [p.name for p in full.folder.iterdir()] == ["notes.txt"]
    assert (other / "model.safetensors").exists()
    for action in ("info", "verify", "clear"):
        assert main(["cache", action, "--cache", root]) == 2
    assert main(["cache", "info", "--cache", root + "/none"]) == 2
    assert "no such folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("size", "name"), [(0, r"\.r\.lock"), (100, LOG), (10_000, "curve.png"), (100_000, STATE)]
)
def test_a_full_disk_ends_a_run_in_one_line_and_leaves_nothing(
    size, name, colours, backbone_config, tmp_path, capsys, monkeypatch
):
    args = ["train", "--data", str(colours[0]), "--backbone", f"config:{backbone_config}"]
    args += ["--method", "simple_cil", "--cache", str(tmp_path / "cache")]
    assert main([*args, "--out", str(tmp_path / "warm")]) == 0
    if name == STATE:
        state = {"means": torch.zeros(100_000)}
        monkeypatch.setattr("spa_fast.cil.methods.simple_cil.SimpleCil.state_dict", lambda self: state)
    capsys.readouterr()
    with small_files(size):
        assert main([*args, "--out", str(tmp_path / "runs" / "r")]) == 3
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert re.search(rf"/{name}: cannot write: File too large", error)
    assert list((tmp_path / "runs").iterdir()) == []


def test_a_folder_that_takes_no_run(tmp_path):
    """Read-only is the disk's; a file in place of the folder is bad input."""
    with tempfile.TemporaryDirectory() as scratch:
        os.chmod(scratch, 0o555)
        with unprivileged(), pytest.raises(OSError, match=rf"--out: {scratch}: cannot write: .*denied"):
            new_run_folder(Path(scratch) / "r").__enter__()
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file" / "r", tmp_path / "file" / "deeper" / "r"):
        with pytest.raises(RunError, match=r"--out: .*file.*: cannot write"):
            new_run_folder(out).__enter__()
