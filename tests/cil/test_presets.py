"""Presets by name, by experiment file, from the command line; all of them against stand-ins of their data."""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Literal, get_args, get_origin, get_type_hints

import pytest
from folder_twins import write_all_twins, write_twin

from spa_fast.cil.backbone import Backbone
from spa_fast.cil.data.catalog import DATA_SETS, description_file, folder_names, label_names, prompt_templates
from spa_fast.cil.data.order import class_order, split_tasks
from spa_fast.cil.descriptions.lint import read_descriptions
from spa_fast.cil.errors import RunError
from spa_fast.cil.experiment import prepare
from spa_fast.cil.lamda_json import read_experiment
from spa_fast.cil.loop import run_tasks
from spa_fast.cil.methods.simple_cil import SimpleCil
from spa_fast.cil.presets import changes, describe, parse_preset, preset_config, preset_names, run_name
from spa_fast.cil.run_config import RunConfig
from spa_fast.cli import main, start

# sha256 of the comma-joined class order, first 16 digits: as published runs draw it.
ORDERS = {100: "997a048a5344d216", 200: "1d364b99a5915405", 300: "18613efa7667417c"}

ONE_IMAGE = pytest.mark.filterwarnings("ignore:class .* one image only")

PUBLISHED = {
    *("cifar224_B0_Inc10", "cifar224_B50_Inc10", "cub_B0_Inc20", "cub_B100_Inc20"),
    *("imagenetr_B0_Inc20", "imagenetr_B100_Inc20", "objectnet_B0_Inc20", "objectnet_B100_Inc20"),
    *("cars_B0_Inc10", "cars_B50_Inc10", "ucf101_B0_Inc10", "ucf101_B50_Inc10"),
    *("aircraft_B0_Inc10", "aircraft_B50_Inc10", "sun_B0_Inc30", "sun_B150_Inc30"),
    *("food101_B0_Inc10", "food101_B50_Inc10", "caltech101_B0_Inc10", "caltech101_B50_Inc10"),
}


def test_the_published_settings_are_there():
    assert set(preset_names()) == PUBLISHED
    assert len(preset_names()) == 20


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_a_preset_resolves(name):
    data_set, first, increment = parse_preset(name)
    config = preset_config(name, Path("x"))
    assert config.preset == name
    assert config.classes == data_set.classes
    assert config.transform == "lamda"
    assert config.backbone == "ViT-B-16/laion400m_e32"
    assert config.templates == prompt_templates(data_set)
    names = label_names(data_set)
    assert len(set(names)) == data_set.classes
    texts = read_descriptions(description_file(data_set), names, subset=True)
    assert all(len(lines) == 6 for lines in texts)
    order = class_order(data_set.classes, config.order_seed)
    assert hashlib.sha256(",".join(map(str, order)).encode()).hexdigest()[:16] == ORDERS[data_set.classes]
    tasks = split_tasks(data_set.classes, first, increment)
    assert {len(task) for task in tasks[1:]} == {increment}
    assert len(tasks[0]) == (first or increment)
    assert changes(config) == {}
    assert RunConfig.from_dict(config.as_dict()) == config


def test_templates_are_those_of_the_protocol():
    counts = {key: len(prompt_templates(data_set)) for key, data_set in DATA_SETS.items()}
    assert counts == {
        **{"cifar224": 18, "cub": 1, "imagenetr": 7, "objectnet": 7, "cars": 8, "ucf101": 48},
        **{"aircraft": 2, "food101": 1, "sun": 2, "caltech101": 34},
    }
    assert prompt_templates(DATA_SETS["cub"]) == ("a photo of a {}, a type of bird.",)
    assert prompt_templates(DATA_SETS["food101"]) == ("a photo of {}, a type of food.",)
    assert prompt_templates(DATA_SETS["imagenetr"])[0] == "itap of a {}."


CUB_TEMPLATES = {"cub200": ["a sketch of a {}.", "a {}, seen from afar."], "cifar": ["x {}"]}


@pytest.mark.parametrize("content", [CUB_TEMPLATES, CUB_TEMPLATES["cub200"]])
def test_templates_of_ones_own_file(tmp_path, content):
    file = tmp_path / "my templates.json"
    file.write_text(json.dumps(content))
    arguments = ["--preset", "cub_B0_Inc20", "--data", "x", "--k", "4", "--templates"]
    _, rest = start([*arguments, str(file), "--seed", "2"])
    assert rest == ["--data", "x", "--templates", *CUB_TEMPLATES["cub200"], "--k", "4", "--seed", "2"]
    assert start([*arguments, "a {}.", "my {}.json"])[1][2:5] == ["--templates", "a {}.", "my {}.json"]
    experiment = tmp_path / "engine.json"
    experiment.write_text(json.dumps({"dataset": "cub", "init_cls": 20, "increment": 20}))
    _, rest = start(["--config", str(experiment), "--data", "x", f"--templates={file}"])
    assert rest[2:] == ["--templates", *CUB_TEMPLATES["cub200"]]


def test_templates_of_a_file_are_those_of_the_run(colours, backbone_config, tmp_path, capsys):
    file = tmp_path / "t.json"
    file.write_text(json.dumps({"mine": ["a drawn {}.", "{}!"]}))
    args = ["train", "--data", str(colours[0]), "--backbone", f"config:{backbone_config}", "--out"]
    args += [str(tmp_path / "r"), "--method", "zero_shot", "--templates", str(file)]
    assert main(args) == 0
    row = json.loads((tmp_path / "r" / "results.json").read_text())
    assert row["protocol"]["templates"] == row["config"]["templates"] == ["a drawn {}.", "{}!"]
    assert 'templates="a drawn {}." and 1 more' in " ".join(capsys.readouterr().out.split())
    file.unlink()
    assert main(["eval", str(tmp_path / "r")]) == 0


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"cub": ["a photo."]}, "cub[0]: expected a text with {} for the class name, got 'a photo.'"),
        ({"cub": ["a {}.", "a {c}."]}, "cub[1]: expected a text with {}"),
        ({"cub": ["a {}.", 3]}, "cub[1]: expected a text with {}"),
        (["a"], "t.json[0]: expected a text"),
        ({"cub": "a {}."}, "cub: expected a list of templates, got 'a {}.'"),
        ({"cub": {}}, "cub: expected a list of templates"),
        ({"cub": []}, "cub: expected a list of templates, got []"),
        ("a {}.", "expected a list of templates"),
        (None, "expected a list of templates"),
        ({}, "expected one list for cub, got nothing"),
        ({"cubs": ["{}"], "sun": ["{}"]}, "expected one list for cub, got cubs, sun; did you mean 'cubs'?"),
        ({"cub": ["{}"], "cub200": ["{}"]}, "expected one list for cub, got cub, cub200"),
    ],
)
def test_templates_that_are_none(tmp_path, capsys, content, words):
    file = tmp_path / "t.json"
    file.write_text(json.dumps(content))
    assert main(["train", "--preset", "cub_B0_Inc20", "--data", "x", "--templates", str(file)]) == 2
    error = capsys.readouterr().err
    assert f"--templates: {file}" in error
    assert words in error
    assert main(["sweep", "cub_B0_Inc20", "--data", "x", "--templates", str(file)]) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (None, "no such file"),
        (b"", "empty (0 bytes)"),
        (b'{"cub": ["{}"', "truncated"),
        (b'{"cub": ["{}"], "cub": ["{}"]}', "duplicate key 'cub'"),
        (b'{"cub": ["{}"], "sun": ["{}"]}', "expected --preset, or a file of one data set, got cub, sun"),
    ],
)
def test_files_of_templates_that_cannot_be_read(tmp_path, capsys, raw, words):
    file = tmp_path / "t.json"
    if raw is not None:
        file.write_bytes(raw)
    args = ["train", "--data", "x", "--backbone", "y/z", "--templates", str(file)]
    assert main(args) == 2
    assert words in capsys.readouterr().err


def test_folder_maps_follow_label_order():
    for key in ("imagenetr", "caltech101"):
        by_folder = folder_names(DATA_SETS[key])
        assert tuple(by_folder[folder] for folder in sorted(by_folder)) == label_names(DATA_SETS[key])


@pytest.mark.parametrize(
    ("name", "canonical"),
    [
        ("CIFAR100 B0 Inc10", "cifar224_B0_Inc10"),
        ("cub200_b100_inc20", "cub_B100_Inc20"),
        ("imagenet-r_B0_Inc20", "imagenetr_B0_Inc20"),
        ("Stanford-Cars-B50-Inc10", "cars_B50_Inc10"),
        ("sun397_B150_Inc30", "sun_B150_Inc30"),
        ("aircraft_B0_Inc5", "aircraft_B0_Inc5"),
    ],
)
def test_other_spellings(name, canonical):
    assert preset_config(name, Path("x")).preset == canonical


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("car_0_50", "expected DATASET_Bm_Incn"),
        ("cub_B0_Inc", "did you mean 'cub_B0_Inc20'"),
        ("cubs_B0_Inc20", "unknown data set 'cubs'; did you mean 'cub'"),
        ("mnist_B0_Inc2", "known: cifar224, cub,"),
    ],
)
def test_names_that_mean_nothing(name, words):
    with pytest.raises(RunError, match="--preset: .*" + words):
        preset_config(name, Path("x"))


def test_the_run_name_tells_data_backbone_weights_and_changes():
    config = preset_config("cub_B0_Inc20", Path("cub"))
    assert run_name(config) == "cub_B0_Inc20-spa-ViT-B-16-laion400m_e32-seed1"
    dump = config.as_dict()
    openai = RunConfig.from_dict({**dump, "backbone": "ViT-B-16/openai", "seed": 3})
    assert run_name(openai) == "cub_B0_Inc20-spa-ViT-B-16-openai-seed3"
    local = RunConfig.from_dict({**dump, "backbone": "local-dir:/models/my clip", "increment": 40})
    assert run_name(local).startswith("cub_B0_Inc40-spa-my-clip-seed1")
    k8, k9 = (run_name(RunConfig.from_dict({**dump, "spa": {"k": k}})) for k in (8, 9))
    assert k8 != k9
    assert k8.startswith(run_name(config) + "-")
    plain = RunConfig(Path("/data/my birds"), "config:/x/tiny.json", init_classes=10)
    assert run_name(plain).startswith("my-birds_B0_Inc10-spa-tiny-random-seed1")


def test_the_settings_are_printed_and_compared():
    dump = preset_config("cub_B0_Inc20", Path("cub")).as_dict()
    assert "preset cub_B0_Inc20: unchanged" in describe(RunConfig.from_dict(dump))
    other = RunConfig.from_dict({**dump, "increment": 10, "spa": {"eps": 0.05}, "device": "cuda"})
    assert changes(other) == {"increment": (20, 10), "eps": (0.1, 0.05)}
    text = " ".join(describe(other))
    assert "settings: data=cub, backbone=ViT-B-16/laion400m_e32" in text
    assert "preset cub_B0_Inc20: increment=10 (preset: 20), eps=0.05 (preset: 0.1)" in text
    assert "(no published setting)" in describe(preset_config("cub_B0_Inc5", Path("cub")))[-1]


# --- stand-ins of the data sets


@pytest.fixture(scope="module")
def twins(tmp_path_factory):
    return write_all_twins(tmp_path_factory.mktemp("data"), per_class=1)


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_a_preset_runs_over_its_data(name, twins, backbone, monkeypatch):
    """Folders, labels, texts, features and all tasks, with class means as the method."""
    data_set = parse_preset(name)[0]
    preset, _ = start(["--preset", name, "--data-root", str(twins)])
    assert preset == preset_config(name, twins / data_set.folder)
    config = dataclasses.replace(preset, method="simple_cil")
    # The prompts of all presets are 25,000 texts; one of each batch shows that the path works.
    encode = Backbone.encode_texts
    monkeypatch.setattr(Backbone, "encode_texts", lambda self, t: encode(self, t[:1]).expand(len(t), -1))
    experiment = prepare(config, twins / "features", backbone)
    outcome = run_tasks(experiment.stream, SimpleCil(), lambda outcome: None)
    first = [label_names(data_set)[i] for i in class_order(data_set.classes)[:3]]
    assert experiment.names[:3] == first
    assert sum(outcome.matrix.sizes) == data_set.classes
    assert {len(task) for task in experiment.stream.tasks[1:]} == {config.increment}


@ONE_IMAGE
@pytest.mark.slow("trains spa on all 20 presets, about ten minutes: run it with -m slow")
@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_spa_trains_on_a_preset(name, twins, backbone_config, tmp_path):
    args = ["train", "--preset", name, "--data-root", str(twins), "--backbone", f"config:{backbone_config}"]
    assert main([*args, "--epochs", "1", "--k", "4", "--out", str(tmp_path / "run")]) == 0


@ONE_IMAGE
def test_train_by_preset(twins, backbone_config, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    args = ["train", "--preset", "FGVC-Aircraft B50 Inc10", "--data-root", str(twins)]
    args += ["--backbone", f"config:{backbone_config}", "--epochs", "1", "--k=4", "--increment", "25"]
    assert main(args) == 0
    (run,) = (tmp_path / "runs").glob("aircraft_B50_Inc25-spa-tiny-random-seed1-*")
    row = json.loads((run / "results.json").read_text())
    assert row["config"]["preset"] == "aircraft_B50_Inc10"
    assert row["protocol"]["tasks"] == [50, 25, 25]
    changed = row["protocol"]["changed"]
    assert {key: changed[key]["preset"] for key in changed} == {
        **{"backbone": "ViT-B-16/laion400m_e32", "increment": 10, "epochs": 10, "k": 16}
    }
    assert len(row["protocol"]["descriptions_sha256"]) == 64
    text = " ".join(capsys.readouterr().out.split())
    assert "preset aircraft_B50_Inc10: backbone=config:" in text
    assert "k=4 (preset: 16)" in text
    assert main(["eval", str(run)]) == 0


def test_help_of_a_preset_shows_its_defaults(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--preset", "sun_B150_Inc30", "--help"])
    assert "(default: 150)" in " ".join(capsys.readouterr().out.split())


# What the types of a setting do not tell about its values.
VALUES = {
    **{"backbone": "x/y", "preset": "sun_B0_Inc30", "templates": "a {}", "cache_patches": "topk:99"},
    **{"description_template": "{description}", "selection_space": "frozen", "device": "cuda"},
}


def flags(config):
    """An argument of `train` for every setting but those of methods, with another value than it has."""
    hints = get_type_hints(type(config))
    for field in dataclasses.fields(config):
        flag, value, hint = (
            f"--{field.name.replace('_', '-')}",
            getattr(config, field.name),
            hints[field.name],
        )
        if field.name in VALUES:
            yield from (flag, VALUES[field.name])
        elif hint is bool:
            yield flag.replace("--", "--no-", 1) if value else flag
        elif get_origin(hint) is Literal:
            yield from (flag, next(choice for choice in get_args(hint) if choice != value))
        elif hint in (int, float):
            yield from (flag, str(value * 0.7 + 0.02 if hint is float else 3 * value + 1))
        elif field.name != "spa":
            yield from (flag, "/some/path")


def test_every_setting_of_a_preset_can_be_overridden(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr("spa_fast.cil.train.train", lambda config, *args: seen.append(config))
    (tmp_path / "cub").mkdir()
    preset = preset_config("cub_B0_Inc20", tmp_path / "cub")
    args = [*flags(preset), *flags(preset.spa)]
    assert main(["train", "--preset", "cub_B0_Inc20", "--data-root", str(tmp_path), *args]) == 0
    (config,) = seen
    there, here = preset.as_dict(), config.as_dict()
    same = [key for key in there if here[key] == there[key]]
    same += [key for key in there["spa"] if here["spa"][key] == there["spa"][key]]
    assert same == ["selection_space"]
    args = [*("--data-root", str(tmp_path), "--cache-patches", "all", "--selection-space", "projected")]
    assert main(["train", "--preset", "cub_B0_Inc20", *args]) == 0
    assert seen[1].spa.selection_space == "projected"


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("--preset", "cub_B0_Inc20"), "--data: cub: expected --data FOLDER, or --data-root"),
        (("--preset", "cub_B0_Inc20", "--data-root", "/no/root"), "--data-root: no such folder: /no/root"),
        (("--preset", "cub_B0_Inc20", "--config", "x.json"), "--preset, --config: expected one of them"),
        (("--config", "/no/x.json", "--data-root", "."), "--config: no such file"),
        (("--data-root", "."), "--data-root: expected --preset or --config"),
    ],
)
def test_what_a_preset_needs(args, words, capsys):
    assert main(["train", *args]) == 2
    assert words in capsys.readouterr().err


def test_missing_data_name_the_tree_and_its_makers(tmp_path, capsys):
    for data_set in DATA_SETS.values():
        assert main(["train", "--preset", data_set.presets[0], "--data-root", str(tmp_path)]) == 2
        error = capsys.readouterr().err
        assert f"no {data_set.key} in {tmp_path}" in error
        assert str(tmp_path / data_set.folder) in error
        assert "published at https://" in error
        assert len(error.strip().splitlines()) == 1


def test_two_folders_of_one_data_set(tmp_path, capsys):
    for name in ("cub", "CUB_200"):
        (tmp_path / name).mkdir()
    assert main(["train", "--preset", "cub_B0_Inc20", "--data-root", str(tmp_path)]) == 2
    assert "CUB_200 and cub are both cub" in capsys.readouterr().err


def test_too_many_or_other_folders(tmp_path, capsys):
    data_set = DATA_SETS["food101"]
    folder = write_twin(tmp_path, data_set, 100, 100)
    for split in ("train", "test"):
        (folder / split / "waffles").mkdir()
        (folder / split / "waffles" / "1.jpg").write_bytes(b"")
    assert main(["train", "--preset", "food101_B0_Inc10", "--data-root", str(tmp_path)]) == 2
    assert "101 folders, 100 labels; folders without a label: waffles" in capsys.readouterr().err


# --- experiment files


ENGINE = {
    **{"prefix": "-", "dataset": "cub", "memory_size": 0, "memory_per_class": 0, "fixed_memory": True},
    **{"shuffle": True, "init_cls": 100, "increment": 20, "model_name": "engine", "convnet_type": "clip"},
    **{"device": ["0"], "seed": [1993], "projection_type": "pure_mlp", "frozen_layers": "visual"},
    **{"tuned_epoch": 7, "init_lr": 0.04, "batch_size": 32, "weight_decay": 0.02, "min_lr": 0},
    **{"optimizer": "sgd", "text_des": 2, "image_aug": 2, "rerank": 0.8, "stat": 0.95, "sample_num": 0},
    **{"sample_noise": 0.25, "rerank_top": 5},
}
AREA = {
    **{"prefix": "-", "dataset": "cars", "shuffle": True, "init_cls": 50, "increment": 10},
    **{"model_name": "area", "convnet_type": "clip", "device": ["7"], "seed": [1993], "epochs": 20},
    **{"milestones": [8, 15], "init_lr": 0.01, "batch_size": 64, "optimizer": "sgd", "rerank": 0.5},
    **{"samples_per_class": 4, "text_des_path": "[PATH]", "K": 8, "g_lambda": 0.0},
}
C3BOX = {
    **{"prefix": "-", "backbone_type": "clip", "model_name": "simplecil", "shuffle": True, "init_cls": 10},
    **{"increment": 10, "device": ["0", "1"], "seed": [1993, 1994], "epochs": 20, "dataset": "cifar224"},
    **{"memory_size": 2000, "beta": 1, "vib_lambda": 1.0, "total_class_num": 100},
}
PILOT = {
    **{"prefix": "reproduce", "dataset": "imagenetr", "memory_size": 0, "shuffle": False, "init_cls": 20},
    **{"increment": 20, "model_name": "simplecil", "backbone_type": "pretrained_vit_b16_224"},
    **{"device": ["-1"], "seed": [7], "init_lr": 0.01, "batch_size": 48, "weight_decay": 0.0005},
}


def read(document, tmp_path):
    path = tmp_path / "experiment.json"
    path.write_text(json.dumps(document))
    return read_experiment(path, lambda data_set: tmp_path)


@pytest.mark.parametrize("document", [ENGINE, AREA, C3BOX, PILOT], ids=["engine", "area", "c3box", "pilot"])
def test_every_key_of_an_experiment_is_accounted_for(document, tmp_path):
    _, lines = read(document, tmp_path)
    for key in document:
        assert sum(line.startswith(f"  {key} = ") for line in lines) == 1, key


def test_the_keys_of_the_field_are_known(tmp_path):
    keys = {
        **{"memory_size": 0, "memory_per_class": 0, "fixed_memory": False, "backbone_type": "clip"},
        **{"tuned_epoch": 5, "epochs": 5, "total_class_num": 200},
    }
    _, lines = read({**ENGINE, **keys}, tmp_path)
    known = "prefix dataset shuffle init_cls increment model_name backbone_type convnet_type device seed "
    known += (
        "tuned_epoch epochs init_lr batch_size weight_decay min_lr optimizer memory_size memory_per_class "
    )
    known += "fixed_memory total_class_num projection_type frozen_layers text_des image_aug rerank stat"
    assert set(known.split()) <= {line.split()[0] for line in lines if " = " in line}
    assert not [line for line in lines if "UNKNOWN" in line]


def test_an_engine_experiment(tmp_path):
    config, lines = read(ENGINE, tmp_path)
    assert config.preset == "cub_B100_Inc20"
    assert (config.init_classes, config.increment, config.order_seed) == (100, 20, 1993)
    assert (config.spa.epochs, config.spa.lr, config.spa.batch_size, config.spa.weight_decay) == (
        7,
        0.04,
        32,
        0.02,
    )
    assert config.method == "spa"
    assert (
        "  model_name = 'engine': method=spa in its place: there is no such method here; see --method"
        in lines
    )
    assert not [line for line in lines if "warning" in line]


def test_an_area_experiment_is_read_by_its_keys(tmp_path):
    config, _ = read(AREA, tmp_path)
    assert config.preset == "cars_B50_Inc10"
    assert (config.spa.schedule, config.spa.epochs, config.spa.pseudo_per_class) == ("step", 20, 4)


def test_a_c3box_experiment_names_unknown_keys(tmp_path):
    config, lines = read(C3BOX, tmp_path)
    assert (config.preset, config.init_classes, config.method) == ("cifar224_B0_Inc10", 0, "simple_cil")
    assert lines[-1].endswith("unknown keys, not used: beta, vib_lambda")
    assert "  memory_size = 2000: no effect (no images are stored)" in lines
    assert "  seed = [1993, 1994]: order_seed=1993; the others need runs of their own" in lines


def test_a_pilot_experiment(tmp_path):
    config, lines = read(PILOT, tmp_path)
    assert (config.shuffle, config.order_seed, config.device) == (False, 7, "cpu")
    assert [line for line in lines if "backbone_type" in line and "it is no CLIP" in line]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"init_cls": "10"}, "init_cls: expected a whole number from 1, got '10'"),
        ({"increment": 0}, "increment: expected a whole number from 1, got 0"),
        ({"increment": True}, "increment: expected a whole number"),
        ({"seed": ["x"]}, "seed: expected a whole number"),
        ({"seed": []}, "seed: expected a whole number"),
        ({"shuffle": 1}, "shuffle: expected true or false"),
        ({"dataset": 3}, "dataset: expected a text"),
        ({"init_lr": "fast"}, "init_lr: expected a number"),
        ({"tuned_epoch": 0}, r"--config: .*\.json: tuned_epoch: expected at least 1"),
        ({"batch_size": 64.0}, r"--config: .*\.json: batch_size: expected a whole number"),
        ({"seed": 2**40}, r"--config: .*\.json: seed: expected at least 0 and below"),
        ({"optimizer": "lion"}, "optimizer: expected sgd, adam or adamw"),
        ({"device": {}}, None),
    ],
)
def test_values_that_cannot_be_read(change, words, tmp_path):
    if words is None:
        assert read({**ENGINE, **change}, tmp_path)[0].device == "cpu"
        return
    with pytest.raises(RunError, match=words):
        read({**ENGINE, **change}, tmp_path)


def test_of_two_keys_for_one_setting_a_warning_says_which_wins(tmp_path):
    change = {"tuned_epoch": 3, "epochs": 9, "backbone_type": "clip", "convnet_type": "openai_clip"}
    config, lines = read({**ENGINE, **change}, tmp_path)
    assert config.spa.epochs == 9
    warnings = [line for line in lines if line.startswith("warning: ")]
    assert len(warnings) == 2
    assert warnings[0].endswith(
        "backbone_type and convnet_type both give backbone: convnet_type wins, backbone=ViT-B-16/openai"
    )
    assert warnings[1].endswith("tuned_epoch and epochs both give epochs: epochs wins, epochs=9")
    assert not [line for line in read({**ENGINE, "epochs": 7}, tmp_path)[1] if "warning" in line]


def test_an_experiment_without_a_data_set(tmp_path):
    with pytest.raises(RunError, match="missing key 'dataset'; did you mean 'data_set'"):
        read({**{k: v for k, v in ENGINE.items() if k != "dataset"}, "data_set": "cub"}, tmp_path)
    with pytest.raises(RunError, match="expected an object"):
        read([1], tmp_path)


@ONE_IMAGE
def test_train_by_experiment(twins, backbone_config, tmp_path, capsys):
    path = tmp_path / "aircraft_50_10.json"
    path.write_text(json.dumps({**ENGINE, "dataset": "aircraft", "init_cls": 50, "increment": 10}))
    args = ["train", "--config", str(path), "--data-root", str(twins), "--out", str(tmp_path / "r")]
    assert main([*args, "--backbone", f"config:{backbone_config}", "--epochs", "1", "--k", "4"]) == 0
    text = capsys.readouterr().out
    assert "rerank = 0.8: no effect" in text
    config = json.loads((tmp_path / "r" / "results.json").read_text())["config"]
    assert (config["spa"]["epochs"], config["spa"]["lr"]) == (1, 0.04)


def test_an_unknown_data_set_is_a_folder_of_images(colours, backbone_config, tmp_path):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({**ENGINE, "dataset": "mstar", "init_cls": 4, "increment": 3}))
    args = ["train", "--config", str(path), "--backbone", f"config:{backbone_config}", "--epochs", "1"]
    assert main([*args, "--out", str(tmp_path / "r")]) == 2
    args += ["--data", str(colours[0]), "--descriptions", str(colours[1]), "--k", "4"]
    assert main([*args, "--out", str(tmp_path / "r")]) == 0
