import pytest
import torch

from spa_fast.cil.data.cache import FeatureCache
from spa_fast.cil.data.datasets import read_image_folders
from spa_fast.cil.errors import RunError
from spa_fast.cil.loading import load_backbone


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


def test_a_flipped_bit_is_found_and_extracted_again(cache, monkeypatch):
    whole = cache.load("test", 1).globals.clone()
    [shard] = cache.folder.glob("test-0001-*")
    content = bytearray(shard.read_bytes())
    content[-5] ^= 0x40
    shard.write_bytes(content)
    later = FeatureCache(cache.folder.parents[1], cache.data, cache.backbone)
    calls = encoder_calls(later, monkeypatch)
    assert torch.equal(later.load("test", 1).globals, whole)
    assert len(calls) == 1


def test_other_settings_do_not_share_shards(cache, backbone_config):
    other = FeatureCache(cache.folder.parents[1], cache.data, cache.backbone, source="last_ln_proj")
    squash = load_backbone(f"config:{backbone_config}", transform="lamda")
    squashed = FeatureCache(cache.folder.parents[1], cache.data, squash)
    cache.load("train", 0)
    assert len(other.missing()) == len(squashed.missing()) == 7 * 9


def test_a_folder_that_cannot_be_written_is_refused_early(cache, tmp_path):
    (tmp_path / "file").write_text("")
    blocked = FeatureCache(tmp_path / "file", cache.data, cache.backbone)
    with pytest.raises(RunError, match=r"--cache: .*cannot write"):
        blocked.check_writable()
    with pytest.raises(RunError, match=r"--cache: .*cannot write"):
        blocked.load("train", 0)


def test_an_image_that_breaks_later_is_named_and_leaves_no_shard(cache):
    path = cache.data.images["train"][4][1]
    path.write_bytes(b"broken")
    with pytest.raises(RunError, match=str(path)):
        cache.load("train", 4)
    assert not cache.folder.exists() or not list(cache.folder.iterdir())
