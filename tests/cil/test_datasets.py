import json

import pytest
from PIL import Image

from spa_fast.cil.data.datasets import check_images, read_image_folders
from spa_fast.cil.errors import RunError

CLASSES = ("amber", "blue", "coral", "dark_red", "emerald", "fuchsia", "gold")


def test_lists_sorted_classes_and_images(colours):
    data = read_image_folders(colours[0])
    assert data.folders == CLASSES
    assert data.names[3] == "dark red"
    assert [len(c) for c in data.images["train"]] == [6] * 7
    assert [p.name for p in data.images["test"][0]] == ["0.png", "1.png", "2.png"]


def test_val_serves_as_test(colours):
    root = colours[0]
    (root / "test").rename(root / "val")
    assert len(read_image_folders(root).images["test"]) == 7


def test_missing_folder(tmp_path):
    with pytest.raises(RunError, match=r"--data: no such folder: .*nowhere"):
        read_image_folders(tmp_path / "nowhere")


def test_empty_folder(tmp_path):
    with pytest.raises(RunError, match="expected train/ and test/"):
        read_image_folders(tmp_path)


def test_both_test_and_val(colours):
    root = colours[0]
    (root / "val").mkdir()
    with pytest.raises(RunError, match="both test/ and val/"):
        read_image_folders(root)


def test_class_without_images(colours):
    root = colours[0]
    for image in (root / "train" / "blue").iterdir():
        image.unlink()
    with pytest.raises(RunError, match=r"class without images: .*train/blue"):
        read_image_folders(root)


def test_class_lists_that_differ(colours):
    root = colours[0]
    (root / "test" / "gold").rename(root / "test" / "golden")
    with pytest.raises(RunError, match="only in train: gold; only in test: golden"):
        read_image_folders(root)


def test_classnames(colours, tmp_path):
    root, file = colours[0], tmp_path / "names.json"
    file.write_text(json.dumps({c: c.upper() for c in CLASSES}))
    assert read_image_folders(root, file).names[0] == "AMBER"
    file.write_text(json.dumps({c: c for c in CLASSES if c != "coral"} | {"corral": "x"}))
    with pytest.raises(RunError, match=r"no name for folder 'coral'; did you mean 'corral'\?"):
        read_image_folders(root, file)
    file.write_text(json.dumps(dict.fromkeys(CLASSES, "same")))
    with pytest.raises(RunError, match="more than one folder: same"):
        read_image_folders(root, file)
    file.write_text('{"amber": "a", "amber": "b"}')
    with pytest.raises(RunError, match="duplicate key 'amber'"):
        read_image_folders(root, file)
    file.write_text("[" * 100_000)
    with pytest.raises(RunError, match="not a readable JSON file"):
        read_image_folders(root, file)


@pytest.mark.parametrize("content", [b"", b"not an image", None])
def test_unreadable_image_is_named(tmp_path, content):
    path = tmp_path / "broken.jpg"
    Image.new("RGB", (64, 64), "red").save(path)
    path.write_bytes(path.read_bytes()[:200] if content is None else content)
    with pytest.raises(RunError, match=r"unreadable image: .*broken\.jpg"):
        check_images([path])
