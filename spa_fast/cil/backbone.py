"""The frozen open_clip model: global, patch and text tokens in the joint space."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from spa_fast.cil.errors import RunError, did_you_mean
from spa_fast.cil.open_clip_import import import_open_clip

PatchSource = Literal["value_path", "last_ln_proj", "penultimate", "vv_attention"]
Transform = Literal["openclip", "lamda"]

# The demo's text tower uses a small vocabulary of its own, kept beside its weights.
VOCABULARY = "bpe_vocab.txt.gz"


class Backbone:
    """A frozen dual encoder with a ViT image tower.

    Args:
        model: open_clip model, ViT image tower with a class token.
        preprocess: PIL image -> float tensor [3, H, W].
        tokenizer: list of strings -> int64 [n, context].
        name: how the user named it; stored with every result.
        device: where the encoders run.
    """

    def __init__(
        self,
        model: Any,
        preprocess: Callable[[Image.Image], Tensor],
        tokenizer: Callable[[list[str]], Tensor],
        name: str,
        device: str = "cpu",
    ) -> None:
        visual = model.visual
        blocks = getattr(getattr(visual, "transformer", None), "resblocks", None)
        plain = blocks and visual.attn_pool is None and isinstance(blocks[-1].attn, nn.MultiheadAttention)
        if not plain or visual.pool_type != "tok":
            kind = type(visual).__name__
            raise RunError(f"backbone {name!r}: expected a ViT image tower with a class token, got {kind}")
        self.model = model.eval().requires_grad_(False).to(device)
        self.preprocess = preprocess
        self.tokenizer = tokenizer
        self.name = name
        self.device = device
        self.width = int(visual.proj.shape[1])
        self.n_patches = int(visual.positional_embedding.shape[0]) - 1
        self.logit_scale = float(model.logit_scale.detach().exp())
        self.weights_hash = _weights_hash(model)

    @torch.no_grad()
    def encode_images(self, images: Tensor, source: PatchSource = "value_path") -> tuple[Tensor, Tensor]:
        """Global token [B, D] and patch tokens [B, N, D] of images [B, 3, H, W], fp32, not normalised.

        `source` says where patch tokens leave the tower, each followed by ln_post and the projection:
        `last_ln_proj` after the last block; `penultimate` before it; `value_path` the last block's values
        through its output projection, without mixing by attention; `vv_attention` the same with attention
        of values to values.
        """
        visual = self.model.visual
        block = visual.transformer.resblocks[-1]
        seen: dict[str, Tensor] = {}

        def keep(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            seen["before"], seen["after"] = inputs[0], output

        handle = block.register_forward_hook(keep)
        try:
            pooled = self.model.encode_image(images.to(self.device))
        finally:
            handle.remove()
        pooled = pooled[0] if isinstance(pooled, tuple) else pooled
        if source == "last_ln_proj":
            tokens = seen["after"]
        elif source == "penultimate":
            tokens = seen["before"]
        else:
            tokens = last_values(block, seen["before"], mix=source == "vv_attention")
        patches = visual.ln_post(tokens[:, 1:]) @ visual.proj
        return pooled.float(), patches.float()

    @torch.no_grad()
    def encode_texts(self, texts: Sequence[str]) -> Tensor:
        """End-of-text features [n, D] of n strings, fp32, not normalised."""
        if not texts:
            return torch.zeros(0, self.width)
        batches = [list(texts[i : i + 256]) for i in range(0, len(texts), 256)]
        return torch.cat([self.model.encode_text(self.tokenizer(b).to(self.device)).float() for b in batches])

    @torch.no_grad()
    def encode_words(self, texts: Sequence[str], limit: int) -> list[Tensor]:
        """Per string the projected tokens [m, D] at its word positions, m <= `limit`.

        Start, end and padding are dropped; when more than `limit` are left, those closest in cosine to the
        end-of-text feature stay, in their order. The mask is causal, so early words carry little context.
        """
        text_model = getattr(self.model, "text", self.model)
        outputs: list[Tensor] = []

        def keep(_module: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> None:
            outputs.append(output)

        handle = text_model.ln_final.register_forward_hook(keep)
        try:
            ids = self.tokenizer(list(texts)).to(self.device)
            ends = self.model.encode_text(ids).float()
        finally:
            handle.remove()
        projection = text_model.text_projection
        hidden = outputs[0]
        tokens = (projection(hidden) if isinstance(projection, nn.Module) else hidden @ projection).float()
        words = []
        for row, end, token in zip(ids, ends, tokens, strict=True):
            last = int(row.argmax())
            word = token[1:last] if last > 1 else token[last : last + 1]
            if len(word) > limit:
                closest = F.cosine_similarity(word, end[None], dim=-1).topk(limit).indices
                word = word[closest.sort().values]
            words.append(word)
        return words


def last_values(block: Any, x: Tensor, mix: bool) -> Tensor:
    """Values of the last block through its output projection, optionally mixed by value-value attention."""
    attn = block.attn
    width = x.shape[-1]
    weight, bias = attn.in_proj_weight[-width:], attn.in_proj_bias[-width:]
    value = F.linear(block.ln_1(x), weight, bias)
    if mix:
        heads = value.unflatten(-1, (attn.num_heads, -1)).transpose(1, 2)
        value = F.scaled_dot_product_attention(heads, heads, heads).transpose(1, 2).flatten(2)
    return F.linear(value, attn.out_proj.weight, attn.out_proj.bias)


def load_backbone(name: str, *, transform: Transform = "openclip", device: str = "cpu") -> Backbone:
    """Load a frozen backbone.

    Args:
        name: `local-dir:FOLDER` (an open_clip folder), `config:FILE` (an open_clip model config, random
            weights from seed 0, for tests) or `MODEL/PRETRAINED` as open_clip lists them, for example
            `ViT-B-16/laion400m_e32`.
        transform: `openclip` uses the model's own preprocessing; `lamda` squashes to a square without keeping
            the aspect ratio, as LAMDA-style repositories do.
        device: torch device string.

    Raises:
        RunError: unknown name, missing folder or file, image tower without patch tokens.
    """
    if transform not in get_args(Transform):
        raise RunError(f"transform: expected one of {get_args(Transform)}, got {transform!r}")
    _check_device(device)
    kind, _, rest = name.partition(":")
    if kind == "local-dir":
        _check_folder(name, Path(rest))
    elif kind == "config" and not Path(rest).is_file():
        raise RunError(f"backbone {name!r}: no such file: {rest}")
    open_clip = import_open_clip()
    if kind == "local-dir":
        model, _, preprocess = open_clip.create_model_and_transforms(name)
        tokenizer = _local_tokenizer(open_clip, name, Path(rest))
    elif kind == "config":
        config = json.loads(Path(rest).read_text())
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = open_clip.CLIP(**config.get("model_cfg", config))
        model.visual.preprocess_cfg = {"size": model.visual.image_size}
        preprocess = _preprocess(open_clip, model.visual, "shortest")
        tokenizer = open_clip.SimpleTokenizer(context_length=model.context_length)
    else:
        arch, _, tag = name.partition("/")
        if arch not in open_clip.list_models():
            hint = did_you_mean(arch, open_clip.list_models())
            raise RunError(f"backbone {name!r}: expected local-dir:FOLDER or MODEL/PRETRAINED{hint}")
        tags = open_clip.list_pretrained_tags_by_model(arch)
        if tag not in tags:
            raise RunError(
                f"backbone {arch!r}: unknown weights {tag!r}, expected one of {', '.join(tags) or 'none'}"
            )
        try:
            model, _, preprocess = open_clip.create_model_and_transforms(arch, pretrained=tag)
        except (OSError, RuntimeError) as error:
            raise RunError(f"backbone {name!r}: weights could not be loaded: {_first_line(error)}") from error
        tokenizer = open_clip.get_tokenizer(arch)
    if transform == "lamda":
        preprocess = _preprocess(open_clip, model.visual, "squash")
    return Backbone(model, preprocess, tokenizer, name, device)


def _check_device(device: str) -> None:
    try:
        torch.zeros(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise RunError(f"--device: {device!r} cannot be used here: {_first_line(error)}") from error


def _check_folder(name: str, folder: Path) -> None:
    if not folder.is_dir():
        raise RunError(f"backbone {name!r}: no such folder: {folder}")
    if not (folder / "open_clip_config.json").is_file():
        raise RunError(f"backbone {name!r}: {folder} has no open_clip_config.json")
    if not any(folder.glob("open_clip_*.safetensors")) and not any(folder.glob("*.safetensors")):
        raise RunError(f"backbone {name!r}: {folder} has no .safetensors weights")


def _local_tokenizer(open_clip: Any, name: str, folder: Path) -> Callable[[list[str]], Tensor]:
    vocabulary = folder / VOCABULARY
    if not vocabulary.is_file():
        tokenizer: Callable[[list[str]], Tensor] = open_clip.get_tokenizer(name)
        return tokenizer
    text = json.loads((folder / "open_clip_config.json").read_text())["model_cfg"]["text_cfg"]
    small: Callable[[list[str]], Tensor] = open_clip.SimpleTokenizer(
        bpe_path=str(vocabulary), context_length=text.get("context_length", 77)
    )
    return small


def _preprocess(open_clip: Any, visual: Any, resize_mode: str) -> Callable[[Image.Image], Tensor]:
    """The model's own mean, standard deviation and size, with the aspect ratio kept or not."""
    cfg = open_clip.transform.PreprocessCfg(**{**visual.preprocess_cfg, "resize_mode": resize_mode})
    preprocess: Callable[[Image.Image], Tensor] = open_clip.transform.image_transform_v2(cfg, False)
    return preprocess


def _weights_hash(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for key, value in sorted(model.state_dict().items()):
        digest.update(key.encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
