"""Loading a frozen backbone: an open_clip folder, a model config, or a published model by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import torch
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor

from spa_fast.cil.backbone import Backbone, Transform
from spa_fast.cil.errors import RunError, did_you_mean
from spa_fast.cil.open_clip_import import import_open_clip

# A text tower may use a small vocabulary of its own, kept beside its weights.
VOCABULARY = "bpe_vocab.txt.gz"

Tokenizer = Callable[[list[str]], Tensor]


def load_backbone(name: str, *, transform: Transform = "openclip", device: str = "cpu") -> Backbone:
    """Load a frozen backbone.

    Args:
        name: `local-dir:FOLDER` (an open_clip folder), `config:FILE` (an open_clip model config, random
            weights from seed 0) or `MODEL/PRETRAINED` as open_clip lists them, for example
            `ViT-B-16/laion400m_e32`.
        transform: `openclip` uses the model's own preprocessing; `lamda` squashes to a square without keeping
            the aspect ratio, as LAMDA-style repositories do.
        device: `cpu`, `cuda` or `cuda:INDEX`.

    Raises:
        RunError: unknown name, missing or broken folder or file, image tower without patch tokens.
    """
    if transform not in get_args(Transform):
        raise RunError(f"--transform: expected one of {get_args(Transform)}, got {transform!r}")
    _check_device(device)
    kind, _, rest = name.partition(":")
    if kind == "local-dir":
        _check_folder(name, Path(rest))
    elif kind == "config" and not Path(rest).is_file():
        raise RunError(f"--backbone {name!r}: no such file: {rest}")
    open_clip = import_open_clip()
    if kind not in ("local-dir", "config"):
        _check_published(open_clip, name)
    load = {"local-dir": _from_folder, "config": _from_config}.get(kind, _published)
    try:
        model, preprocess, tokenizer = load(open_clip, name)
        if transform == "lamda":
            preprocess = _preprocess(open_clip, model.visual, "squash")
        _check_vocabulary(model, tokenizer)
    except (OSError, SafetensorError, RuntimeError, ValueError, TypeError, KeyError, AssertionError) as error:
        raise RunError(f"--backbone {name!r}: cannot be loaded: {_first_line(error)}") from error
    return Backbone(model, preprocess, tokenizer, name, device)


def _from_folder(open_clip: Any, name: str) -> tuple[Any, Callable[[Image.Image], Tensor], Tokenizer]:
    folder = Path(name.partition(":")[2])
    text = json.loads((folder / "open_clip_config.json").read_text())["model_cfg"]["text_cfg"]
    model, _, preprocess = open_clip.create_model_and_transforms(name)
    if (folder / VOCABULARY).is_file():
        length = text.get("context_length", 77)
        tokenizer = open_clip.SimpleTokenizer(bpe_path=str(folder / VOCABULARY), context_length=length)
    else:
        tokenizer = open_clip.get_tokenizer(name)
    return model, preprocess, tokenizer


def _from_config(open_clip: Any, name: str) -> tuple[Any, Callable[[Image.Image], Tensor], Tokenizer]:
    config = json.loads(Path(name.partition(":")[2]).read_text())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = open_clip.CLIP(**config.get("model_cfg", config))
    model.visual.preprocess_cfg = {"size": model.visual.image_size}
    tokenizer = open_clip.SimpleTokenizer(context_length=model.context_length)
    return model, _preprocess(open_clip, model.visual, "shortest"), tokenizer


def _published(open_clip: Any, name: str) -> tuple[Any, Callable[[Image.Image], Tensor], Tokenizer]:
    arch, _, tag = name.partition("/")
    # Some weights were trained with QuickGELU under a name whose config says GELU; open_clip only warns.
    quick = bool(open_clip.get_pretrained_cfg(arch, tag).get("quick_gelu", False))
    model, _, preprocess = open_clip.create_model_and_transforms(arch, pretrained=tag, force_quick_gelu=quick)
    return model, preprocess, open_clip.get_tokenizer(arch)


def _check_published(open_clip: Any, name: str) -> None:
    arch, _, tag = name.partition("/")
    if arch not in open_clip.list_models():
        hint = did_you_mean(arch, open_clip.list_models())
        raise RunError(f"--backbone {name!r}: expected local-dir:FOLDER or MODEL/PRETRAINED{hint}")
    tags = open_clip.list_pretrained_tags_by_model(arch)
    if tag not in tags:
        known = ", ".join(tags) or "none"
        raise RunError(f"--backbone {name!r}: unknown weights {tag!r}, expected one of {known}")
    vision = open_clip.get_model_config(arch)["vision_cfg"]
    if "patch_size" not in vision or isinstance(vision.get("layers"), list):
        raise RunError(f"--backbone {name!r}: expected a ViT image tower with a class token")


def _check_device(device: str) -> None:
    try:
        kind = torch.device(device).type
        torch.zeros(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise RunError(f"--device: {device!r} cannot be used here: {_first_line(error)}") from error
    if kind not in ("cpu", "cuda"):
        raise RunError(f"--device: expected cpu or cuda, got {device!r}")


def _check_folder(name: str, folder: Path) -> None:
    if not folder.is_dir():
        raise RunError(f"--backbone {name!r}: no such folder: {folder}")
    if not (folder / "open_clip_config.json").is_file():
        raise RunError(f"--backbone {name!r}: {folder} has no open_clip_config.json")
    if not any(folder.glob("*.safetensors")):
        raise RunError(f"--backbone {name!r}: {folder} has no .safetensors weights")


def _check_vocabulary(model: Any, tokenizer: Tokenizer) -> None:
    """The end token has the largest id; it must have an embedding."""
    rows = getattr(model, "text", model).token_embedding.num_embeddings
    largest = int(tokenizer(["text"]).max())
    if largest >= rows:
        raise ValueError(f"the tokenizer reaches id {largest}, the text tower has {rows} embeddings")


def _preprocess(open_clip: Any, visual: Any, resize_mode: str) -> Callable[[Image.Image], Tensor]:
    """The model's own mean, standard deviation and size, with the aspect ratio kept or not."""
    cfg = open_clip.transform.PreprocessCfg(**{**visual.preprocess_cfg, "resize_mode": resize_mode})
    preprocess: Callable[[Image.Image], Tensor] = open_clip.transform.image_transform_v2(cfg, False)
    return preprocess


def _first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__
