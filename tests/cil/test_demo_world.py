"""The embedded benchmark: its classes, its pictures, its files, and what its tiny CLIP reads in them."""

import json
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from spa_fast.cil.backbone import Backbone
from spa_fast.cil.demo import train_clip, world
from spa_fast.cil.demo.creatures import SIZE, render_with_places
from spa_fast.cil.demo.vocabulary import ATTRIBUTES, PARTS, TEMPLATES, random_attributes, write_vocabulary
from spa_fast.cil.loading import load_backbone
from spa_fast.cil.open_clip_import import import_open_clip

TINY_CLIP = Path(world.__file__).parent / "tiny_clip"


def test_classes_are_25_different_combinations_in_families_of_five() -> None:
    assert len(world.CLASSES) == 25
    for attributes in world.CLASSES.values():
        assert list(attributes) == list(ATTRIBUTES)
        assert all(value in ATTRIBUTES[key] for key, value in attributes.items())
    families: dict[tuple[str, str], list[dict[str, str]]] = {}
    for attributes in world.CLASSES.values():
        families.setdefault((attributes["colour"], attributes["pattern"]), []).append(attributes)
    assert [len(members) for members in families.values()] == [5] * 5
    for members in families.values():
        apart = [sum(a[part] != b[part] for part in PARTS) for a, b in combinations(members, 2)]
        assert apart == [1, 1, 1, 1, 2, 2, 2, 2, 2, 2]
        assert {part for other in members[1:] for part in PARTS if other[part] != members[0][part]} == set(
            PARTS
        )


def test_every_class_has_six_descriptions_from_the_vocabulary() -> None:
    phrases = {phrase for values in ATTRIBUTES.values() for texts in values.values() for phrase in texts}
    assert len(phrases) == sum(len(texts) for values in ATTRIBUTES.values() for texts in values.values())
    lists = [world.descriptions(attributes) for attributes in world.CLASSES.values()]
    assert all(len(set(texts)) == 6 and set(texts) <= phrases for texts in lists)
    assert len({tuple(texts) for texts in lists}) == 25


def test_same_generator_state_gives_the_same_bytes() -> None:
    attributes = world.CLASSES["zelmur"]
    first, second, other = (world.render(attributes, np.random.default_rng(seed)) for seed in (3, 3, 4))
    assert first.size == (SIZE, SIZE)
    assert first.mode == "RGB"
    assert first.tobytes() == second.tobytes()
    assert first.tobytes() != other.tobytes()


def test_every_value_changes_the_picture() -> None:
    base = dict(world.CLASSES["zelmur"])
    for key, values in ATTRIBUTES.items():
        pictures = {
            world.render({**base, key: value}, np.random.default_rng(8)).tobytes() for value in values
        }
        assert len(pictures) == len(values), key


def test_parts_are_where_the_renderer_says() -> None:
    rng = np.random.default_rng(0)
    found = [render_with_places(random_attributes(rng), rng)[1] for _ in range(200)]
    for part in PARTS:
        assert 0.7 < np.mean([part in places for places in found]) < 1
    assert all(np.linalg.norm(places["body"] - SIZE / 2) < 14 for places in found)
    assert all(places["legs"][1] > places["body"][1] for places in found if "legs" in places)


def test_training_pictures_show_no_class(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = iter([*world.CLASSES.values(), {**world.CLASSES["zelmur"], "colour": "rose"}] * 4)
    monkeypatch.setattr(train_clip, "_CHUNK", 4)
    monkeypatch.setattr(train_clip, "random_attributes", lambda _rng: next(drawn))
    _, labels, _ = train_clip._pictures((0, 0))
    assert (labels[:, 0] == list(ATTRIBUTES["colour"]).index("rose")).all()
    assert all(world.is_class_combination(attributes) for attributes in world.CLASSES.values())


def test_training_stops_when_a_class_slips_in(monkeypatch: pytest.MonkeyPatch) -> None:
    indices = [[list(ATTRIBUTES[key]).index(value) for key, value in world.CLASSES["orbisk"].items()]]
    chunk = (np.zeros((1, SIZE, SIZE, 3), np.uint8), np.array(indices), np.zeros((1, 6, 2), np.float32))

    class OneProcess:
        def __init__(self, _processes: int) -> None: ...
        def __enter__(self) -> "OneProcess":
            return self

        def __exit__(self, *_error: object) -> None: ...
        def map(self, _function: Callable[..., Any], jobs: list[Any]) -> list[Any]:
            return [chunk for _ in jobs]

    monkeypatch.setattr(train_clip, "Pool", OneProcess)
    with pytest.raises(RuntimeError, match="training pictures show a class"):
        train_clip.training_set(1, 0)


def test_captions_are_true_of_the_rows_they_say() -> None:
    rng = np.random.default_rng(1)
    rows = [random_attributes(rng) for _ in range(20)]
    labels = torch.tensor([[list(ATTRIBUTES[k]).index(row[k]) for k in ATTRIBUTES] for row in rows])
    texts, truth = train_clip.captions(labels, 30, rng)
    assert truth.shape == (20, len(texts))
    assert truth[:, :26].sum(1).tolist() == [6] * 20
    for text, column in zip(texts, truth.T, strict=True):
        for row, holds in zip(rows, column.tolist(), strict=True):
            said = [
                (k, v)
                for k, values in ATTRIBUTES.items()
                for v in values
                if any(p in text for p in values[v])
            ]
            assert holds == all(row[k] == v for k, v in said), (text, row)


def test_contrast_by_hand() -> None:
    logits = torch.tensor([[2.0, 0.0, 1.0]])
    truth = torch.tensor([[True, False, True]])
    rows = (np.log1p(np.exp(0.0 - 2.0)) + np.log1p(np.exp(0.0 - 1.0))) / 2
    assert train_clip.contrast(logits, truth).item() == pytest.approx(rows / 2, abs=1e-5)


def test_write_dataset(tmp_path: Path) -> None:
    world.write_dataset(tmp_path / "a", seed=5, train_per_class=2, test_per_class=1)
    world.write_dataset(tmp_path / "b", seed=5, train_per_class=2, test_per_class=1)
    files = sorted(p.relative_to(tmp_path / "a") for p in (tmp_path / "a").rglob("*") if p.is_file())
    assert len(files) == 25 * 3 + 2
    assert all((tmp_path / "a" / f).read_bytes() == (tmp_path / "b" / f).read_bytes() for f in files)
    pictures = [Image.open(tmp_path / "a" / f).tobytes() for f in files if f.suffix == ".png"]
    assert len(set(pictures)) == 75
    assert set(json.loads((tmp_path / "a/names.json").read_text())) == set(world.CLASSES)
    document = json.loads((tmp_path / "a/descriptions.json").read_text())
    assert [entry["name"] for entry in document["classes"]] == list(world.CLASSES)
    assert all(len(entry["descriptions"]) == 6 for entry in document["classes"])


def test_vocabulary_has_one_token_a_word_and_bytes_for_the_rest(tmp_path: Path) -> None:
    write_vocabulary(tmp_path / "bpe.gz")
    assert (tmp_path / "bpe.gz").read_bytes() == (TINY_CLIP / "bpe_vocab.txt.gz").read_bytes()
    tokenizer = import_open_clip().SimpleTokenizer(str(tmp_path / "bpe.gz"), context_length=32)
    config = json.loads((TINY_CLIP / "open_clip_config.json").read_text())
    assert config["model_cfg"]["text_cfg"]["vocab_size"] == tokenizer.vocab_size
    for values in ATTRIBUTES.values():
        for phrase in (p for texts in values.values() for p in texts):
            assert len(tokenizer.encode(phrase)) == len(phrase.split())
    for name in [*world.CLASSES, "łąka"]:
        ids = tokenizer([TEMPLATES[2].format(name)])
        assert ids.max() == tokenizer.eot_token_id == tokenizer.vocab_size - 1


@pytest.fixture(scope="module")
def tiny_clip() -> Backbone:
    return load_backbone(f"local-dir:{TINY_CLIP}")


def test_checkpoint_is_small() -> None:
    assert sum(path.stat().st_size for path in TINY_CLIP.iterdir()) <= 2_000_000


def test_patches_read_parts(tiny_clip: Backbone) -> None:
    """Chance is 0.25; of 64 pictures random weights read 0.17 to 0.36 right, over parts and seeds."""
    rng = np.random.default_rng(11)
    rows = [random_attributes(rng) for _ in range(200)]
    images = torch.stack([tiny_clip.preprocess(world.render(row, rng)) for row in rows])
    _, patches = tiny_clip.encode_images(images, "value_path")
    patches = F.normalize(patches, dim=-1)
    for part in PARTS:
        values = list(ATTRIBUTES[part])
        texts = F.normalize(tiny_clip.encode_texts([ATTRIBUTES[part][v][0] for v in values]), dim=-1)
        read = (patches @ texts.T).amax(1).argmax(1)
        truth = torch.tensor([values.index(row[part]) for row in rows])
        assert (read == truth).float().mean() > 0.5, part


def test_training_writes_a_folder_that_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_clip, "_CHUNK", 32)
    train_clip.train(tmp_path, steps=2, seed=0, pictures=32, batch=8)
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in TINY_CLIP.iterdir()}
    config = "open_clip_config.json"
    assert (tmp_path / config).read_text() == (TINY_CLIP / config).read_text()
    backbone = load_backbone(f"local-dir:{tmp_path}")
    pooled, patches = backbone.encode_images(torch.zeros(2, 3, SIZE, SIZE), "value_path")
    assert pooled.isfinite().all()
    ours = train_clip.tokens(backbone.model.visual, torch.zeros(2, 3, SIZE, SIZE))
    torch.testing.assert_close(ours[0], F.normalize(pooled, dim=-1))
    torch.testing.assert_close(ours[1], F.normalize(patches, dim=-1))
