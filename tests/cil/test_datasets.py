import json

import pytest
from PIL import Image

from spa_fast.cil.data.datasets import read_image_folders
from spa_fast.cil.data.images import check_images, read_image
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
    with pytest.raises(RunError, match="class name 'same' stands for amber, blue"):
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
    with pytest.raises(RunError, match=r"unreadable image: .*broken\.jpg: .*; data check --quarantine FILE"):
        check_images([path])


def test_what_only_looks_broken_and_what_is_no_photograph(tmp_path, monkeypatch, recwarn):
    whole = tmp_path / "film_behind_it.jpg"
    Image.new("RGB", (64, 64), "red").save(whole)
    whole.write_bytes(whole.read_bytes() + bytes(9000))
    dot, large = tmp_path / "dot.png", tmp_path / "large.png"
    Image.new("RGB", (1, 1)).save(dot)
    Image.new("RGB", (80, 60)).save(large)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 64 * 64 + 1)
    assert check_images([whole, dot, large]) == [dot, large]
    assert not recwarn.list
    # Pillow itself refuses twice that.
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(RunError, match=r"unreadable image: .*large\.png"):
        check_images([large])


def test_images_come_upright_and_in_rgb(tmp_path):
    upright = Image.new("RGB", (4, 2), "red")
    upright.putpixel((0, 0), (0, 0, 255))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 90 degrees to see it upright
    upright.rotate(90, expand=True).save(tmp_path / "turned.png", exif=exif)
    assert read_image(tmp_path / "turned.png").tobytes() == upright.tobytes()
    for mode in ("1", "L", "P", "LA", "RGBA", "CMYK"):
        path = tmp_path / f"{mode}.{'jpg' if mode == 'CMYK' else 'png'}"
        Image.new(mode, (3, 3)).save(path)
        assert read_image(path).mode == "RGB"


def test_a_palette_with_transparency_keeps_its_colours_without_a_warning(tmp_path, recwarn):
    image = Image.new("P", (2, 1))
    image.putpalette([9, 8, 7, 6, 5, 4])
    image.putpixel((1, 0), 1)
    image.save(tmp_path / "p.png", transparency=bytes([0, 128]))
    found = read_image(tmp_path / "p.png")
    assert [found.getpixel((x, 0)) for x in range(2)] == [(9, 8, 7), (6, 5, 4)]
    assert not recwarn.list


@pytest.mark.parametrize("mode", ["I;16", "F"])
def test_deep_pixels_are_refused_rather_than_clipped(tmp_path, mode):
    Image.new(mode, (4, 4)).save(tmp_path / "deep.tiff")
    for read in (read_image, lambda path: check_images([path])):
        with pytest.raises(RunError, match=r"deep\.tiff: pixels of mode"):
            read(tmp_path / "deep.tiff")


def test_two_folders_of_one_name(colours):
    for split in ("train", "test"):
        (colours[0] / split / "gold").rename(colours[0] / split / "dark red")
    with pytest.raises(RunError, match="class name 'dark red' stands for dark red, dark_red"):
        read_image_folders(colours[0])


@pytest.mark.parametrize("name", ["notes.txt", "image", "folder.png/inner.png", "dangling.jpg"])
def test_nothing_in_a_class_is_skipped_silently(colours, name):
    path = colours[0] / "train" / "gold" / name
    if name == "dangling.jpg":
        path.symlink_to("nowhere.jpg")
    else:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"")
    with pytest.raises(RunError, match="not an image file"):
        read_image_folders(colours[0])
