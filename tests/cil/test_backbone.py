import json

import pytest
import torch
import torch.nn.functional as F

from spa_fast.cil.errors import RunError
from spa_fast.cil.loading import load_backbone


@pytest.fixture
def images():
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("source", ["value_path", "last_ln_proj", "penultimate", "vv_attention"])
def test_shapes_and_the_global_token_do_not_depend_on_the_source(backbone, images, source):
    whole, patches = backbone.encode_images(images, source)
    assert patches.shape == (2, backbone.n_patches, backbone.width) == (2, 16, 24)
    torch.testing.assert_close(whole, backbone.model.encode_image(images))


def test_sources_against_open_clip(backbone, images):
    visual = backbone.model.visual
    with torch.no_grad():
        hidden = visual._embeds(images)
        first, last = visual.transformer.resblocks
        before = first(hidden)
        after = last(before)
        attn = last.attn
        values = F.linear(last.ln_1(before), attn.in_proj_weight[64:], attn.in_proj_bias[64:])
        expected = {
            "last_ln_proj": after,
            "penultimate": before,
            "value_path": attn.out_proj(values),
        }
        for source, tokens in expected.items():
            torch.testing.assert_close(
                backbone.encode_images(images, source)[1], visual.ln_post(tokens[:, 1:]) @ visual.proj
            )


def test_vv_attention_of_one_head_by_hand(backbone, images):
    visual = backbone.model.visual
    first, last = visual.transformer.resblocks
    with torch.no_grad():
        before = first(visual._embeds(images))
        values = F.linear(last.ln_1(before), last.attn.in_proj_weight[64:], last.attn.in_proj_bias[64:])
        heads = values.reshape(2, 17, 2, 16)
        mixed = torch.empty_like(heads)
        for h in range(2):
            v = heads[:, :, h]
            mixed[:, :, h] = (v @ v.mT / 16**0.5).softmax(-1) @ v
        expected = visual.ln_post(last.attn.out_proj(mixed.reshape(2, 17, 32))[:, 1:]) @ visual.proj
    torch.testing.assert_close(backbone.encode_images(images, "vv_attention")[1], expected)


def test_word_tokens_are_the_text_tower_at_word_positions(backbone):
    [words] = backbone.encode_words(["red stripes on wings"], limit=16)
    assert words.shape == (4, 24)
    [few] = backbone.encode_words(["red stripes on wings"], limit=2)
    end = backbone.encode_texts(["red stripes on wings"])
    closest = F.cosine_similarity(words, end).topk(2).indices.sort().values
    torch.testing.assert_close(few, words[closest])


def test_texts_in_batches_equal_texts_alone(backbone):
    texts = [f"thing {i}" for i in range(300)]
    torch.testing.assert_close(backbone.encode_texts(texts)[270:271], backbone.encode_texts(texts[270:271]))
    assert backbone.encode_texts([]).shape == (0, 24)


def test_parameters_are_frozen(backbone):
    assert not any(p.requires_grad for p in backbone.model.parameters())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("local-dir:/no/such/folder", "no such folder"),
        ("config:/no/such.json", "no such file"),
        ("ViT-B-61/laion400m_e32", r"did you mean 'ViT-B-16'"),
        ("ViT-B-16/laion", "weights 'laion'"),
        ("RN50/openai", "ViT image tower"),
        ("", "--backbone ''"),
    ],
)
def test_unknown_backbones(name, message):
    with pytest.raises(RunError, match=message):
        load_backbone(name)


def test_folder_without_weights(tmp_path):
    with pytest.raises(RunError, match="no open_clip_config"):
        load_backbone(f"local-dir:{tmp_path}")
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": {}}))
    with pytest.raises(RunError, match=r"no \.safetensors"):
        load_backbone(f"local-dir:{tmp_path}")


def test_unknown_transform(backbone_config):
    with pytest.raises(RunError, match="--transform: expected one of"):
        load_backbone(f"config:{backbone_config}", transform="other")


def test_broken_folders_are_refused(tmp_path, backbone_config):
    (tmp_path / "open_clip_config.json").write_text("{")
    (tmp_path / "open_clip_model.safetensors").write_bytes(b"\x08")
    with pytest.raises(RunError, match="cannot be loaded"):
        load_backbone(f"local-dir:{tmp_path}")
    (tmp_path / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": json.loads(backbone_config.read_text()), "preprocess_cfg": {}})
    )
    with pytest.raises(RunError, match="cannot be loaded"):
        load_backbone(f"local-dir:{tmp_path}")
    (tmp_path / "other.json").write_text('{"embed_dim": 3}')
    with pytest.raises(RunError, match="cannot be loaded"):
        load_backbone(f"config:{tmp_path / 'other.json'}")


def test_a_tokenizer_larger_than_the_text_tower_is_refused(tmp_path, backbone_config):
    config = json.loads(backbone_config.read_text())
    config["text_cfg"]["vocab_size"] = 100
    (tmp_path / "small.json").write_text(json.dumps(config))
    with pytest.raises(RunError, match="tokenizer reaches id 49407"):
        load_backbone(f"config:{tmp_path / 'small.json'}")


@pytest.mark.parametrize("change", [{"quick_gelu": True}, {"vision_cfg": {"head_width": 32}}])
def test_fingerprint_sees_what_weights_do_not_tell(tmp_path, backbone_config, backbone, change):
    config = json.loads(backbone_config.read_text())
    for key, value in change.items():
        config[key] = {**config[key], **value} if isinstance(value, dict) else value
    (tmp_path / "other.json").write_text(json.dumps(config))
    other = load_backbone(f"config:{tmp_path / 'other.json'}")
    assert all(
        torch.equal(a, b)
        for a, b in zip(backbone.model.state_dict().values(), other.model.state_dict().values(), strict=True)
    )
    assert other.fingerprint != backbone.fingerprint
    assert load_backbone(f"config:{backbone_config}").fingerprint == backbone.fingerprint
    assert load_backbone(f"config:{backbone_config}", transform="lamda").fingerprint != backbone.fingerprint


def test_weights_trained_with_quick_gelu_are_run_with_it(monkeypatch):
    """Without downloads: what open_clip is asked for."""
    from spa_fast.cil.loading import _published
    from spa_fast.cil.open_clip_import import import_open_clip

    open_clip, asked = import_open_clip(), {}

    def create(arch, pretrained, force_quick_gelu):
        asked[pretrained] = force_quick_gelu
        return None, None, None

    monkeypatch.setattr(open_clip, "create_model_and_transforms", create)
    for name in ("ViT-B-16/openai", "ViT-B-16/laion400m_e32"):
        _published(open_clip, name)
    assert asked == {"openai": True, "laion400m_e32": False}
