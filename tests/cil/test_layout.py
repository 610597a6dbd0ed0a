"""The layouts that data come in: list files, exclusion lists, labels, CIFAR-100's files."""

import json

import numpy as np
import pytest
from folder_twins import stream, write_cifar, write_twin
from hypothesis import given
from hypothesis import strategies as st

from spa_fast.cil.data.catalog import DATA_SETS
from spa_fast.cil.data.cifar import read_cifar
from spa_fast.cil.data.datasets import read_image_folders
from spa_fast.cil.data.images import read_image, relative_name, stamp
from spa_fast.cil.data.labels import class_names, match_labels
from spa_fast.cil.data.layout import list_images
from spa_fast.cil.errors import RunError

# --- lists


def test_a_list_names_the_images_of_each_split(colours, tmp_path):
    listed = tmp_path / "list.txt"
    listed.write_text(
        "train\ntrain/gold/1.png\ntrain/blue/0.png\n\ntest:\ntest/gold/2.png\ntrain/blue/2.png\n"
    )
    data = read_image_folders(colours[0], image_list=listed)
    assert data.folders == ("blue", "gold")
    assert [[relative_name(i, data.root) for i in c] for c in data.images["test"]] == [
        ["train/blue/2.png"],
        ["test/gold/2.png"],
    ]


def test_a_list_without_headings_goes_by_its_paths(colours, tmp_path):
    (colours[0] / "test").rename(colours[0] / "val")
    listed = tmp_path / "list.txt"
    paths = sorted(str(p.relative_to(colours[0])) for p in colours[0].rglob("*.png"))
    listed.write_text("\n".join(paths))
    by_list, by_tree = read_image_folders(colours[0], image_list=listed), read_image_folders(colours[0])
    assert by_list == by_tree


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("train\n../../etc/passwd\n", r"line 2: expected a path inside the data folder"),
        ("train\n/etc/passwd\n", "line 2: expected a path inside the data folder"),
        ("train\na\0/b.png\n", "line 2: expected a path inside the data folder"),
        ("gold/1.png\n", "line 1: expected a line 'train' or 'test' before 'gold/1.png'"),
        ("train\n1.png\n", "line 2: expected CLASS/IMAGE"),
        ("train/1.png\n", "line 1: expected CLASS/IMAGE"),
        ("train\ngold/1.png\ngold/1.png\n", "line 3: 'gold/1.png' is listed twice"),
        ("train\ngold/1.png\ntest\ngold/2.png\nval\ngold/3.png\n", "both test and val"),
        ("train\ngold/1.png\n", "no test images"),
        ("", "no train images"),
    ],
)
def test_lists_that_cannot_be_followed(colours, tmp_path, text, words):
    (tmp_path / "list.txt").write_text(text)
    with pytest.raises(RunError, match="--image-list: .*" + words):
        list_images(colours[0], tmp_path / "list.txt")


def test_unreadable_lists(colours, tmp_path):
    with pytest.raises(RunError, match=r"--image-list: .*cannot be read"):
        list_images(colours[0], tmp_path / "none.txt")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RunError, match=r"--exclude: .*cannot be read"):
        list_images(colours[0], exclude=tmp_path / "binary.txt")


def test_excluded_images_are_left_out_and_counted(colours, tmp_path):
    (colours[0] / "train" / "gold" / "notes.txt").write_text("")
    (tmp_path / "bad.txt").write_text("train/gold/1.png\ntrain/gold/notes.txt\n")
    data = read_image_folders(colours[0], exclude=tmp_path / "bad.txt")
    assert data.left_out == 2
    assert len(data.images["train"][6]) == 5
    (tmp_path / "bad.txt").write_text("train/gold/11.png\n")
    with pytest.raises(RunError, match=r"--exclude: .*not in .*: train/gold/11\.png"):
        list_images(colours[0], exclude=tmp_path / "bad.txt")


# --- labels


def test_names_are_compared_without_number_separators_and_case():
    pairs = [
        ("001.Black_footed_Albatross", "Black footed Albatross"),
        ("ApplyEyeMakeup", "Apply Eye Makeup"),
        ("HandstandPushups", "Hand Stand Pushups"),
        ("F-16A-B", "F-16A/B"),
        ("707-320", "707-320"),
        ("airplane_cabin", "airplane cabin"),
    ]
    match = match_labels(*map(list, zip(*pairs, strict=True)))
    assert (match.agree, match.total, match.trusted) == (6, 6, True)
    assert not match_labels(["727-200"], ["707-320"]).trusted


def test_ninety_percent_is_the_limit():
    labels = [f"label {i:02d}" for i in range(20)]
    folders = [*labels[:18], "zebra", "zoo"]
    assert match_labels(folders, labels).trusted
    assert not match_labels([*labels[:17], "zaire", "zebra", "zoo"], labels).trusted


@pytest.mark.parametrize("key", DATA_SETS)
def test_published_folders_get_their_labels(key, tmp_path):
    data_set = DATA_SETS[key]
    folder = write_twin(tmp_path, data_set, data_set.classes, data_set.classes)
    data = read_image_folders(folder, data_set=data_set, classes=data_set.classes)
    assert len(data.names) == data_set.classes
    with pytest.raises(
        RunError, match=f"{data_set.classes - 1} labels|expected {data_set.classes - 1} class"
    ):
        read_image_folders(folder, data_set=data_set, classes=data_set.classes - 1)


def test_labels_json_of_lamda_repositories(tmp_path, colours):
    folders = [p.name for p in sorted((colours[0] / "train").iterdir())]
    path = tmp_path / "labels.json"
    path.write_text(json.dumps({"cub": [f.upper().replace("_", "-") for f in folders], "sun": ["x"]}))
    assert class_names(folders, path, DATA_SETS["cub"], 0)[3] == "DARK-RED"
    path.write_text(json.dumps(folders[::-1]))
    with pytest.raises(RunError, match=r"--classnames: .*'amber' at the place of 'gold'"):
        class_names(folders, path, None, 0)
    path.write_text(json.dumps(folders[:-1]))
    with pytest.raises(RunError, match="7 folders, 6 labels; folders without a label: gold"):
        class_names(folders, path, None, 0)


# --- CIFAR-100


@pytest.fixture
def cifar(tmp_path):
    return write_cifar(tmp_path / "cifar-100-python", 300, 100)


def test_cifar_is_read_row_by_row(cifar):
    data = read_image_folders(cifar, data_set=DATA_SETS["cifar224"], classes=100)
    assert data.names[:2] == ("apple", "aquarium fish")
    assert data.folders[1] == "aquarium_fish"
    assert [len(c) for c in data.images["train"]] == [3] * 100
    image = data.images["train"][7][1]
    assert (relative_name(image, cifar), stamp(image)[0]) == ("train[107]", "train[107]")
    pixels = np.random.default_rng(0).integers(0, 256, (300, 3072), np.uint8)[107].reshape(3, 32, 32)
    assert (np.asarray(read_image(image)) == pixels.transpose(1, 2, 0)).all()


def test_the_reader_agrees_with_the_standard_one(cifar):
    import pickle

    content = pickle.loads((cifar / "train").read_bytes(), encoding="latin-1")
    names, splits = read_cifar(cifar)
    assert content["fine_labels"][:3] == [0, 1, 2]
    for label in (0, 99):
        for image in splits["train"][label]:
            assert (image.pixels.ravel() == content["data"][image.row]).all()
    assert names == tuple(pickle.loads((cifar / "meta").read_bytes(), encoding="latin-1")["fine_label_names"])


class Trap:
    fired = False

    def __reduce__(self):
        return setattr, (Trap, "fired", True)


def test_a_malicious_file_is_not_run(cifar):
    import pickle

    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        (cifar / "train").write_bytes(pickle.dumps({"fine_labels": Trap(), "data": 1}, protocol))
        with pytest.raises(RunError, match=r"train: not a CIFAR-100 file: .*(protocol|setattr|instruction)"):
            read_cifar(cifar)
    assert not Trap.fired


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"cos\nsystem\nU\x02ls\x85R.", "asks for 'os system'"),
        (b"cnumpy\nndarray\nK\x01\x85R.", "a call of 'numpy ndarray'"),
        (b"U\x02ls)R.", "a call of 'ls'"),
        (b"cnumpy\ndtype\nU\x02O8K\x00K\x01\x87R.", "expected an array of bytes, got 'O8'"),
        (b"}}b.", "state for something other than an array"),
        (b"T\xff\xff\xff\xff.", "truncated"),
        (b"T\xff\xff\xff\x7f.", "truncated"),
        (b"}" * 9 + b".", "not a CIFAR-100 file"),
        (b"t.", "not a CIFAR-100 file"),
        (b"(h\x09.", "not a CIFAR-100 file"),
        (b"](}(]K\x01ue.", "not a CIFAR-100 file"),
        (b"}a.", "not a CIFAR-100 file"),
        (b"K\x01.", "expected a dictionary"),
        (b"}(K\x01", "truncated"),
        (b"}K\x01K\x02s.", "expected a str, got int"),
        (b"})" + b"\x85" * 300_000 + b"K\x01s.", "expected a str, got tuple"),
        (b"cnumpy\ndtype\n)" + b"\x85" * 300_000 + b"R.", "not a CIFAR-100 file"),
    ],
)
def test_streams_that_are_no_data(cifar, body, words):
    (cifar / "meta").write_bytes(b"\x80\x02" + body)
    with pytest.raises(RunError, match=words):
        read_cifar(cifar)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"fine_labels": [0, 1]}, r"expected data of shape \(2, 3072\) for 2 labels, got \(3, 3072\)"),
        ({"fine_labels": [0, 1, 100]}, "expected labels 0 to 99, got 100"),
        ({"fine_labels": ["a", 1, 2]}, "expected labels 0 to 99, got str"),
        ({"fine_labels": "abc"}, "expected fine_labels and an array data"),
        ({"data": [1]}, "expected fine_labels and an array data"),
    ],
)
def test_labels_and_pixels_must_fit(cifar, change, words):
    content = {"fine_labels": [0, 1, 2], "data": np.zeros((3, 3072), np.uint8), **change}
    (cifar / "train").write_bytes(b"\x80\x02" + stream(content) + b".")
    with pytest.raises(RunError, match=words):
        read_cifar(cifar)


def test_cifar_with_a_class_without_images(cifar):
    content = {"fine_labels": [0, 1, 2], "data": np.zeros((3, 3072), np.uint8)}
    (cifar / "train").write_bytes(b"\x80\x02" + stream(content) + b".")
    with pytest.raises(RunError, match=r"class without images: .*train/bear"):
        read_image_folders(cifar)


def test_an_empty_or_cut_file_is_named(cifar):
    whole = (cifar / "test").read_bytes()
    for length in (0, 1, 2, 100, len(whole) // 2, len(whole) - 1):
        (cifar / "test").write_bytes(whole[:length])
        with pytest.raises(RunError, match="test: not a CIFAR-100 file"):
            read_cifar(cifar)


@given(st.data())
def test_damaged_streams_give_an_error_or_data(tmp_path_factory, data):
    whole = bytearray(b"\x80\x02" + stream({"fine_label_names": ["a", "b"], "n": [1, 2, 70_000]}) + b".")
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    folder = tmp_path_factory.mktemp("damaged")
    for name in ("meta", "train", "test"):
        (folder / name).write_bytes(bytes(whole))
    with pytest.raises(RunError):
        read_cifar(folder)
