import pytest
import torch

from spa_fast.cil.data.cache import FeatureCache
from spa_fast.cil.data.datasets import read_image_folders
from spa_fast.cil.errors import RunError


@pytest.fixture
def cache(colours, backbone, tmp_path):
    return FeatureCache(tmp_path / "cache", read_image_folders(colours[0]), backbone)


def encoder_calls(cache, monkeypatch):
    calls = []
    real = cache.backbone.encode_images
    monkeypatch.setattr(cache.backbone, "encode_images", lambda *a: calls.append(1) or real(*a))
    return calls


def test_extracts_once(cache, monkeypatch):
    calls = encoder_calls(cache, monkeypatch)
    first, again = cache.load("train", 2), cache.load("train", 2)
    assert len(calls) == 1
    assert torch.equal(first.globals, again.globals)
    assert torch.equal(first.patches, again.patches)
    assert first.patches.shape == (6, 16, 24)
    assert first.patches.dtype == torch.float16


def test_missing_lists_what_has_no_shard(cache):
    assert len(cache.missing()) == 7 * 9
    cache.load("train", 0)
    assert len(cache.missing()) == 7 * 9 - 6


def test_a_changed_image_or_a_broken_shard_is_extracted_again(cache, monkeypatch):
    cache.load("test", 1)
    image = cache.data.images["test"][1][0]
    image.write_bytes(cache.data.images["test"][2][0].read_bytes())
    calls = encoder_calls(cache, monkeypatch)
    changed = cache.load("test", 1).globals.clone()
    assert len(calls) == 1
    [shard] = cache.folder.glob("test-0001-*")
    shard.write_bytes(shard.read_bytes()[:100])
    assert torch.equal(cache.load("test", 1).globals, changed)
    assert len(calls) == 2
    assert not list(cache.folder.glob("*.partial"))


def test_other_settings_do_not_share_shards(cache, colours):
    other = FeatureCache(cache.folder.parents[1], cache.data, cache.backbone, source="last_ln_proj")
    cache.load("train", 0)
    assert len(other.missing()) == 7 * 9
    squashed = FeatureCache(cache.folder.parents[1], cache.data, cache.backbone, transform="lamda")
    assert squashed.folder != cache.folder


def test_an_image_that_breaks_later_is_named_and_leaves_no_shard(cache):
    path = cache.data.images["train"][4][1]
    path.write_bytes(b"broken")
    with pytest.raises(RunError, match=str(path)):
        cache.load("train", 4)
    assert not cache.folder.exists() or not list(cache.folder.iterdir())
