"""Train the demo's tiny CLIP: `python -m spa_fast.cil.demo.train_clip --out DIR`.

The pictures show creatures whose full combination of attributes no class has: the tower knows parts and their
phrases, and has seen none of the 25 classes and none of their names. Captions join one to three phrases.

Loss: with logits S [rows, T] against T captions and P the pairs where caption t is true of row i,
    contrast(S, P) = mean over (i, t) in P of softplus(logsumexp over false t' of S_it' - S_it),
averaged with the same over columns: every true caption is a positive and competes with the false ones only.
It is taken over class tokens and all captions, and over patch tokens and single phrases, where an image's
logit is a softmax-weighted mean over its patches. A cross-entropy asks the patches around a part for that
part's phrase. Patch tokens here leave the last block's values without mixing by attention (`value_path`), so
patches of this tower are aligned with text by training, place by place, which published CLIP towers are not.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import time
from multiprocessing import Pool
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from spa_fast.cil.backbone import last_values
from spa_fast.cil.demo.creatures import SIZE, render_with_places
from spa_fast.cil.demo.vocabulary import ATTRIBUTES, TEMPLATES, random_attributes, write_vocabulary
from spa_fast.cil.demo.world import is_class_combination
from spa_fast.cil.loading import VOCABULARY
from spa_fast.cil.open_clip_import import import_open_clip

_KEYS = list(ATTRIBUTES)
_MEAN, _STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
_PATCH, _CHUNK = 8, 1000

log = logging.getLogger(__name__)


def config(vocab_size: int) -> dict[str, Any]:
    """The open_clip configuration of the tower: 0.8 million parameters."""
    vision = {"image_size": SIZE, "patch_size": _PATCH, "width": 128, "layers": 3, "head_width": 64}
    text = {"context_length": 32, "vocab_size": vocab_size, "width": 64, "heads": 4, "layers": 2}
    return {
        "model_cfg": {"embed_dim": 64, "vision_cfg": vision, "text_cfg": text},
        "preprocess_cfg": {"mean": _MEAN, "std": _STD, "interpolation": "bicubic", "resize_mode": "shortest"},
    }


def _pictures(job: tuple[int, int]) -> tuple[Any, Any, Any]:
    rng = np.random.default_rng(job)
    images = np.empty((_CHUNK, SIZE, SIZE, 3), np.uint8)
    labels = np.empty((_CHUNK, len(_KEYS)), np.int64)
    places = np.full((_CHUNK, len(_KEYS), 2), np.nan, np.float32)
    for i in range(_CHUNK):
        attributes = random_attributes(rng)
        while is_class_combination(attributes):
            attributes = random_attributes(rng)
        image, where = render_with_places(attributes, rng)
        images[i] = np.asarray(image)
        labels[i] = [list(ATTRIBUTES[key]).index(attributes[key]) for key in _KEYS]
        for k, key in enumerate(_KEYS):
            places[i, k] = where.get("body" if key in ("colour", "pattern") else key, np.nan)
    return images, labels, places


def training_set(count: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Pictures [n, 3, 64, 64] uint8, attribute indices [n, 6], places [n, 6, 2] in pixels (NaN: hidden).

    Raises:
        RuntimeError: a picture shows the full combination of a class.
    """
    with Pool(2) as pool:
        chunks = pool.map(_pictures, [(seed, c) for c in range(math.ceil(count / _CHUNK))])
    images, labels, places = (torch.from_numpy(np.concatenate(part)) for part in zip(*chunks, strict=True))
    for row in labels.unique(dim=0).tolist():
        attributes = {key: list(ATTRIBUTES[key])[i] for key, i in zip(_KEYS, row, strict=True)}
        if is_class_combination(attributes):
            raise RuntimeError(f"training pictures show a class: {attributes}")
    return images.permute(0, 3, 1, 2).contiguous(), labels, places


def captions(labels: Tensor, count: int, rng: np.random.Generator) -> tuple[list[str], Tensor]:
    """One phrase for every value of every attribute, then `count` joint captions of random rows of `labels`.

    Returns:
        texts [T]; truth [B, T] bool, whether a text holds for a row.
    """
    texts, columns = [], []
    for k, key in enumerate(_KEYS):
        for v, phrases in enumerate(ATTRIBUTES[key].values()):
            texts.append(str(rng.choice(TEMPLATES[:2])).format(rng.choice(phrases)))
            columns.append(labels[:, k] == v)
    for row in rng.integers(len(labels), size=count):
        keys = rng.permutation(len(_KEYS))[: rng.integers(2, 4)]
        said = [str(rng.choice(list(ATTRIBUTES[_KEYS[k]].values())[int(labels[row, k])])) for k in keys]
        texts.append(str(rng.choice(TEMPLATES)).format(", ".join(said[:-1]) + " and " + said[-1]))
        columns.append((labels[:, keys] == labels[row, keys]).all(1))
    return texts, torch.stack(columns, 1)


def contrast(logits: Tensor, truth: Tensor) -> Tensor:
    """Multi-positive contrastive loss of logits [B, T], see the module's docstring."""
    losses = []
    for dim in (0, 1):
        false = logits.masked_fill(truth, -1e4).logsumexp(dim, keepdim=True)
        losses.append(F.softplus(false - logits)[truth].mean())
    return torch.stack(losses).mean()


def tokens(visual: Any, images: Tensor) -> tuple[Tensor, Tensor]:
    """Class token [B, D] and value-path patches [B, N, D], projected and normalised."""
    block, seen = visual.transformer.resblocks[-1], list[Tensor]()
    handle = block.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
    pooled = visual(images)
    handle.remove()
    values = last_values(block, seen[0], mix=False)
    patches = visual.ln_post(values[:, 1:]) @ visual.proj
    return F.normalize(pooled.float(), dim=-1), F.normalize(patches.float(), dim=-1)


def nearness(places: Tensor) -> Tensor:
    """Weights [B, 6, N] of the patches near each place [B, 6, 2], a Gaussian of 5 px; zero where hidden."""
    middle = torch.arange(_PATCH / 2, SIZE, _PATCH)
    grid = torch.cartesian_prod(middle, middle).flip(1)
    near = (-(places[:, :, None] - grid).square().sum(-1) / (2 * 5.0**2)).softmax(-1)
    return near.nan_to_num()


def train(out: Path, steps: int, seed: int, pictures: int, batch: int = 64, rate: float = 1e-3) -> None:
    """Train for `steps` batches and write an open_clip folder to `out`."""
    open_clip = import_open_clip()
    out.mkdir(parents=True, exist_ok=True)
    write_vocabulary(out / VOCABULARY)
    tokenizer = open_clip.SimpleTokenizer(str(out / VOCABULARY), context_length=32)
    cfg = config(tokenizer.vocab_size)
    (out / "open_clip_config.json").write_text(json.dumps(cfg, indent=1) + "\n")
    images, labels, places = training_set(pictures, seed)
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    model: Any = open_clip.CLIP(**cfg["model_cfg"])
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.02)
    mean, std = torch.tensor(_MEAN).view(1, 3, 1, 1), torch.tensor(_STD).view(1, 3, 1, 1)
    counts = [len(values) for values in ATTRIBUTES.values()]
    first, singles = torch.tensor([0, *counts[:-1]]).cumsum(0), sum(counts)
    start = time.monotonic()
    for step in range(1, steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, step / 300) * (0.51 + 0.49 * math.cos(math.pi * step / steps))
        rows = torch.randint(len(images), (batch,))
        texts, truth = captions(labels[rows], 48, rng)
        with sdpa_kernel(SDPBackend.MATH), torch.autocast("cpu", torch.bfloat16):
            pooled, patches = tokens(model.visual, (images[rows].float() / 255 - mean) / std)
            text = F.normalize(model.encode_text(tokenizer(texts)).float(), dim=-1)
        scale = model.logit_scale.exp().clamp(max=50)
        cosine = patches @ text[:singles].T
        nearest = (cosine * (15 * cosine).softmax(1)).sum(1)
        grounded = torch.einsum("bkn,bnt->bkt", nearness(places[rows]), cosine)
        target = torch.where(places[rows, :, 0].isnan(), -100, labels[rows] + first)
        losses = {
            "global": contrast(scale * pooled @ text.T, truth),
            "patches": contrast(scale * nearest, truth[:, :singles]),
            "places": F.cross_entropy(scale * grounded.flatten(0, 1), target.flatten()),
        }
        optimizer.zero_grad()
        torch.stack(list(losses.values())).sum().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 100 == 0:
            parts = " ".join(f"{key} {value.item():.3f}" for key, value in losses.items())
            log.info("%4.0f s  step %d  %s", time.monotonic() - start, step, parts)
    state = {
        key: value.half().contiguous() for key, value in model.state_dict().items() if key != "attn_mask"
    }
    save_file(state, out / "open_clip_model.safetensors")


def main() -> None:
    """Parse the command line and train."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write the checkpoint to")
    parser.add_argument("--steps", type=int, default=1600, help="batches of 64; about 4 minutes")
    parser.add_argument("--seed", type=int, default=0, help="seed of pictures, weights and batches")
    parser.add_argument("--pictures", type=int, default=50_000, help="number of training pictures")
    parser.add_argument("--threads", type=int, default=1, help="torch threads")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(args.threads)
    train(args.out, args.steps, args.seed, args.pictures)


if __name__ == "__main__":
    main()
