"""Every format that people have, told apart; broken and hostile files are named with a remedy."""

import json
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spa_fast.cil import json_input
from spa_fast.cil.data.catalog import DATA_SETS, description_file
from spa_fast.cil.descriptions.readers import fingerprint, read_document
from spa_fast.cil.descriptions.schema import ClassEntry, Descriptions, write_descriptions
from spa_fast.cil.errors import RunError


def texts(document):
    return {entry.name: entry.texts for entry in document.classes}


def dump(path, document):
    path.write_text(document if isinstance(document, str) else json.dumps(document), encoding="utf-8")
    return path


def test_flat(tmp_path):
    file = dump(tmp_path / "f.json", {"cat": ["a", "b"], "dog": "c", "707-320": [], "cow": None})
    document = read_document(file)
    assert document.form == "flat"
    assert texts(document) == {"cat": ("a", "b"), "dog": ("c",), "707-320": (), "cow": ()}


def test_pairwise_takes_the_entry_with_itself(tmp_path):
    chat = {
        "cat": {"cat": ["whiskers"], "dog": ["x"]},
        "dog": {"cat": ["long snout", "wet nose"], "cow": ["wet nose"]},
        "cow": {"cow": ["horns"], "cat": ["y"]},
    }
    document = read_document(dump(tmp_path / "f.json", chat))
    assert document.form == "pairwise"
    assert texts(document) == {"cat": ("whiskers",), "dog": ("wet nose", "long snout"), "cow": ("horns",)}
    assert document.remarks == ("no entry with itself, texts against other classes used: dog",)


def test_per_data_set_fills_templates(tmp_path):
    several = {
        "imagenet": {"cat": ["a photo of {}"], "dog": ["x"]},
        "cub": {"wren": ["a {c} {{bird}}"], "crow": ["y"]},
    }
    file = dump(tmp_path / "f.json", several)
    for document in (read_document(file, ["crow", "wren"]), read_document(file, dataset="CUB")):
        assert document.form == "per data set"
        assert document.dataset == "cub"
        assert texts(document) == {"wren": ("a wren {{bird}}",), "crow": ("y",)}
    with pytest.raises(RunError, match="holds cub, imagenet: say which"):
        read_document(file)
    assert read_document(dump(file, {"cub": several["cub"]})).dataset == "cub"


@pytest.mark.parametrize("labels", [{"0": "cat", "1": "dog"}, {"cat": 0, "dog": 1}, ["cat", "dog"]])
def test_by_index_with_its_map(tmp_path, labels):
    dump(tmp_path / "pets_label2class.json", labels)
    document = read_document(dump(tmp_path / "pets_concepts.json", {"1": ["b"], "0": ["a"]}))
    assert document.form == "by index"
    assert texts(document) == {"cat": ("a",), "dog": ("b",)}


def test_by_index_with_several_maps_takes_its_own(tmp_path):
    dump(tmp_path / "a_label2class.json", {"0": "ape"})
    dump(tmp_path / "b_label2class.json", {"0": "bee"})
    assert texts(read_document(dump(tmp_path / "b.json", {"0": ["x"]}))) == {"bee": ("x",)}


def test_by_index_without_a_map(tmp_path):
    file = dump(tmp_path / "c.json", {"0": ["a"], "1": ["b"]})
    assert texts(read_document(file, ["cat", "dog"])) == {"cat": ("a",), "dog": ("b",)}
    with pytest.raises(
        RunError, match=r"put \*_label2class.json beside it, or give as many class names in order"
    ):
        read_document(file)
    with pytest.raises(RunError, match="classes are numbers"):
        read_document(file, ["cat"])
    with pytest.raises(RunError, match="no class name for number 7 in class names in order"):
        read_document(dump(tmp_path / "d.json", {"0": ["a"], "7": ["b"]}), ["cat", "dog"])
    # Classes may be called by numbers.
    assert texts(read_document(file, ["0", "1"])) == {"0": ("a",), "1": ("b",)}
    dump(tmp_path / "c_label2class.json", {"0": ["cat"]})
    with pytest.raises(RunError, match=r"c_label2class\.json: expected \{number: class name\}"):
        read_document(file)


@pytest.fixture
def captions(tmp_path):
    folder = tmp_path / "cub" / "generated_descriptions"
    folder.mkdir(parents=True)
    dump(folder / "F-16A_B_descriptions.txt", "1.jpg\tgrey wings\n\n2.jpg\ttwo  tabs\there\n")
    dump(folder / "sea_lion_descriptions.txt", "\ufeffno tab at all\n")
    dump(folder / "classnames.txt", "['F-16A/B', 'sea lion']")
    return folder


def test_text_folders(captions):
    expected = {"F-16A/B": ("grey wings", "two  tabs\there"), "sea lion": ("no tab at all",)}
    for path in (captions, captions.parent):
        assert texts(read_document(path)) == expected
    assert texts(read_document(captions / "sea_lion_descriptions.txt")) == {"sea lion": ("no tab at all",)}
    (captions / "classnames.txt").unlink()
    assert "F-16A B" in texts(read_document(captions))
    assert "F/16A/b" in texts(read_document(captions, ["F/16A/b"]))
    with pytest.raises(RunError, match=r"expected CLASS_descriptions\.txt in the folder"):
        read_document(captions.parent.parent)


@pytest.mark.parametrize(
    "names",
    [
        "__import__('os').system('touch pwned')",
        "[open('x')]",
        "{'a': 1}",
        "['a', 1]",
        "[" * 300,
        "-" * 100_000 + "1",
        "(" * 5_000 + ")" * 5_000,
        "['a'",
        "9" * 5_000,
    ],
    ids=lambda names: names[:12],
)
def test_name_lists_are_read_not_run(captions, names, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    dump(captions / "classnames.txt", names)
    with pytest.raises(RunError, match=r"classnames\.txt: expected a list"):
        read_document(captions)
    assert not (tmp_path / "pwned").exists()


def test_own_format_round_trip(tmp_path):
    classes = (
        ClassEntry("F/A-18", ("a", "ü"), "ok", ("00ff",)),
        ClassEntry("cat", (), "refused", (), "the model refused"),
    )
    file = tmp_path / "own.json"
    written = Descriptions(classes, "own", "d", {"model": "m", "params": {"n": 1}})
    write_descriptions(file, written)
    assert read_document(file) == written
    assert [c["id"] for c in json.loads(file.read_text())["classes"]] == [0, 1]
    assert [p.name for p in tmp_path.iterdir()] == ["own.json"]


def test_packaged_files_are_in_it():
    documents = [read_document(description_file(data_set)) for data_set in DATA_SETS.values()]
    assert {document.form for document in documents} == {"own"}
    assert sum(len(document.classes) for document in documents) == 1596


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ([], "expected an object of classes, got an empty one"),
        ({}, "expected an object of classes, got an empty one"),
        ("3", "expected an object of classes, got int"),
        ({"a": 3}, "class 'a': expected a list of texts, got int"),
        ({"a": [1]}, "class 'a': expected a list of texts, got a list"),
        ({"a": ["x"], "b": {"c": ["y"]}}, "class 'b': expected a list of texts, got an object"),
        ({"a": {"a": {"b": ["x"]}}}, "class 'a': expected a list of texts, got an object"),
        ({"schema": "spa_fast.descriptions/9", "classes": []}, "expected schema 'spa_fast.descriptions/1'"),
        ({"classes": {}}, "a list 'classes'"),
        ({"classes": [3]}, r"classes\[0\]: expected 'name'"),
        ({"classes": [{"name": "a", "descriptions": "x"}]}, r"classes\[0\]"),
        ({"classes": [{"name": "a", "descriptions": [], "status": "fine"}]}, "status: expected one of ok"),
        ({"classes": [], "generator": "me"}, "expected an object 'generator', got a text"),
    ],
)
def test_shapes_that_are_none(tmp_path, document, message):
    file = dump(tmp_path / "f.json", document)
    with pytest.raises(RunError, match=message) as caught:
        read_document(file)
    assert "f.json" in str(caught.value)


def test_duplicate_keys_are_kept_for_the_linter(tmp_path):
    file = dump(tmp_path / "f.json", '{"a": ["x"], "b": ["y"], "a": ["z"], "a": ["w"]}')
    assert read_document(file).duplicate_keys == ("a", "a")
    with pytest.raises(RunError, match="duplicate key 'a': keep one"):
        json_input.read_json(file, "file")


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", r"empty \(0 bytes\): download or write it again"),
        (b" \n", r"empty \(2 bytes\)"),
        (b'{"a": ["x"', r"ends in the middle \(line 1, column 11\): truncated, copy it again"),
        (b'{"a": ["x', r"ends in the middle .*: truncated"),
        (b'{"a": ["x"],}', "Expecting property name.* at line 1, column 13|Illegal trailing comma"),
        (b"\xff\xfe{\x00}\x00", "UTF-16: save it as UTF-8"),
        ('{"é": ["x"]}'.encode("latin-1"), "byte 0xe9 at offset 2 is not UTF-8: save it as UTF-8"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS pointer.*git lfs pull"),
        (b"<!DOCTYPE html><html>", "a web page.*download the raw file"),
        (b"\x80\x04\x95pickle", "byte 0x80 at offset 0 is not UTF-8"),
        (b"[" * 100_000, "nested more than 32 deep"),
        (b'{"a":' * 100_000, "nested more than 32 deep"),
        (b'{"a": ' + b"9" * 5_000 + b"}", "Exceeds the limit|class 'a'"),
        (b'{"a": ["\x00"]}', "Invalid control character"),
    ],
)
def test_broken_files_are_named_with_a_remedy(tmp_path, raw, message):
    file = tmp_path / "f.json"
    file.write_bytes(raw)
    with pytest.raises(RunError, match=message) as caught:
        read_document(file)
    assert "f.json" in str(caught.value)


def test_a_byte_order_mark_is_no_fault(tmp_path):
    file = tmp_path / "f.json"
    file.write_bytes(b'\xef\xbb\xbf{"a": ["x"]}')
    assert texts(read_document(file)) == {"a": ("x",)}


def test_too_large_and_not_there(tmp_path, monkeypatch):
    file = dump(tmp_path / "f.json", {"a": ["x"]})
    with pytest.raises(RunError, match="no such file"):
        read_document(tmp_path / "g.json")
    monkeypatch.setattr(json_input, "MAX_BYTES", 5)
    with pytest.raises(RunError, match="bytes, at most 5 are read"):
        read_document(file)


def test_brackets_in_texts_are_not_depth(tmp_path):
    file = dump(tmp_path / "f.json", {"a": ["[" * 100 + '\\"[{' * 50]})
    assert len(texts(read_document(file))["a"]) == 1


def test_many_keys_take_no_time(tmp_path):
    # Quadratic search for duplicates would take minutes.
    file = dump(tmp_path / "f.json", {f"k{i}": [] for i in range(50_000)})
    assert len(read_document(file).classes) == 50_000


def test_every_truncation_and_bit_flip_reads_or_is_refused(tmp_path):
    whole = description_file(DATA_SETS["caltech101"]).read_bytes()[:4_000]
    file = tmp_path / "f.json"
    for size in range(0, len(whole), 64):
        file.write_bytes(whole[:size])
        with pytest.raises(RunError, match=r"f\.json"):
            read_document(file)
    source = random.Random(0)
    document = json.dumps({"a": ["x", "y"], "b": {"c": ["z"]}, "classes": [{"name": "n"}]}).encode()
    for _ in range(300):
        flipped = bytearray(document)
        flipped[source.randrange(len(flipped))] ^= 1 << source.randrange(8)
        file.write_bytes(flipped)
        with pytest.raises(RunError, match=r"f\.json"):
            read_document(file)


ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=12,
)


@given(document=ANY_JSON)
def test_any_json_reads_or_is_refused(tmp_path_factory, document):
    file = dump(tmp_path_factory.getbasetemp() / "any.json", json.dumps(document))
    try:
        read = read_document(file, ["0", "a"])
    except RunError:
        return
    assert all(isinstance(text, str) for entry in read.classes for text in entry.texts)


def test_fingerprints_follow_the_content(captions):
    before = fingerprint(captions)
    assert before == fingerprint(captions)
    assert fingerprint(captions / "classnames.txt") != before
    dump(captions / "sea_lion_descriptions.txt", "other\n")
    assert fingerprint(captions) != before
