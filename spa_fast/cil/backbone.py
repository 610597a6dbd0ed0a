"""The frozen open_clip model: global, patch and text tokens in the joint space."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from spa_fast.cil.errors import RunError

PatchSource = Literal["value_path", "last_ln_proj", "penultimate", "vv_attention"]
Transform = Literal["openclip", "lamda"]


class Backbone:
    """A frozen dual encoder with a ViT image tower.

    Args:
        model: open_clip model, ViT image tower with a class token.
        preprocess: PIL image -> float tensor [3, H, W].
        tokenizer: list of strings -> int64 [n, context].
        name: how the user named it; stored with every result.
        device: where the encoders run; what they return is on the CPU.

    Attributes:
        fingerprint: SHA-256 of weights, architecture and preprocessing: equal ones give equal features.
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
        self.fingerprint = _fingerprint(model, preprocess)

    def seen_image(self, pixels: Tensor) -> Image.Image:
        """The image that preprocessed pixels [3, H, W] hold, normalisation undone."""
        for step in getattr(self.preprocess, "transforms", ()):
            if hasattr(step, "mean") and hasattr(step, "std"):
                mean, std = (torch.as_tensor(x)[:, None, None] for x in (step.mean, step.std))
                pixels = pixels * std + mean
        values = (255 * pixels.clamp(0, 1)).round().byte()
        return Image.fromarray(values.permute(1, 2, 0).contiguous().numpy())

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
        return pooled.float().cpu(), patches.float().cpu()

    @torch.no_grad()
    def encode_texts(self, texts: Sequence[str]) -> Tensor:
        """End-of-text features [n, D] of n strings, fp32, not normalised."""
        if not texts:
            return torch.zeros(0, self.width)
        batches = [list(texts[i : i + 256]) for i in range(0, len(texts), 256)]
        features = [self.model.encode_text(self.tokenizer(b).to(self.device)) for b in batches]
        return torch.cat(features).float().cpu()

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
            words.append(word.cpu())
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


def _fingerprint(model: Any, preprocess: object) -> str:
    heads = [block.attn.num_heads for block in model.visual.transformer.resblocks]
    digest = hashlib.sha256(f"{model!r} {heads} {preprocess!r}".encode())
    for key, value in sorted(model.state_dict().items()):
        digest.update(key.encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
