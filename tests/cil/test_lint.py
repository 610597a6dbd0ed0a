"""The linter: every planted fault is named, sound files pass, what a run refuses is what lint faults."""

import json

import pytest

from spa_fast.cil.data.catalog import DATA_SETS, description_file, label_names
from spa_fast.cil.descriptions.lengths import split_text
from spa_fast.cil.descriptions.lint import lint, read_descriptions
from spa_fast.cil.descriptions.readers import read_document
from spa_fast.cil.descriptions.schema import ClassEntry, Descriptions
from spa_fast.cil.descriptions.wording import text_fault, wrong_language
from spa_fast.cil.errors import RunError
from spa_fast.cli import main


def of(classes, **options):
    entries = tuple(ClassEntry(name, tuple(lines)) for name, lines in classes.items())
    return lint(Descriptions(entries, "flat"), **options)


SOUND = {"cat": ["long whiskers", "slit pupils"], "dog": ["wet nose", "floppy ears"]}


@pytest.mark.parametrize("key", DATA_SETS)
def test_packaged_files_pass(key):
    data_set = DATA_SETS[key]
    findings = lint(read_document(description_file(data_set)), label_names(data_set), subset=True)
    assert not findings.faults
    assert set(findings.notes) <= {"another class's name"}


def test_sound_texts_have_nothing_to_report():
    findings = of(SOUND, names=["dog", "cat"])
    assert findings.lines() == ["flat format, 2 classes, 2 to 2 texts each", "  nothing to report"]


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("I'm sorry, but I can't help with that.", "refusal"),
        ("I’m sorry", "refusal"),
        ("Sorry, I cannot describe people.", "refusal"),
        ("As an AI language model I do not see", "refusal"),
        ("I am unable to identify this", "refusal"),
        ("I cannot tell from the image", "refusal"),
        ("N/A", "refusal"),
        ("n/a.", "refusal"),
        ("None", "refusal"),
        ("", "empty"),
        ("  ", "empty"),
        ("- short tail", "markup left over"),
        ("* short tail", "markup left over"),
        ("1. short tail", "markup left over"),
        ("2) short tail", "markup left over"),
        ("**short** tail", "markup left over"),
        ("### Tail", "markup left over"),
        ("`tail`", "markup left over"),
        ("<li>tail</li>", "markup left over"),
        ("black &amp; white", "markup left over"),
        ("[tail](http://x)", "markup left over"),
        ('["tail"', "markup left over"),
        ("tail\x00", "control character"),
        ("tail\x1b[31m", "control character"),
        ("t\ufffdil", "control character"),
        ("two\ttabs", "control character"),
    ],
)
def test_useless_texts(text, kind):
    assert text_fault(text)[0] == kind


@pytest.mark.parametrize(
    "text",
    [
        "wings unable to lift the bird",
        "none of the feathers is white",
        "red-and-white stripes (about 5) on the tail",
        "3.5 cm bill",
        "non-slip sole - black",
        '"STOP" in white letters',
        "black & white fur",
        "a #1 printed on the side",
        "5 < 7 stripes",
        "café-au-lait coat",
        "sorrel coat",
    ],
)
def test_useful_texts(text):
    assert text_fault(text) is None


def test_language():
    assert wrong_language(["翼が黄色", "赤い足"])
    assert wrong_language(["Schnabel mit Haken", "Kopf und Hals"])
    assert wrong_language(["ailes avec bandes", "bec pour casser"])
    assert not wrong_language(["El Camino badge", "café-au-lait coat", "piñata paper"])
    assert not wrong_language(["12", "7"])


@pytest.mark.parametrize(
    ("classes", "options", "kind", "words"),
    [
        (SOUND, {"names": ["cat", "dog", "cow"]}, "missing class", "class 'cow' has no descriptions"),
        (SOUND, {"names": ["cat", "dgo"]}, "missing class", "did you mean 'dog'?"),
        (SOUND, {"names": ["cat"]}, "unknown class", "unknown class 'dog'"),
        (SOUND, {"names": ["cat"]}, "number of classes", "expected 1, found 2"),
        ({**SOUND, "cow": []}, {}, "class without text", "class 'cow' has no descriptions"),
        ({**SOUND, "cow": [" "]}, {}, "class without text", "class 'cow' has no descriptions"),
        ({**SOUND, "cow": ["I cannot help"]}, {}, "refusal", "cow: 'I cannot help'"),
        ({**SOUND, "cow": ["- horn"]}, {}, "markup left over", "cow: '- horn'"),
        ({**SOUND, "cow": SOUND["dog"]}, {}, "same texts", "dog and cow"),
    ],
)
def test_faults(classes, options, kind, words):
    findings = of(classes, **options)
    assert words in findings.faults[kind][0]
    assert any(line.startswith(f"  FAULT  {kind}") and words in line for line in findings.lines())


@pytest.mark.parametrize(
    ("classes", "kind", "words"),
    [
        ({**SOUND, "cow": ["horn", "", "udder"]}, "blank text", "cow: 1"),
        ({**SOUND, "cow": ["Horn!", "horn"]}, "text given twice", "cow: 'horn'"),
        ({**SOUND, "cow": ["horn"]}, "one text only: transport has nothing to choose", "cow"),
        ({**SOUND, "sea_cow": ["a sea cow tail", "fin"]}, "class name in its own text", "sea_cow"),
        ({**SOUND, "cow": ["Schwanz mit Quaste", "Kopf und Horn"]}, "not English", "cow"),
        ({**SOUND, "shed": ["wet nose", "floppy ears"], "goat": ["tail"]}, "another class's name", None),
    ],
)
def test_notes(classes, kind, words):
    findings = of(classes)
    if words:
        assert words in findings.notes[kind][0]
        assert not findings.faults


def test_leaks_are_of_whole_names():
    classes = {
        "barn": ["red boards", "loft door"],
        "school": ["bell like a barn owl's", "beside the barn"],
        "barn owl": ["pale face", "in a barn"],
        "oar": ["boards", "a soar"],
    }
    leaks = of(classes).notes["another class's name"]
    assert [leak.partition(":")[0] for leak in leaks] == ["school", "school", "school"]


def test_nearly_the_same():
    words = [f"word{i}" for i in range(20)]
    classes = {"a": [" ".join(words)], "b": [" ".join([*words[:18], "x", "y"])], "c": ["something else"]}
    assert of(classes).notes["nearly the same texts"] == ["a and b"]


def test_names_may_be_needed_in_texts():
    findings = of({"cat": ["a cat with whiskers", "pupils"]}, template="{description}")
    assert findings.notes["class name absent from its text"] == ["cat"]
    assert "class name in its own text" not in findings.notes


def test_token_counts_and_share():
    classes = {"cat": ["short", "w " * 80], "dog": ["other", "still short"]}
    findings = of(classes, tokens=lambda text: len(text.split()) + 2)
    (kind,) = [kind for kind in findings.notes if "tokens" in kind]
    assert kind == "25.0% of texts over 77 tokens, the rest is cut"
    # "cat with", 80 words, start and end.
    assert findings.notes[kind][0].startswith("cat: 84: ")


def test_a_published_data_set_knows_its_size():
    entries = tuple(ClassEntry(f"c{i}", (f"t{i}", f"u{i}")) for i in range(99))
    assert lint(Descriptions(entries, "own", "cars")).faults["number of classes"] == [
        "expected 100, found 99"
    ]


def test_a_name_twice_and_a_key_twice():
    twice = Descriptions((ClassEntry("a", ("x", "y")), ClassEntry("a", ("z", "w"))), "own")
    assert lint(twice).faults == {"duplicate class": ["class 'a' appears twice"]}
    keys = Descriptions((ClassEntry("a", ("x", "y")),), "flat", duplicate_keys=("a",))
    assert lint(keys).faults == {"duplicate key": ["'a'"]}


# --- the command


def test_the_command_names_planted_faults_and_ends_with_1(tmp_path, capsys):
    file = tmp_path / "bad.json"
    long = " ".join(["feather"] * 90)
    file.write_text(
        '{"amber": ["I am sorry, I cannot help", "glow"], "blue": ["- sky tint", "sea tint"],'
        f' "coral": [], "gold": ["{long}", "sheen"], "gold": ["{long}", "shine"], "dark rde": ["x", "y"]}}'
    )
    names = tmp_path / "names.json"
    names.write_text(json.dumps({"a": "amber", "b": "blue", "c": "coral", "d": "dark red", "g": "gold"}))
    packaged = description_file(DATA_SETS["cars"])
    assert main(["descriptions", "lint", str(file), str(packaged), "--classnames", str(names)]) == 1
    out = capsys.readouterr().out
    for words in (
        "bad.json: flat format, 5 classes, 0 to 2 texts each",
        "refusal",
        "markup left over",
        "duplicate key",
        "class 'coral' has no descriptions",
        "class 'dark red' has no descriptions; did you mean 'dark rde'?",
        "unknown class 'dark rde'; did you mean 'dark red'?",
        "12.5% of texts over 77 tokens, the rest is cut",
        "gold: 94: 'feather",
        "2 checked, 2 with faults",
    ):
        assert words in out, words


def test_the_command_goes_on_past_an_unreadable_file(tmp_path, capsys):
    (tmp_path / "empty.json").touch()
    cub = str(description_file(DATA_SETS["cub"]))
    assert main(["descriptions", "lint", str(tmp_path / "empty.json"), cub]) == 1
    out = capsys.readouterr().out
    assert "FAULT  file:" in out
    assert "empty (0 bytes)" in out
    assert "2 checked, 1 with faults" in out
    assert main(["descriptions", "lint", cub, "--preset", "cub_B0_Inc20"]) == 0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"unicorn": ["one horn", "white mane"]}, "unknown class 'unicorn'"),
        ({"unicorn": ["one horn", "white mane"]}, "expected 100, found 101"),
        ({"anchor": None}, "class 'anchor' has no descriptions"),
    ],
)
def test_a_file_of_ones_own_holds_the_classes_of_the_preset(tmp_path, capsys, change, words):
    """What `train` refuses, lint faults."""
    document = read_document(description_file(DATA_SETS["caltech101"]))
    names = label_names(DATA_SETS["caltech101"])
    classes = {entry.name: list(entry.texts) for entry in document.classes if entry.name in names} | change
    file = tmp_path / "extra.json"
    file.write_text(json.dumps({name: texts for name, texts in classes.items() if texts}))
    assert main(["descriptions", "lint", str(file), "--preset", "caltech101_B0_Inc10"]) == 1
    assert words in capsys.readouterr().out
    with pytest.raises(RunError, match=r"unknown class|has no descriptions|expected 100"):
        read_descriptions(file, names)


def test_a_packaged_file_may_hold_more_classes(capsys):
    data_set = next(d for d in DATA_SETS.values() if len(label_names(d, 10**6)) > d.classes)
    assert main(["descriptions", "lint", str(description_file(data_set)), "--preset", data_set.key]) == 0


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["x.json", "--preset", "cbu"], "did you mean 'cub'?"),
        (["x.json", "--preset", "cub", "--classnames", "y.json"], "expected one of them"),
        (["x.json", "--classnames", "nothing.json"], "--classnames: no such file"),
        ([], "at least one file"),
    ],
)
def test_arguments_of_the_command(capsys, args, words):
    assert main(["descriptions", "lint", *args]) == 2
    assert words in capsys.readouterr().err


# --- before training


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"a": ["x", "y"], "b": ["z", "w"], "a": ["v"]}', "duplicate key: 'a'"),
        ('{"a": ["x", "I am sorry"], "b": ["z", "w"]}', "refusal: a: 'I am sorry'"),
        ('{"a": ["x", "y"], "bb": ["z", "w"]}', "class 'b' has no descriptions.*1 more by `spa-fast desc"),
    ],
)
def test_a_run_refuses_what_lint_faults(tmp_path, content, message):
    file = tmp_path / "d.json"
    file.write_text(content)
    with pytest.raises(RunError, match=message):
        read_descriptions(file, ["a", "b"])


@pytest.mark.parametrize("form", ["flat", "text"])
def test_a_run_takes_every_format(colours, backbone_config, tmp_path, form):
    names = ["amber", "blue", "coral", "dark red", "emerald", "fuchsia", "gold"]
    if form == "flat":
        path = tmp_path / "flat.json"
        path.write_text(json.dumps({n: [f"{n} edge", f"plain {n} area"] for n in names}))
    else:
        path = tmp_path / "texts"
        path.mkdir()
        for n in names:
            text = f"1.jpg\t{n} edge\n2.jpg\tplain {n} area\n"
            (path / f"{n.replace(' ', '_')}_descriptions.txt").write_text(text)
    args = ["train", "--data", str(colours[0]), "--backbone", f"config:{backbone_config}", "--epochs", "1"]
    args += ["--k", "4", "--descriptions", str(path), "--increment", "4", "--out", str(tmp_path / "r")]
    assert main(args) == 0
    row = json.loads((tmp_path / "r" / "results.json").read_text())
    assert len(row["protocol"]["descriptions_sha256"]) == 64


@pytest.mark.parametrize(("long", "words"), [("cut", "the rest is cut"), ("split", "split: amber")])
def test_a_run_warns_of_texts_that_are_cut(colours, backbone_config, tmp_path, capsys, long, words):
    document = json.loads(colours[1].read_text())
    document["classes"][0]["descriptions"][1] = "feather " * 30
    # Beyond the first six nothing is used.
    document["classes"][1]["descriptions"] += ["a", "b", "c", "feather " * 40]
    colours[1].write_text(json.dumps(document))
    args = ["train", "--data", str(colours[0]), "--backbone", f"config:{backbone_config}", "--epochs", "1"]
    args += ["--method", "zero_shot", "--zero-shot-texts", "descriptions", "--out", str(tmp_path / "r")]
    assert main([*args, "--descriptions", str(colours[1]), "--long-descriptions", long]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "warning: descriptions" in line]
    assert "4.2% of texts over 24 tokens, " in line
    assert words in line
    assert "amber: 34: 'feather" in line


def test_split_keeps_every_word_of_every_description_in_use(colours, backbone_config, tmp_path, capsys):
    """The pieces of one description do not push out others."""
    document = json.loads(colours[1].read_text())
    long = " ".join(f"feather{i}" for i in range(40))
    document["classes"][0]["descriptions"] = [long, "second one", "third one", "fourth one"]
    colours[1].write_text(json.dumps(document))
    args = ["train", "--data", str(colours[0]), "--backbone", f"config:{backbone_config}", "--epochs", "1"]
    args += ["--k", "4", "--n-descriptions", "3", "--long-descriptions", "split"]
    args += ["--descriptions", str(colours[1]), "--out"]
    assert main([*args, str(tmp_path / "r")]) == 0
    run = json.loads((tmp_path / "r" / "run.json").read_text())
    used = dict(zip(run["names"], run["descriptions"], strict=True))
    *pieces, second, third = used["amber"]
    assert len(pieces) > 3
    assert " ".join(pieces) == long
    assert (second, third) == ("second one", "third one")
    assert len(used["blue"]) == 3
    assert main(["eval", str(tmp_path / "r")]) == 0
    # More pieces than compiled code takes of a class are refused before any work.
    document["classes"][0]["descriptions"][0] = "feather " * 6_000
    colours[1].write_text(json.dumps(document))
    assert main([*args, str(tmp_path / "s"), "--backend", "native"]) == 2
    assert "--backend: backend 'native' is not usable: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("a b c", ["a b c"]),
        ("a b c d e f", ["a b c d", "e f"]),
        ("a b c, d e f", ["a b c,", "d e f"]),
        ("a, b c d e f", ["a, b c d", "e f"]),
        ("a b c d e f g h i", ["a b c d", "e f g h", "i"]),
        ("", []),
    ],
)
def test_splitting_keeps_words_and_prefers_punctuation(text, pieces):
    assert split_text(text, lambda part: len(part.split()) <= 4) == pieces
    assert split_text(text, lambda part: False) == text.split()
