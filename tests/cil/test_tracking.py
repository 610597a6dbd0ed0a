"""What a run writes as it goes, and trackers: present, absent, broken."""

import hashlib
import json
import sys
from types import SimpleNamespace

import pytest

from spa_fast.cil.config import SpaConfig
from spa_fast.cil.errors import RunError
from spa_fast.cil.metrics import AccuracyMatrix
from spa_fast.cil.report import lamda_summary
from spa_fast.cil.run_config import RunConfig
from spa_fast.cil.tracking import RunLog
from spa_fast.cil.train import replay, train
from spa_fast.cli import main

SPA = SpaConfig(epochs=2, k=4)
STAGES = 3


@pytest.fixture
def config(colours, backbone_config):
    return RunConfig(colours[0], f"config:{backbone_config}", descriptions=colours[1], increment=3, spa=SPA)


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


class Recorder:
    """All three libraries in one: keeps what it is called with, fails when told to."""

    def __init__(self, fails=""):
        self.calls, self.fails = [], fails
        self.summary = {}

    def _call(self, name, /, *args, **kwargs):
        self.calls.append((name, args, kwargs))
        if name == self.fails:
            raise ConnectionError("the server is gone\nsecond line")
        return self

    def __getattr__(self, name):
        return lambda *args, **kwargs: self._call(name, *args, **kwargs)

    def named(self, *names):
        return [(args, kwargs) for name, args, kwargs in self.calls if name in names]


MODULES = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb", "trackio": "trackio"}
START = {"tensorboard": "SummaryWriter", "wandb": "init", "trackio": "init"}
LOG = {"tensorboard": "add_scalar", "wandb": "log", "trackio": "log"}
END = {"tensorboard": "close", "wandb": "finish", "trackio": "finish"}
TRACKERS = sorted(MODULES)


@pytest.fixture
def install(monkeypatch):
    def put(track, fails=""):
        recorder = Recorder(fails)
        calls = {name: getattr(recorder, name) for name in ("init", "log", "finish", "SummaryWriter")}
        monkeypatch.setitem(sys.modules, MODULES[track], SimpleNamespace(**calls))
        return recorder

    return put


# --- always written


def test_metrics_hold_every_epoch_and_stage(config, tmp_path):
    row = train(config, tmp_path / "r")
    lines = read_lines(tmp_path / "r" / "metrics.jsonl")
    assert [line["kind"] for line in lines] == ["epoch", "epoch", "stage"] * STAGES
    epochs = [line for line in lines if line["kind"] == "epoch"]
    assert [(line["stage"], line["epoch"]) for line in epochs] == [
        (b, e) for b in range(STAGES) for e in (0, 1)
    ]
    assert [line["lr"] for line in epochs[:2]] == pytest.approx([0.05, 0.025])
    stages = [line for line in lines if line["kind"] == "stage"]
    assert [line["accuracy"] for line in stages] == row["accuracies"]
    assert [line["loss"] for line in stages] == [line["loss"] for line in epochs[1::2]]


def test_every_line_is_on_disk_before_the_next(tmp_path):
    heard = []
    log = RunLog(tmp_path, heard.append)
    for i in range(3):
        log.record("epoch", {"stage": 0, "epoch": i, "loss": 1.0})
        log.say(f"line {i}")
        assert len(read_lines(tmp_path / "metrics.jsonl")) == i + 1
        assert (tmp_path / "train.log").read_text().splitlines() == heard


def test_the_log_ends_like_lamdas(config, tmp_path):
    heard = []
    row = train(config, tmp_path / "r", heard.append)
    assert (tmp_path / "r" / "train.log").read_text() == "".join(line + "\n" for line in heard)
    curve, average = heard[-3:-1]
    assert curve.startswith("CNN top1 curve: [")
    values = json.loads(curve.removeprefix("CNN top1 curve: "))
    assert values == [round(a, 2) for a in row["accuracies"]]
    assert average == f"Average Accuracy (CNN): {round(sum(values) / STAGES, 2)}"


def test_lamdas_lines_by_hand():
    matrix = AccuracyMatrix()
    for correct, sizes in (([1], [4]), ([1, 2], [4, 2]), ([4, 2, 0], [4, 2, 3])):
        matrix.add_stage(correct, sizes)
    assert lamda_summary(matrix) == ["CNN top1 curve: [25.0, 50.0, 66.67]", "Average Accuracy (CNN): 47.22"]


def test_results_say_what_they_depend_on(config, tmp_path):
    train(config, tmp_path / "r")
    row = json.loads((tmp_path / "r" / "results.json").read_text())
    assert RunConfig.from_dict(row["config"]) == config.absolute()
    assert {"spa_fast", "python", "torch", "open_clip_torch", "numpy", "torchvision"} <= set(
        row["environment"]
    )
    protocol = row["protocol"]
    assert (protocol["replay"], protocol["stored_images"]) == ("pseudo", 0)
    assert protocol["seeds"] == {"order": 1993, "training": 1}
    assert protocol["backbone"] == config.absolute().backbone
    assert all(len(protocol[key]) == 64 for key in ("backbone_fingerprint", "data_sha256"))
    assert protocol["descriptions_sha256"] == hashlib.sha256(config.descriptions.read_bytes()).hexdigest()
    assert (protocol["transform"], protocol["templates"]) == ("openclip", ["a photo of a {}."])
    again = train(config, tmp_path / "s")
    assert len(row["run_id"]) == 12
    assert row["run_id"] != again["run_id"]
    assert row["started"] <= again["started"]


@pytest.mark.parametrize(
    ("method", "spa", "expected"),
    [
        ("spa", {}, "pseudo"),
        ("spa", {"pseudo_per_class": 0}, "pseudo"),
        ("spa", {"pseudo_per_class": 0, "local_replay": "none"}, "none"),
        ("spa", {"pseudo_per_class": 0, "local_pseudo_per_class": 0}, "none"),
        ("spa", {"pseudo_per_class": 0, "local_loss_weight": 0}, "none"),
        ("spa", {"pseudo_per_class": 0, "loss": "joint"}, "none"),
        ("simple_cil", {}, "none"),
        ("zero_shot", {}, "none"),
    ],
)
def test_replay_is_named(method, spa, expected, tmp_path):
    assert replay(RunConfig(tmp_path, "x/y", method=method, spa=SpaConfig(**spa))) == expected


# --- trackers


@pytest.mark.parametrize("track", TRACKERS)
def test_every_tracker_hears_the_same(track, config, install, tmp_path):
    recorder = install(track)
    row = train(config, tmp_path / "r", track=track)
    if track == "tensorboard":
        said = {(args[0], args[2]): args[1] for args, _ in recorder.named("add_scalar")}
        summary = {
            key.removeprefix("summary/"): v for (key, _), v in said.items() if key.startswith("summary")
        }
    else:
        said = {}
        for (figures,), _ in recorder.named("log"):
            kind = next((kind for kind in ("epoch", "stage") if kind in figures), None)
            said |= {(key, figures[kind]): v for key, v in figures.items() if kind and key != kind}
        if track == "wandb":
            summary = recorder.summary
        else:
            last = recorder.named("log")[-1][0][0]
            summary = {key.removeprefix("summary/"): value for key, value in last.items()}
    lines = read_lines(tmp_path / "r" / "metrics.jsonl")
    losses = [line["loss"] for line in lines if line["kind"] == "epoch"]
    assert [said["epoch/loss", step] for step in range(2 * STAGES)] == losses
    assert [said["stage/accuracy", step] for step in range(STAGES)] == row["accuracies"]
    assert said["stage/tasks_1", 2] == row["matrix"][2][1]
    assert all(isinstance(value, int | float) for value in said.values())
    assert summary == {key: row[key] for key in ("average", "last", "forgetting", "bwt")}
    assert len(recorder.named(END[track])) == 1
    if track != "tensorboard":
        assert recorder.named("init")[0][1]["config"]["spa"]["k"] == 4
        assert recorder.named("init")[0][1]["config"]["run_id"] == row["run_id"]
        assert recorder.named("init")[0][1]["name"] == "r"
    if track == "wandb":
        # It prints this folder when it has ended; the run folder's working name is gone by then.
        assert recorder.named("init")[0][1]["dir"] == str(tmp_path)


@pytest.mark.parametrize("track", TRACKERS)
def test_an_absent_tracker_names_its_extra(track, colours, backbone_config, monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, MODULES[track], None)
    args = ["--data", str(colours[0]), "--backbone", f"config:{backbone_config}", "--track", track]
    assert main(["train", *args, "--out", str(tmp_path / "runs" / "r")]) == 2
    error = capsys.readouterr().err
    assert f"--track: {track} is not installed" in error
    assert f"pip install 'spa_fast[{track}]'" in error
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("track", TRACKERS)
def test_a_tracker_that_does_not_start_ends_the_run_early(track, config, install, tmp_path):
    install(track, fails=START[track])
    with pytest.raises(
        RunError, match=f"--track: {track} does not start: ConnectionError: the server is gone sec"
    ):
        train(config, tmp_path / "runs" / "r", track=track)
    assert {path.name for path in (tmp_path / "runs").iterdir()} <= {"feature_cache"}


@pytest.mark.parametrize("track", TRACKERS)
@pytest.mark.parametrize("when", [LOG, END], ids=["log", "finish"])
def test_a_tracker_that_fails_on_the_way_is_warned_of_once(track, when, config, install, tmp_path):
    plain = train(config, tmp_path / "plain")
    recorder = install(track, fails=when[track])
    heard = []
    row = train(config, tmp_path / "r", heard.append, track=track)
    assert row["matrix"] == plain["matrix"]
    warnings = [line for line in heard if line.startswith("warning:")]
    assert warnings == [
        f"warning: --track {track} failed and is off: ConnectionError: the server is gone second line; "
        "the run goes on"
    ]
    assert warnings[0] in (tmp_path / "r" / "train.log").read_text()
    assert len(recorder.named(when[track])) == 1
    assert len(read_lines(tmp_path / "r" / "metrics.jsonl")) == 3 * STAGES


@pytest.mark.parametrize("track", TRACKERS)
def test_a_failing_run_ends_its_tracker(track, config, install, tmp_path, monkeypatch):
    recorder = install(track)

    def fail(*args):
        raise RunError("out of luck")

    monkeypatch.setattr("spa_fast.cil.train.write_run", fail)
    with pytest.raises(RunError, match="out of luck"):
        train(config, tmp_path / "r", track=track)
    assert len(recorder.named(END[track])) == 1
    assert track != "wandb" or recorder.named("finish")[0][1] == {"exit_code": 1}


def test_event_files_of_tensorboard(config, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    row = train(config, tmp_path / "r", track="tensorboard")
    events = EventAccumulator(str(tmp_path / "r" / "tensorboard"))
    events.Reload()
    read = [event.value for event in events.Scalars("stage/accuracy")]
    assert read == pytest.approx(row["accuracies"])


def test_keys_of_the_environment_stay_out_of_the_run_folder(config, install, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "not-for-files")
    install("wandb")
    train(config, tmp_path / "r", track="wandb")
    for path in (tmp_path / "r").rglob("*"):
        assert not path.is_file() or b"not-for-files" not in path.read_bytes(), path
