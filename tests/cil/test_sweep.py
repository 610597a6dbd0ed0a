"""Sweeps: which runs, what is finished, what failed, mean and spread, interruption."""

import csv
import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from folder_twins import write_twin

from spa_fast.cil.data.catalog import DATA_SETS, description_file
from spa_fast.cil.errors import RunError
from spa_fast.cil.finished import check_inputs, finished, hash_reader
from spa_fast.cil.lock import exclusive
from spa_fast.cil.presets import preset_config
from spa_fast.cil.sweep import plan, run_sweep, slots
from spa_fast.cli import main, split_sweep

AIRCRAFT, FOOD = "aircraft_B0_Inc50", "food101_B0_Inc50"


@pytest.fixture(scope="module")
def data_root(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    for key in ("aircraft", "food101"):
        write_twin(root, DATA_SETS[key], 100, 100)
    return root


@pytest.fixture(scope="module")
def arguments(data_root, backbone_config):
    return [
        "--data-root",
        str(data_root),
        "--backbone",
        f"config:{backbone_config}",
        "--method",
        "simple_cil",
    ]


@pytest.fixture(scope="module")
def done(arguments, tmp_path_factory):
    """A finished run as a sweep of one has it."""
    out = tmp_path_factory.mktemp("sweep")
    (run,) = plan(_config(arguments), ["train", "--preset", AIRCRAFT, *arguments], 1, "order", out)
    assert main(list(run.arguments)) == 0
    return run


@pytest.fixture
def one(done, tmp_path):
    """A copy of it to damage."""
    folder = tmp_path / "sweep" / done.folder.name
    shutil.copytree(done.folder, folder)
    return dataclasses.replace(done, folder=folder)


def _config(arguments):
    config = preset_config(AIRCRAFT, Path(arguments[1]) / "aircraft")
    return type(config).from_dict({**config.as_dict(), "backbone": arguments[3], "method": "simple_cil"})


# --- which runs


def test_orders_go_up_as_in_lamdas_seed_lists(tmp_path):
    config = preset_config("cub_B0_Inc20", tmp_path)
    runs = plan(config, ["train"], 3, "order", tmp_path)
    assert [(run.config.order_seed, run.config.seed) for run in runs] == [(1993, 1), (1994, 1), (1995, 1)]
    assert runs[0].folder.name == "cub_B0_Inc20-spa-ViT-B-16-laion400m_e32-seed1"
    assert [run.folder.name for run in runs[1:]] == [f"{runs[0].folder.name}-order{n}" for n in (1994, 1995)]
    assert runs[1].arguments == ("train", "--order-seed", "1994", "--out", str(runs[1].folder))


def test_or_training_seeds_under_one_order(tmp_path):
    runs = plan(preset_config("cub_B0_Inc20", tmp_path), ["train"], 3, "training", tmp_path)
    assert [(run.config.order_seed, run.config.seed) for run in runs] == [(1993, 1), (1993, 2), (1993, 3)]
    assert runs[2].arguments[1:3] == ("--seed", "3")


def test_devices_are_filled(monkeypatch):
    assert slots(None, 1) == ["cpu"]
    assert slots("cpu", 3) == ["cpu"] * 3
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    assert slots(None, 1) == slots("cuda", 2) == ["cuda:0", "cuda:1", "cuda:2"]
    assert slots("cuda:1", 1) == ["cuda:1"]
    assert slots("cpu", 2) == ["cpu"] * 2


def test_own_arguments_and_those_of_train():
    settings = ("--k", "4", "--templates", "x", "y", "--lr=1")
    mixed = ["a", "b", *settings[:2], "--seeds", "2", "--data_root=D", *settings[2:], "--out", "o"]
    assert split_sweep(mixed) == (["a", "b", "--seeds", "2", "--data_root=D", "--out", "o"], settings)
    assert split_sweep(["--help"]) == (["--help"], ())


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ((), "sweep: expected presets before any other argument"),
        (("--seeds", "2", AIRCRAFT), "sweep: expected presets before any other argument"),
        ((AIRCRAFT, "--seeds", "0"), "expected --seeds >= 1 and --jobs >= 1, got 0 and 1"),
        ((AIRCRAFT, "--jobs", "0"), "got 3 and 0"),
        ((AIRCRAFT, FOOD, "--data", "x"), "--data: expected --data-root with 2 presets"),
        ((AIRCRAFT, "aircraft_b0_inc50", "--data-root", "ROOT"), "a preset is named twice"),
        (("aircraft_B0_Inc", "--data-root", "ROOT"), "did you mean 'aircraft_B0_Inc10'"),
        ((AIRCRAFT, "--data-root", "/no/root"), "--data-root: no such folder"),
        ((AIRCRAFT, "--data-root", "ROOT", "--k", "0"), "k: expected at least 1"),
    ],
)
def test_refused_before_any_run(args, words, data_root, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["sweep", *(str(data_root) if a == "ROOT" else a for a in args)]) == 2
    assert words in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


# --- what is finished


def test_a_finished_run_is_recognised_wherever_it_was_computed(one):
    row = finished(one.folder, one.config)
    assert row["last"] == row["accuracies"][-1]
    path = one.folder / "results.json"
    path.write_text(path.read_text().replace('"device": "cpu"', '"device": "cuda:3"'))
    assert finished(one.folder, one.config) == json.loads(path.read_text())
    assert finished(one.folder.with_name("none"), one.config) is None


def _no_key(row):
    return {key: value for key, value in row.items() if key != "matrix"}


@pytest.mark.parametrize(
    "damage",
    [
        lambda row: "",
        lambda row: json.dumps(row)[:-40],
        lambda row: "[1]",
        lambda row: json.dumps(_no_key(row)),
        lambda row: json.dumps({**row, "average": row["average"] + 1}),
        lambda row: json.dumps({**row, "last": row["last"] + 1}),
        lambda row: json.dumps({**row, "accuracies": row["accuracies"][:1]}),
        lambda row: json.dumps({**row, "bwt": float("nan")}),
        lambda row: json.dumps({**row, "bwt": "3"}),
        lambda row: json.dumps({**row, "accuracies": []}),
        lambda row: json.dumps({**row, "config": {}}),
    ],
)
def test_damaged_results_are_no_results(one, damage):
    path = one.folder / "results.json"
    path.write_text(damage(json.loads(path.read_text())))
    assert finished(one.folder, one.config) is None


def test_missing_or_short_state_is_no_result(one):
    state = one.folder / "model.safetensors"
    state.write_bytes(state.read_bytes()[:-8])
    assert finished(one.folder, one.config) is None
    state.unlink()
    assert finished(one.folder, one.config) is None


def test_foreign_folders_and_other_settings_are_refused(one):
    path = one.folder / "results.json"
    text = path.read_text()
    path.write_text(text.replace('"increment": 50', '"increment": 25').replace('"lr": 0.05', '"lr": 0.1'))
    with pytest.raises(RunError, match=r"other settings \(increment, lr\); remove it"):
        finished(one.folder, one.config)
    path.write_text(text)
    (one.folder / "thesis.tex").write_text("x")
    with pytest.raises(RunError, match="no run folder; remove it"):
        finished(one.folder, one.config)


def test_a_run_belongs_to_its_inputs(one, backbone_config, tmp_path):
    """Copied or touched data are the same; other images, class names or encoders are not."""
    row = finished(one.folder, one.config)

    def other(**changes):
        config = dataclasses.replace(one.config, order_seed=7, seed=8, **changes)
        try:
            check_inputs(one.folder, row, hash_reader()(config))
        except RunError as error:
            return re.fullmatch(r".* holds a run from other inputs \((.*)\); remove it", str(error))[1]
        return ""

    data = tmp_path / "aircraft"
    shutil.copytree(one.config.data, data, copy_function=shutil.copyfile)
    assert other(data=data) == ""
    image = next((data / "test").rglob("*.jpg"))
    extra = image.with_name("extra.jpg")
    shutil.copyfile(image, extra)
    assert other(data=data) == "data_sha256"
    extra.unlink()
    assert other(data=data) == ""
    image.write_bytes(image.read_bytes() + b"x")
    assert other(data=data) == "data_sha256"
    names = {folder.name: f"{folder.name} plane" for folder in (data / "train").iterdir()}
    (tmp_path / "names.json").write_text(json.dumps(names))
    assert other(classnames=tmp_path / "names.json") == "data_sha256"
    encoder = backbone_config.with_name("other.json")
    encoder.write_text(backbone_config.read_text().replace('"patch_size": 8', '"patch_size": 4'))
    assert other(backbone=f"config:{encoder}") == "backbone_fingerprint"
    assert other(transform="openclip") == "backbone_fingerprint"
    row["protocol"].pop("data_sha256")
    assert other() == "data_sha256"


# --- whole sweeps


def test_resuming_with_other_descriptions_is_refused(arguments, tmp_path, capsys):
    texts = tmp_path / "texts.json"
    text = description_file(DATA_SETS["aircraft"]).read_text()
    texts.write_text(text)
    args = ["sweep", AIRCRAFT, "--seeds", "1", *arguments, "--out", str(tmp_path / "sweep")]
    args += ["--descriptions", str(texts), "--method", "zero_shot", "--zero-shot-texts", "descriptions"]
    assert main(args) == 0
    assert main(args) == 0
    assert "finished before: aircraft" in capsys.readouterr().out
    texts.write_text(text.replace("engine", "motor"))
    assert main(args) == 1
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("failed: ")]
    assert "holds a run from other inputs (descriptions_sha256); remove it" in line
    texts.write_text(text)
    assert main(args) == 0


def test_a_sweep_with_a_failing_preset_resumed(data_root, arguments, tmp_path, capsys):
    root = tmp_path / "data"
    shutil.copytree(data_root, root)
    broken = next((root / "food").rglob("*.jpg"))
    picture = broken.read_bytes()
    broken.write_bytes(b"\xff\xd8 broken")
    out = tmp_path / "sweep"
    args = ["sweep", AIRCRAFT, FOOD, "--seeds", "1", "--jobs", "2", *arguments, "--out", str(out)]
    args[args.index("--data-root") + 1] = str(root)

    def lines(code):
        capsys.readouterr()
        assert main(args) == code
        return capsys.readouterr().out.splitlines()

    said = lines(1)
    assert len([line for line in said if line.startswith("finished: aircraft")]) == 1
    (failed,) = [line for line in said if line.startswith("failed: food")]
    assert "exit code 2: unreadable image" in failed
    assert broken.name in failed
    assert any(re.match(rf"{FOOD} +simple_cil +0 of 1 +- ", line) for line in said)
    assert any("settings changed from the preset: backbone, method" in line for line in said)

    # Repaired, what failed is run; so is what was damaged meanwhile.
    broken.write_bytes(picture)
    (aircraft,) = out.glob("aircraft_*")
    (aircraft / "results.json").write_text("")
    said = lines(0)
    assert len([line for line in said if line.startswith("finished: ")]) == 2
    with (out / "sweep.csv").open() as file:
        table = {row["preset"]: row for row in csv.DictReader(file)}
    row = json.loads((aircraft / "results.json").read_text())
    assert (table[AIRCRAFT]["n"], table[AIRCRAFT]["order_seeds"]) == ("1", "1993")
    assert float(table[AIRCRAFT]["average_mean"]) == pytest.approx(row["average"], abs=1e-4)

    assert [line.split(":")[0] for line in lines(0)[:2]] == ["finished before"] * 2


def test_presets_take_turns(arguments, tmp_path, monkeypatch):
    planned = []
    monkeypatch.setattr("spa_fast.cil.sweep.run_sweep", lambda runs, *args: planned.extend(runs) or 0)
    assert main(["sweep", AIRCRAFT, FOOD, "--seeds", "2", *arguments, "--out", str(tmp_path)]) == 0
    assert [run.config.preset for run in planned] == [AIRCRAFT, FOOD] * 2
    assert [run.config.order_seed for run in planned] == [1993, 1993, 1994, 1994]


def test_mean_and_sample_deviation(one, tmp_path, monkeypatch):
    config, folder = one.config, one.folder
    runs = plan(config, ["train"], 3, "order", folder.parent)
    rows = {
        run.folder: {**dict.fromkeys(("average", "last", "forgetting", "bwt"), v), "protocol": {}}
        for run, v in zip(runs, (1, 2, 6), strict=True)
    }
    monkeypatch.setattr("spa_fast.cil.sweep.finished", lambda folder, config: rows[folder])
    monkeypatch.setattr("spa_fast.cil.sweep.hash_reader", lambda: lambda config: {})
    heard = []
    assert run_sweep(runs, tmp_path / "all", ["cpu"], heard.append) == 0
    # (1, 2, 6): mean 3, sample variance (4 + 1 + 9) / 2 = 7.
    assert "3.00 ± 2.65" in heard[-2]
    with (tmp_path / "all" / "sweep.csv").open() as file:
        (line,) = csv.DictReader(file)
    assert (line["n"], line["last_mean"], line["last_std"]) == ("3", "3.0000", "2.6458")
    assert run_sweep(runs[:1], tmp_path / "one", ["cpu"], heard.append) == 0
    assert "1.00" in heard[-2]
    assert "± 0" not in heard[-2]
    with (tmp_path / "one" / "sweep.csv").open() as file:
        assert next(csv.DictReader(file))["last_std"] == ""


def test_two_sweeps_in_one_folder(arguments, tmp_path, capsys):
    with exclusive(tmp_path / ".sweep.lock", "held"):
        assert main(["sweep", AIRCRAFT, *arguments, "--out", str(tmp_path)]) == 2
    assert f"--out: another sweep is filling {tmp_path} (process {os.getpid()}" in capsys.readouterr().err


def test_a_sweep_survives_a_killed_run(data_root, backbone_config, tmp_path, capsys):
    """SIGKILL in the middle of training costs that run alone; the same command does it again, and only it."""
    out = tmp_path / "sweep"
    args = [*("sweep", AIRCRAFT, "--seeds", "3", "--data-root", str(data_root), "--out", str(out))]
    args += ["--backbone", f"config:{backbone_config}", "--epochs", "60", "--k", "4"]
    with subprocess.Popen([sys.executable, "-m", "spa_fast.cli", *args], stdout=subprocess.PIPE) as process:
        try:
            until = time.monotonic() + 120
            # The first run, while it trains.
            while not (begun := list(out.glob(".*.partial/metrics.jsonl"))):
                assert process.poll() is None
                assert time.monotonic() < until
                time.sleep(0.02)
            partial = begun[0].parent
            lock = partial.with_suffix(".lock")
            os.kill(int(lock.read_text().split()[1]), signal.SIGKILL)
            said = process.communicate(timeout=240)[0].decode()
        finally:
            process.kill()
    assert process.returncode == 1
    assert f"failed: {AIRCRAFT}, order 1993, seed 1: ended by SIGKILL (" in said
    assert re.findall(r"^finished: .*order (\d+)", said, re.MULTILINE) == ["1994", "1995"]
    assert partial.is_dir()
    before = {path: path.read_bytes() for path in out.glob("*/results.json")}
    assert main(args) == 0
    said = capsys.readouterr().out
    assert re.findall(r"^(\w+)[^:]*: .*order (\d+)", said, re.MULTILINE) == [
        *(("finished", "1994"), ("finished", "1995"), ("started", "1993"), ("finished", "1993"))
    ]
    assert {path: path.read_bytes() for path in before} == before
    assert not lock.exists()
    assert not partial.exists()
    with (out / "sweep.csv").open() as file:
        assert next(csv.DictReader(file))["order_seeds"] == "1993 1994 1995"


def test_an_interrupted_sweep_ends_its_children(one, arguments):
    """The finished run stays; the children, which would train for ever, are gone with their folders."""
    out = one.folder.parent
    endless = [*arguments[:-2], "--epochs", "1000000", "--k", "4", "--out", str(out)]
    command = [sys.executable, "-m", "spa_fast.cli", "sweep", AIRCRAFT, FOOD, "--seeds", "1", "--jobs", "2"]
    with subprocess.Popen([*command, *endless], stdout=subprocess.PIPE, text=True) as process:
        try:
            until = time.monotonic() + 120
            while len(list(out.glob(".*.partial/metrics.jsonl"))) < 2:
                assert process.poll() is None
                assert time.monotonic() < until
                time.sleep(0.1)
            children = [int(path.read_text().split()[1]) for path in out.glob(".a*.lock")]
            children += [int(path.read_text().split()[1]) for path in out.glob(".f*.lock")]
            assert len(children) == 2
            process.send_signal(signal.SIGINT)
            assert process.wait(60) == 130
        finally:
            process.kill()
    for child in children:
        with pytest.raises(ProcessLookupError):
            os.kill(child, 0)
    assert [path.name for path in out.iterdir() if path.name.startswith(".")] == []
    assert finished(one.folder, one.config)
