"""`spa-fast data check`: planted faults are all named, sound data pass."""

import json
import shutil

import pytest
from folder_twins import write_cifar, write_twin
from PIL import Image

from spa_fast.cil.data.catalog import DATA_SETS
from spa_fast.cil.data.doctor import check
from spa_fast.cil.data.probe import probe
from spa_fast.cli import main

CALTECH = DATA_SETS["caltech101"]


@pytest.fixture
def tree(tmp_path):
    """A sound data set: classes and counts as published."""
    return write_twin(tmp_path, CALTECH, CALTECH.train, CALTECH.test)


@pytest.fixture
def birds(tmp_path):
    return write_twin(tmp_path, DATA_SETS["cub"], 400, 200)


def test_sound_data_pass(tree, capsys):
    assert main(["data", "check", "--data-root", str(tree.parent), "--preset", "caltech101_B0_Inc10"]) == 0
    out = capsys.readouterr().out
    assert "100 classes, 2100 + 1000 images" in out
    assert "nothing to report" in out


def plant(tree):
    """Thirteen faults and oddities; returns the words by which each must be named."""
    photo = next((tree / "train" / "anchor").iterdir())
    ant = sorted((tree / "train" / "ant").iterdir())
    # 1 and 2: a class in one split only, of a name that no label has
    (tree / "test" / "barrel").rename(tree / "test" / "keg")
    # 3: a class without images
    for image in (tree / "test" / "bass").iterdir():
        image.unlink()
    # 4: bytes that are no image; 5: a photograph cut short; 6: an empty file
    ant[0].write_bytes(b"GIF is what this is not")
    whole = tree / "train" / "ant" / "cut.jpg"
    Image.effect_noise((64, 64), 80).convert("RGB").save(whole)
    whole.write_bytes(whole.read_bytes()[:-700])
    ant[1].write_bytes(b"")
    # 7: CMYK; 8: palette; 9: turned by EXIF
    Image.new("CMYK", (8, 8)).save(tree / "train" / "beaver" / "cmyk.jpg")
    Image.new("P", (8, 8)).save(tree / "train" / "beaver" / "palette.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (8, 9)).save(tree / "train" / "beaver" / "turned.jpg", exif=exif)
    # 10: one pixel; 11: more pixels than anyone meant
    Image.new("RGB", (1, 1)).save(tree / "train" / "camera" / "dot.png")
    Image.new("1", (10_000, 9_000)).save(tree / "train" / "camera" / "wall.png")
    # 12: a training image among the test images
    shutil.copy(photo, tree / "test" / "chair" / "again.jpg")
    # 13: something else
    (tree / "train" / "chair" / "notes.txt").write_text("")
    return {
        "class only in train": "barrel",
        "class only in test": "keg",
        "class without images": "test/bass",
        "number of images": "published 1000, found 991",
        "number of classes": "expected 100, found 101",
        "class names": "folders that caltech101 does not have: keg",
        "unreadable image": "cut.jpg: truncated",
        "CMYK": "beaver/cmyk.jpg",
        "palette": "beaver/palette.png",
        "EXIF rotation": "beaver/turned.jpg",
        "tiny image": "camera/dot.png: 1x1",
        "huge image": "camera/wall.png: Image size (90000000 pixels)",
        "image in train and test": f"train/anchor/{photo.name} is test/chair/again.jpg",
        "not an image file": "train/chair/notes.txt",
    }


def test_planted_faults_are_all_named(tree, capsys, tmp_path):
    expected = plant(tree)
    args = ["data", "check", "--data", str(tree), "--preset", "caltech101"]
    assert main([*args, "--quarantine", str(tmp_path / "bad.txt")]) == 1
    lines = capsys.readouterr().out.splitlines()
    for kind, words in expected.items():
        assert any(kind in line and words in line for line in lines), (kind, lines)
    (unreadable,) = [line for line in lines if "unreadable" in line]
    assert "not an image" in unreadable
    assert " 3 " in unreadable
    for kind in ("CMYK", "palette", "EXIF"):
        assert any(line.startswith("  note ") and kind in line for line in lines)
    listed = (tmp_path / "bad.txt").read_text().splitlines()
    assert len(listed) == 7
    assert {"train/camera/dot.png", "train/camera/wall.png", "train/chair/notes.txt"} <= set(listed)


@pytest.mark.parametrize(
    ("folder", "words"),
    [(".", "expected one data set, got caltech101, cub: choose one by --preset"), ("no", "no such folder")],
)
def test_a_quarantine_list_that_cannot_be_is_refused_before_any_check(
    tree, birds, tmp_path, folder, words, capsys
):
    presets = ["caltech101", "cub"] if folder == "." else ["cub"]
    args = ["data", "check", "--data-root", str(tmp_path), "--preset", *presets]
    assert main([*args, "--quarantine", str(tmp_path / folder / "q.txt")]) == 2
    said = capsys.readouterr()
    assert words in said.err
    assert "images" not in said.out


def test_a_quarantine_list_lets_a_run_go_on(colours, backbone_config, tmp_path, capsys):
    root = colours[0]
    (root / "train" / "gold" / "3.png").write_bytes(b"broken")
    shutil.copy(root / "test" / "blue" / "0.png", root / "train" / "blue" / "seen.png")
    bad = tmp_path / "bad.txt"
    assert main(["data", "check", "--data", str(root), "--quarantine", str(bad)]) == 1
    assert sorted(bad.read_text().splitlines()) == ["train/blue/seen.png", "train/gold/3.png"]
    args = ["train", "--data", str(root), "--backbone", f"config:{backbone_config}", "--method", "simple_cil"]
    assert main([*args, "--out", str(tmp_path / "r")]) == 2
    assert main([*args, "--exclude", str(bad), "--out", str(tmp_path / "r")]) == 0
    row = json.loads((tmp_path / "r" / "results.json").read_text())
    assert row["protocol"]["excluded_images"] == 2


def test_a_renamed_folder_is_found_by_its_name(birds):
    report = check(birds, DATA_SETS["cub"])
    assert set(report.faults) == {"number of images"}
    for split in ("train", "test"):
        (birds / split / "003.Sooty_Albatross").rename(birds / split / "003.Smoky_Albatross")
    report = check(birds, DATA_SETS["cub"])
    assert report.notes["folder unlike its label"] == ["003.Smoky_Albatross is Sooty Albatross"]
    for split in ("train", "test"):
        (birds / split / "004.Groove_billed_Ani").rename(birds / split / "205.Groove_billed_Ani")
    (message,) = check(birds, DATA_SETS["cub"]).faults["class names"]
    assert "2 of 200 folders carry the name of their label" in message
    assert "'005.Crested_Auklet' at the place of 'Groove billed Ani'" in message


def test_two_swapped_folders_are_too_many(birds):
    for split in ("train", "test"):
        (birds / split / "001.Black_footed_Albatross").rename(birds / split / "x")
        (birds / split / "002.Laysan_Albatross").rename(birds / split / "001.Laysan_Albatross")
        (birds / split / "x").rename(birds / split / "002.Black_footed_Albatross")
    (message,) = check(birds, DATA_SETS["cub"]).faults["class names"]
    assert "198 of 200 folders" in message
    assert "'001.Laysan_Albatross' at the place of 'Black footed Albatross'" in message


def test_unlike_folders_need_a_map(birds, tmp_path, capsys):
    for split in ("train", "test"):
        for i, folder in enumerate(sorted((birds / split).iterdir())):
            folder.rename(birds / split / f"{i:03d}")
    args = ["data", "check", "--data", str(birds), "--preset", "cub"]
    assert main(args) == 1
    assert "0 of 200 folders" in capsys.readouterr().out
    names = tmp_path / "names.json"
    names.write_text(json.dumps({f"{i:03d}": f"bird {i}" for i in range(200)}))
    assert main([*args, "--classnames", str(names)]) == 1
    assert "class names" not in capsys.readouterr().out


def test_layout_faults(tmp_path, colours, capsys):
    (colours[0] / "val").mkdir()
    assert main(["data", "check", "--data", str(colours[0])]) == 1
    assert "has both test/ and val/" in capsys.readouterr().out
    assert main(["data", "check", "--data", str(tmp_path / "no"), "--preset", "cub"]) == 1
    assert "published at https://www.vision.caltech.edu" in capsys.readouterr().out


def test_cifar_is_checked_too(tmp_path):
    write_cifar(tmp_path / "cifar-100-python", 300, 200)
    report = check(tmp_path / "cifar-100-python", DATA_SETS["cifar224"])
    assert set(report.faults) == {"number of images"}
    train = tmp_path / "cifar-100-python" / "train"
    shutil.copy(train, tmp_path / "cifar-100-python" / "test")
    report = check(tmp_path / "cifar-100-python", DATA_SETS["cifar224"])
    assert report.faults["image in train and test"][0] == "train[0] is test[0]"
    assert len(report.faults["image in train and test"]) == 300


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ((), "expected --data FOLDER or --data-root"),
        (("--data-root", "/no/such"), "--data-root: no such folder: /no/such"),
        (("--data-root", "."), "holds none of cifar224, cub"),
        (("--data", ".", "--preset", "cub", "sun"), "--preset: expected at most one"),
        (("--data", ".", "--preset", "cup"), "--preset: unknown data set 'cup'; did you mean 'cub'"),
    ],
)
def test_what_to_check_must_be_said(args, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["data", "check", *args]) == 2
    assert words in capsys.readouterr().err


def test_deep_pixels_and_no_permission_are_faults(tmp_path):
    Image.new("I;16", (8, 8)).save(tmp_path / "deep.png")
    assert probe(tmp_path / "deep.png").fault == (
        "unreadable image",
        "pixels of mode I;16: convert them to 8 bits a channel",
    )
    kind, _ = probe(tmp_path / "gone.png").fault
    assert kind == "unreadable image"
