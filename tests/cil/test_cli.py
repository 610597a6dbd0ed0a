"""The command line as a user meets it: whole runs, and bad input that ends with one line and exit code 2."""

import json
import shutil
import subprocess
import sys

import pytest
from PIL import Image

from spa_fast.cli import main

QUICK = ("--epochs", "1", "--k", "4", "--increment", "3")


def train_args(colours, backbone_config, out, *extra):
    return [
        "train",
        *("--data", str(colours[0]), "--backbone", f"config:{backbone_config}"),
        *("--descriptions", str(colours[1]), "--out", str(out)),
        *QUICK,
        *extra,
    ]


@pytest.fixture
def finished(colours, backbone_config, tmp_path):
    out = tmp_path / "runs" / "a run"
    assert main(train_args(colours, backbone_config, out)) == 0
    return out


def refused(capsys, args, *words):
    """The command ends with code 2 and one line of error that holds every word."""
    capsys.readouterr()
    assert main(args) == 2
    error = capsys.readouterr().err.strip().split("\r")[-1].strip().splitlines()[-1]
    assert error.startswith("spa-fast: error: ")
    for word in words:
        assert word in error


def test_a_run_folder_is_complete(finished):
    assert {p.name for p in finished.iterdir()} == {
        "results.json",
        "results.csv",
        "metrics.jsonl",
        "train.log",
        "curve.png",
        "exemplars.json",
        "run.json",
        "model.safetensors",
    }
    row = json.loads((finished / "results.json").read_text())
    keys = ("method", "average", "last", "forgetting", "bwt", "accuracies", "matrix", "seconds", "config")
    assert set(keys) | {"environment"} <= set(row)
    assert len(row["accuracies"]) == 3
    assert [[x is None for x in r] for r in row["matrix"]] == [[c > r for c in range(3)] for r in range(3)]
    assert row["config"]["spa"]["epochs"] == 1
    assert len((finished / "metrics.jsonl").read_text().splitlines()) == 6
    assert len(json.loads((finished / "exemplars.json").read_text())) == 7
    assert [p.name for p in finished.parent.iterdir() if p.name.startswith(".")] == []


def test_eval_repeats_the_stored_accuracy(finished, capsys):
    row = json.loads((finished / "results.json").read_text())
    assert main(["eval", str(finished)]) == 0
    last = capsys.readouterr().out.strip().splitlines()[-1]
    assert f"{row['last']:.2f} % of 21 images (stored: {row['last']:.2f} %)" in last


def test_predict_prints_five_classes_with_scores(finished, colours, capsys):
    image = colours[0] / "test" / "dark_red" / "0.png"
    assert main(["predict", str(finished), str(image), str(image)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 12
    scores = [float(line.split()[0]) for line in lines[1:6]]
    assert scores == sorted(scores, reverse=True)
    names = {line.split(maxsplit=1)[1] for line in lines[1:6]}
    assert len(names) == 5
    assert names <= {"amber", "blue", "coral", "dark red", "emerald", "fuchsia", "gold"}


def test_explain_draws_a_picture(finished, colours, tmp_path, capsys):
    image, out = colours[0] / "test" / "dark_red" / "0.png", tmp_path / "why.png"
    colours[1].unlink()
    capsys.readouterr()
    assert main(["explain", str(finished), str(image), "--class", "dark red", "--out", str(out)]) == 0
    assert "dark red: local score" in capsys.readouterr().out
    with Image.open(out) as picture:
        assert picture.format == "PNG"
        assert picture.width > 2 * picture.height


def test_explain_refuses(finished, colours, backbone_config, tmp_path, capsys, monkeypatch):
    image, out = colours[0] / "test" / "dark_red" / "0.png", tmp_path / "why.png"

    def explain(*args, words):
        refused(capsys, ["explain", *map(str, args), "--out", str(out)], *words)
        assert not out.exists()

    explain(finished, image, "--class", "dark rde", words=("no class 'dark rde'", "did you mean 'dark red'?"))
    explain(finished, "none.png", "--class", "gold", words=("no such file: none.png",))
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"\x89PNG broken")
    explain(finished, broken, "--class", "gold", words=("unreadable image", "broken.png"))
    explain(tmp_path / "none", image, "--class", "gold", words=("no such folder",))
    args = ["explain", str(finished), str(image), "--class", "gold", "--out", str(tmp_path / "x.pdf")]
    refused(capsys, args, "--out: expected a file ending in .png", "x.pdf")
    args = ["explain", str(finished), str(image), "--class", "gold", "--out", str(tmp_path / "no" / "x.png")]
    refused(capsys, args, "--out", "no such folder")

    for number, (extra, word) in enumerate(
        (
            (("--fusion-weight", "0", "--local-loss-weight", "0"), "no local branch"),
            (("--method", "simple_cil"), "simple_cil, which has no local branch"),
            (("--solver", "uniform"), "aligns by 'uniform'"),
            (("--semantic-tokens", "token_level"), "their words"),
        )
    ):
        run = tmp_path / "runs" / str(number)
        assert main(train_args(colours, backbone_config, run, *extra)) == 0
        explain(run, image, "--class", "gold", words=(word,))
    monkeypatch.setattr("spa_fast.cil.predict.find_spec", lambda name: None)
    explain(finished, image, "--class", "gold", words=("needs matplotlib",))


@pytest.mark.parametrize("method", ["zero_shot", "simple_cil"])
def test_anchors_need_no_descriptions(colours, backbone_config, tmp_path, method):
    args = ["train", "--data", str(colours[0]), "--backbone", f"config:{backbone_config}", "--increment", "4"]
    assert main([*args, "--method", method, "--out", str(tmp_path / "r")]) == 0
    row = json.loads((tmp_path / "r" / "results.json").read_text())
    assert row["method"] == method
    assert main(["eval", str(tmp_path / "r")]) == 0


def test_help_shows_defaults_and_units(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    for words in ("--eps FLOAT", "units of cost", "default: 0.1", "--init-classes", "--k INT", "default: 16"):
        assert words in text, words


def test_env_says_what_is_compiled(capsys):
    assert main(["env"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert {"environment", "backends", "native"} == set(report)
    assert report["backends"]["reference"] == "usable"


def test_installed_command_and_exit_code(tmp_path):
    code = "import sys; from spa_fast.cli import main; sys.exit(main())"
    args = ["train", "--data", str(tmp_path / "no"), "--backbone", "x/y", "--out", str(tmp_path / "r")]
    done = subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1
    assert "--data: no such folder" in done.stderr


# --- bad input: refused before any work, nothing left behind


@pytest.fixture
def attempt(colours, backbone_config, tmp_path, capsys):
    out = tmp_path / "runs" / "r"

    def run(*extra, words):
        refused(capsys, train_args(colours, backbone_config, out, *extra), *words)
        assert not out.exists()
        assert not out.parent.exists() or not list(out.parent.glob("*.partial"))

    return run


def test_missing_data(attempt, tmp_path):
    attempt("--data", str(tmp_path / "nowhere"), words=("--data", "no such folder", "nowhere"))


def test_empty_data(attempt, tmp_path):
    (tmp_path / "empty").mkdir()
    attempt("--data", str(tmp_path / "empty"), words=("--data", "expected train/", "empty"))


def test_class_without_images(attempt, colours):
    shutil.rmtree(colours[0] / "test" / "blue")
    (colours[0] / "test" / "blue").mkdir()
    attempt(words=("class without images", "test/blue"))


def test_class_lists_that_differ(attempt, colours):
    shutil.rmtree(colours[0] / "test" / "blue")
    attempt(words=("class lists differ", "blue"))


def test_unreadable_image(attempt, colours):
    (colours[0] / "train" / "gold" / "3.png").write_bytes(b"\x89PNG broken")
    attempt(words=("unreadable image", "gold/3.png"))


def test_truncated_image(attempt, colours):
    path = colours[0] / "train" / "gold" / "3.png"
    Image.effect_noise((64, 64), 80).save(path)
    path.write_bytes(path.read_bytes()[:-900])
    attempt(words=("unreadable image", "gold/3.png"))


def test_damage_that_no_header_shows_is_named_by_the_extraction(attempt, colours):
    path = colours[0] / "train" / "gold" / "3.png"
    Image.effect_noise((64, 64), 80).save(path)
    content = bytearray(path.read_bytes())
    content[600:700] = bytes(100)
    path.write_bytes(content)
    attempt(words=("unreadable image", "gold/3.png", "--exclude"))


def test_a_tiny_image_is_said_once(colours, backbone_config, tmp_path, capsys):
    Image.new("RGB", (1, 1)).save(colours[0] / "train" / "gold" / "3.png")
    for name, count in (("a", 1), ("b", 0)):
        assert main(train_args(colours, backbone_config, tmp_path / "runs" / name, "--epochs", "1")) == 0
        said = [line for line in capsys.readouterr().out.splitlines() if "photographs" in line]
        assert len(said) == count
        assert all(line.startswith("warning: 1 images") and "train/gold/3.png" in line for line in said)


def test_descriptions_without_a_class(attempt, colours):
    document = json.loads(colours[1].read_text())
    document["classes"] = [c for c in document["classes"] if c["name"] != "gold"]
    colours[1].write_text(json.dumps(document))
    attempt(words=("--descriptions", "'gold' has no descriptions", "descriptions.json"))


def test_descriptions_of_an_unknown_class(attempt, colours):
    document = json.loads(colours[1].read_text())
    document["classes"].append({"name": "dark rde", "descriptions": ["x"]})
    colours[1].write_text(json.dumps(document))
    attempt(words=("unknown class 'dark rde'", "did you mean 'dark red'?"))


def test_no_descriptions_at_all(capsys, colours, backbone_config, tmp_path):
    args = ["train", "--data", str(colours[0]), "--backbone", f"config:{backbone_config}"]
    refused(capsys, [*args, "--out", str(tmp_path / "r")], "--descriptions", "spa needs")


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        (("--k", "17"), ("--k", "16 patches", "got 17")),
        (("--k", "0"), ("k:", "at least 1", "got 0")),
        (("--eps", "0"), ("eps:", "positive", "got 0.0")),
        (("--eps", "-1"), ("eps:", "got -1.0")),
        (("--eps", "nan"), ("eps:", "nan")),
        (("--increment", "0"), ("--increment", "at least 1", "got 0")),
        (("--init-classes", "8"), ("--init-classes", "0 to 7", "got 8")),
        (("--backbone", "local-dir:/no/such/folder"), ("local-dir:/no/such/folder", "no such folder")),
        (("--backbone", "ViT-B-61/openai"), ("did you mean 'ViT-B-16'",)),
        (("--templates", "a photo."), ("--templates", "{}")),
        (("--lr", "1e30", "--epochs", "9"), ("lower --lr",)),
        (("--device", "warp9"), ("--device", "warp9")),
        (("--device", "meta"), ("--device", "cpu or cuda")),
        (("--fusion-weight", "inf"), ("fusion_weight:", "finite")),
        (("--momentum", "1"), ("momentum:", "below 1")),
        (("--order-seed", "-1"), ("order_seed:", "-1")),
        (("--backend", "triton", "--k", "4"), ("--backend", "'triton' is not usable")),
        (("--loss", "joint", "--fusion-weight", "0"), ("loss:", "joint")),
    ],
    ids=lambda value: " ".join(value) if isinstance(value[0], str) and value[0].startswith("--") else "",
)
def test_refused_arguments(attempt, extra, words):
    attempt(*extra, words=words)


@pytest.mark.parametrize("template", ["a {} {x}", "{} {", "{} {0} }", "{:d} {}", "100 % {}"])
def test_braces_in_templates_are_only_text(colours, backbone_config, tmp_path, template):
    args = train_args(colours, backbone_config, tmp_path / "r", "--templates", template)
    assert main([*args, "--description-template", "{description} {name.x} {"]) == 0


def test_a_folder_that_cannot_be_written(colours, backbone_config, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    refused(capsys, train_args(colours, backbone_config, tmp_path / "file" / "r"), "--out", "file")
    cache = ("--cache", str(tmp_path / "file"))
    refused(capsys, train_args(colours, backbone_config, tmp_path / "r", *cache), "--cache", "file")
    assert not (tmp_path / "r").exists()


def test_out_may_be_a_link_or_the_current_folder(colours, backbone_config, tmp_path, monkeypatch):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert main(train_args(colours, backbone_config, tmp_path / "link")) == 0
    assert (tmp_path / "real" / "results.json").is_file()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert main(train_args(colours, backbone_config, ".")) == 0
    assert (tmp_path / "here" / "results.json").is_file()


def test_a_run_is_found_from_another_folder(colours, backbone_config, tmp_path, monkeypatch):
    monkeypatch.chdir(colours[0].parent)
    args = train_args((colours[0].name, colours[1].name), backbone_config, tmp_path / "r")
    assert main(args) == 0
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert main(["eval", str(tmp_path / "r")]) == 0


def test_another_backbone_is_refused(finished, backbone_config, capsys):
    config = json.loads(backbone_config.read_text())
    changed = backbone_config.with_name("changed.json")
    changed.write_text(json.dumps({**config, "quick_gelu": True}))
    run = finished / "run.json"
    run.write_text(run.read_text().replace(backbone_config.name, changed.name))
    refused(capsys, ["eval", str(finished)], "not the backbone it was trained with")


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"method": "simplecil"}, "did you mean 'simple_cil'?"),
        ({"increment": "2"}, "increment"),
        ({"data": None}, "data"),
        ({"backbone": 3}, "backbone"),
        ({"templates": [1]}, "templates"),
        ({"spa": None}, "expected an object"),
        ({"zero_shot_texts": "zz"}, "zero_shot_texts"),
    ],
)
def test_wrong_types_in_a_run_are_named(finished, capsys, change, word):
    run = finished / "run.json"
    document = json.loads(run.read_text())
    document["config"].update(change)
    run.write_text(json.dumps(document))
    refused(capsys, ["eval", str(finished)], word)


def test_names_must_fit_the_learned_classes(finished, capsys):
    run = finished / "run.json"
    document = json.loads(run.read_text())
    run.write_text(json.dumps({**document, "names": document["names"][:3]}))
    refused(capsys, ["eval", str(finished)], "7 classes learnt, 3 names")
    for texts, words in (([["x"]], "descriptions of 1 classes, 7 names"), ([[3]] * 7, "a list of descr")):
        run.write_text(json.dumps({**document, "descriptions": texts}))
        refused(capsys, ["eval", str(finished)], words)


def test_predict_arguments(finished, capsys):
    refused(capsys, ["predict", str(finished)], "at least one image")
    refused(capsys, ["predict", str(finished), "x.png", "--top", "0"], "--top")


def test_a_finished_run_is_not_overwritten(finished, colours, backbone_config, capsys):
    before = (finished / "results.json").read_bytes()
    refused(capsys, train_args(colours, backbone_config, finished), "--out", "not an empty folder")
    assert (finished / "results.json").read_bytes() == before


def test_an_increment_that_does_not_divide_gives_a_smaller_last_task(finished):
    assert json.loads((finished / "results.json").read_text())["protocol"]["tasks"] == [3, 3, 1]


def test_broken_run_folders(finished, capsys, tmp_path):
    refused(capsys, ["eval", str(tmp_path / "none")], "no such folder")
    state = finished / "model.safetensors"
    whole = state.read_bytes()
    state.write_bytes(whole[: len(whole) // 2])
    refused(capsys, ["eval", str(finished)], "model.safetensors", "unreadable")
    state.write_bytes(whole)
    run = finished / "run.json"
    text = run.read_text()
    run.write_text(text.replace('"eps"', '"epz"'))
    refused(capsys, ["eval", str(finished)], "unknown key 'epz'")
    run.write_text('{"format": "other"}')
    refused(capsys, ["predict", str(finished), str(run)], "unreadable image")
    refused(capsys, ["eval", str(finished)], "expected format")


def test_predict_on_a_missing_image(finished, capsys):
    refused(capsys, ["predict", str(finished), "nothing.jpg"], "no such file: nothing.jpg")


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (["demo"], "spa-fast: interrupted; no unfinished run folder is left"),
        (["env"], "spa-fast: interrupted"),
    ],
)
def test_an_interrupt_says_only_what_is_true_of_the_command(args, told, capsys, monkeypatch):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("spa_fast.cil.demo.ladder.run_demo", interrupted)
    monkeypatch.setattr("spa_fast.cil.report.environment", interrupted)
    assert main(args) == 130
    assert capsys.readouterr().err == f"{told}\n"
