import dataclasses
import os
import re
import shutil

import pytest
import torch
import torch.nn.functional as F

from spa_fast.cil.backbone import Backbone
from spa_fast.cil.config import SpaConfig
from spa_fast.cil.data import cache as cache_module
from spa_fast.cil.data import extract, images
from spa_fast.cil.data.cache import FeatureCache, Storage
from spa_fast.cil.data.datasets import read_image_folders
from spa_fast.cil.data.extract import nearest_patches
from spa_fast.cil.data.features import Stacked
from spa_fast.cil.errors import RunError
from spa_fast.cil.loading import load_backbone
from spa_fast.cil.run_config import RunConfig
from spa_fast.cli import main


@pytest.fixture
def cache(colours, backbone, tmp_path):
    return FeatureCache(tmp_path / "cache", read_image_folders(colours[0]), backbone)


@pytest.fixture
def encoded(monkeypatch):
    """Images per encoder call so far."""
    calls, real = [], Backbone.encode_images

    def encode(self, pixels, source="value_path"):
        calls.append(len(pixels))
        return real(self, pixels, source)

    monkeypatch.setattr(Backbone, "encode_images", encode)
    return calls


def again(cache, storage=None, data=None):
    """A later process's view of the same folder."""
    root = cache.folder.parents[1]
    storage = storage or cache.storage
    said = []
    later = FeatureCache(root, data or cache.data, cache.backbone, storage=storage, say=said.append)
    later.said = said
    return later


def test_extracts_once(cache, encoded):
    first, second = cache.load("train", 2), cache.load("train", 2)
    assert encoded == [6]
    assert torch.equal(first.globals, second.globals)
    assert torch.equal(first.patches, second.patches)
    assert first.patches.shape == (6, 16, 24)
    assert first.patches.dtype == torch.float16
    pixels = torch.stack(
        [cache.backbone.preprocess(images.read_image(i)) for i in cache.data.images["train"][2]]
    )
    whole, patches = cache.backbone.encode_images(pixels)
    assert torch.equal(first.globals, whole)
    assert torch.equal(first.patches, patches.half())


def test_fill_extracts_what_is_missing_and_says_how_fast(cache, encoded):
    cache.load("train", 0)
    assert len(cache.missing()) == 7 * 9 - 6
    later = again(cache)
    later.fill("test")
    assert encoded == [6, *[3] * 7]
    assert len(later.missing()) == 6 * 6
    later.fill()
    assert not later.missing()
    assert sum(encoded) == 7 * 9
    assert [line.split(" in ")[0] for line in later.said] == ["features: 21 images", "features: 36 images"]
    assert "images/s, encoder busy" in later.said[0]
    assert f"MB in {cache.folder}" in later.said[0]


def test_a_long_class_is_decoded_ahead_in_batches(cache, encoded, monkeypatch):
    whole = [cache.load("train", i) for i in range(3)]
    monkeypatch.setattr(extract, "AHEAD", 1)
    extractor = extract.Extractor(cache.backbone, "value_path", 0, torch.float16, batch=4)
    encoded.clear()
    parts = list(extractor.classes(cache.data.images["train"][:3]))
    assert encoded == [4, 2] * 3
    for ours, theirs in zip(parts, whole, strict=True):
        torch.testing.assert_close(ours.globals, theirs.globals)


@pytest.mark.parametrize("key", ["stat", "content"])
def test_later_runs_never_open_the_images(cache, key, encoded, monkeypatch):
    first = again(cache, Storage(key=key))
    first.fill()
    for image in (i for found in cache.data.images.values() for kind in found for i in kind):
        stat = image.stat()
        image.write_bytes(b"\0" * stat.st_size)
        os.utime(image, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    encoded.clear()

    def trap(*args):
        raise AssertionError("an image was opened")

    for module, name in ((extract, "read_image"), (cache_module, "image_bytes")):
        monkeypatch.setattr(module, name, trap)
    later = again(cache, Storage(key=key))
    assert not later.missing()
    later.fill()
    assert torch.equal(later.load("train", 3).globals, first.load("train", 3).globals)
    assert not encoded
    assert not later.said


def test_a_changed_image_is_extracted_again_alone(cache, encoded):
    cache.fill()
    image = cache.data.images["test"][1][0]
    image.write_bytes(cache.data.images["test"][2][0].read_bytes())
    encoded.clear()
    later = again(cache)
    later.fill()
    assert encoded == [3]
    assert "test-0001-blue.safetensors: its images have changed; extracted again" in later.said[0]


@pytest.mark.parametrize(("key", "calls"), [("stat", 14), ("content", 0)])
def test_a_copy_of_the_data_is_known_by_content_only(cache, tmp_path, encoded, key, calls):
    again(cache, Storage(key=key)).fill()
    copy = shutil.copytree(
        cache.data.root, tmp_path / "elsewhere" / cache.data.root.name, copy_function=shutil.copy
    )
    encoded.clear()
    later = again(cache, Storage(key=key), read_image_folders(copy))
    later.fill()
    assert len(encoded) == calls
    changed = later.data.images["train"][0][0]
    changed.write_bytes(later.data.images["train"][1][0].read_bytes())
    encoded.clear()
    again(cache, Storage(key=key), later.data).fill()
    assert encoded == [6]


def test_other_settings_do_not_share_shards(cache, backbone_config):
    root = cache.folder.parents[1]
    squash = load_backbone(f"config:{backbone_config}", transform="lamda")
    others = [
        FeatureCache(root, cache.data, cache.backbone, source="last_ln_proj"),
        FeatureCache(root, cache.data, squash),
        *(
            FeatureCache(root, cache.data, cache.backbone, storage=s)
            for s in (Storage("topk:9"), Storage("all", "bfloat16"))
        ),
    ]
    cache.load("train", 0)
    assert [len(other.missing()) for other in others] == [7 * 9] * 4


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_fewer_patches_in_either_format(cache, dtype):
    every = cache.load("train", 1)
    few = again(cache, Storage("topk:5", dtype)).load("train", 1)
    assert few.patches.shape == (6, 5, 24)
    assert few.patches.dtype == getattr(torch, dtype)
    assert few.globals.dtype == torch.float32
    near = (
        F.cosine_similarity(every.patches.float(), every.globals[:, None], dim=-1)
        .topk(5)
        .indices.sort()
        .values
    )
    expected = torch.stack([patches[rows] for patches, rows in zip(every.patches, near, strict=True)])
    torch.testing.assert_close(few.patches.float(), expected.float(), rtol=1e-2, atol=1e-2)
    assert nearest_patches(every.globals, every.patches, 0) is every.patches


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"cache_patches": "topk:0"}, "--cache-patches: expected all or topk:K"),
        ({"cache_patches": "64"}, "got '64'"),
        ({"cache_patches": "topk:64", "spa": SpaConfig(k=65)}, "--k: 65 patches kept of the 64 stored"),
        (
            {"cache_patches": "topk:64", "spa": SpaConfig(selection_space="projected")},
            "--selection-space: projected needs --cache-patches all",
        ),
        ({"cache_dtype": "int8"}, "cache_dtype: expected one of float16, bfloat16"),
        ({"cache_key": "name"}, "cache_key: expected one of stat, content"),
    ],
)
def test_refused_settings(tmp_path, change, words):
    with pytest.raises(RunError, match=words.replace("(", r"\(")):
        RunConfig(data=tmp_path, backbone="x", **change)


def test_what_does_not_use_patches_takes_any_number(tmp_path):
    anchor = RunConfig(data=tmp_path, backbone="x", method="simple_cil", cache_patches="topk:1")
    assert anchor.storage.limit == 1
    alone = SpaConfig(k=9, fusion_weight=0, local_loss_weight=0)
    assert dataclasses.replace(anchor, method="spa", spa=alone).storage.limit == 1


def test_more_patches_than_the_backbone_has(cache):
    with pytest.raises(RunError, match="the backbone has 16 patches, got topk:17"):
        again(cache, Storage("topk:17"))


def test_features_are_mapped_not_copied(cache):
    cache.fill()
    patches = cache.load("train", 0).patches
    maps = "/proc/self/maps"
    if os.path.exists(maps):
        with open(maps) as file:
            assert any("train-0000-amber.safetensors" in line for line in file)
    [shard] = cache.folder.glob("train-0000-*")
    kept = patches.clone()
    # A shard that is replaced leaves those who read the old one alone.
    cache.shards.write(shard.name, {"key": "other"}, {"globals": torch.zeros(1)})
    assert torch.equal(patches, kept)


def test_rows_over_several_shards():
    parts = [torch.randn(n, 2, 3).half() for n in (4, 1, 0, 5)]
    rows, flat = Stacked([Stacked(parts[:2]), *parts[2:]]), torch.cat(parts)
    assert len(rows) == 10
    order = torch.randperm(10)
    assert torch.equal(rows[order], flat[order])
    mask = torch.rand(10) > 0.5
    assert torch.equal(rows[mask], flat[mask])
    assert [len(part) for part in rows.split(4)] == [4, 4, 2]
    assert torch.equal(torch.cat(list(rows.split(3))), flat)
    assert rows[torch.zeros(0, dtype=torch.long)].shape == (0, 2, 3)


@pytest.mark.parametrize("limit", [0, 3])
def test_texts_are_encoded_once(cache, limit, monkeypatch):
    lines = ["a red wing", "dotted"]
    first = cache.texts.encode(lines, limit)
    expected = (
        torch.cat(cache.backbone.encode_words(lines, 3)) if limit else cache.backbone.encode_texts(lines)
    )
    assert torch.equal(first, expected)
    for name in ("encode_texts", "encode_words"):
        monkeypatch.setattr(Backbone, name, None)
    later = again(cache).texts
    assert torch.equal(later.encode(lines, limit), first)
    with pytest.raises(TypeError):
        later.encode(lines[::-1], limit)


def test_features_that_are_not_finite_are_refused(cache, monkeypatch):
    real = Backbone.encode_images

    def overflow(self, pixels, source):
        whole, patches = real(self, pixels, source)
        patches[1, 2, 3] = 1e6
        return whole, patches

    monkeypatch.setattr(Backbone, "encode_images", overflow)
    with pytest.raises(RunError, match=rf"not finite: {cache.data.images['train'][0][1]}.*bfloat16"):
        cache.fill()
    again(cache, Storage(dtype="bfloat16")).fill()


def test_runs_share_what_is_stored(colours, backbone_config, tmp_path, capsys, encoded):
    def run(name, *extra):
        args = ["--data", str(colours[0]), "--backbone", f"config:{backbone_config}", "--descriptions"]
        args += [str(colours[1]), "--cache", str(tmp_path / "cache"), "--increment", "3", "--out"]
        assert main(["train", *args, str(tmp_path / name), "--k", "4", "--epochs", "1", *extra]) == 0
        return capsys.readouterr().out

    assert "features: 63 images in " in run("a", "--cache-patches", "topk:5")
    assert "features:" not in run("b", "--cache-patches", "topk:5", "--increment", "2", "--order-seed", "3")
    assert sum(encoded) == 63
    assert main(["eval", str(tmp_path / "a")]) == 0
    assert sum(encoded) == 63
    [*_, last] = capsys.readouterr().out.splitlines()
    now, stored = re.findall(r"([0-9.]+) %", last)
    assert now == stored
    [image, *_] = sorted((colours[0] / "test" / "gold").iterdir())
    assert main(["predict", str(tmp_path / "a"), str(image)]) == 0
    assert "features: 63 images in " in run("c")
