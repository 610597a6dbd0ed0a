"""Features of a frozen encoder on disk: one safetensors shard per split and class, extracted once."""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from spa_fast.cil.backbone import Backbone, PatchSource, Transform
from spa_fast.cil.data.datasets import ImageFolders, Split
from spa_fast.cil.errors import RunError

# Changed when the content or meaning of a shard changes.
FORMAT = "1"


@dataclass(frozen=True)
class Features:
    """Frozen features of n images: `globals` [n, D] fp32 and `patches` [n, N, D] fp16, not normalised."""

    globals: Tensor
    patches: Tensor

    def __len__(self) -> int:
        return len(self.globals)


class FeatureCache:
    """Features by (split, class), extracted when first asked for.

    Args:
        folder: where shards live; one sub-folder per (weights, transform, patch source, format).
        data: the image folders.
        backbone: the frozen encoder.
        source: where patch tokens leave the image tower.
        transform: name of the preprocessing the backbone was loaded with.
        batch: images per encoder call.
    """

    def __init__(
        self,
        folder: Path,
        data: ImageFolders,
        backbone: Backbone,
        *,
        source: PatchSource = "value_path",
        transform: Transform = "openclip",
        batch: int = 64,
    ) -> None:
        key = hashlib.sha256(f"{backbone.weights_hash}|{transform}|{source}|{FORMAT}".encode()).hexdigest()[
            :16
        ]
        where = hashlib.sha256(str(data.root.resolve()).encode()).hexdigest()[:8]
        self.folder = folder / f"{_slug(data.root.name)}-{where}" / key
        self.data = data
        self.backbone = backbone
        self.source = source
        self.batch = batch

    def missing(self) -> list[Path]:
        """Images without a valid shard, all splits."""
        return [
            path
            for split, classes in self.data.images.items()
            for index, images in enumerate(classes)
            if not self._valid(self._shard(split, index), images)
            for path in images
        ]

    def load(self, split: Split, folder_index: int) -> Features:
        """Features of one class, from its shard or, the first time, from its images."""
        images = self.data.images[split][folder_index]
        shard = self._shard(split, folder_index)
        if not self._valid(shard, images):
            self._write(shard, self._extract(images, f"{split} {self.data.folders[folder_index]}"), images)
        with safe_open(shard, framework="pt") as tensors:
            return Features(tensors.get_tensor("globals"), tensors.get_tensor("patches"))

    def _shard(self, split: Split, index: int) -> Path:
        return self.folder / f"{split}-{index:04d}-{_slug(self.data.folders[index])}.safetensors"

    def _valid(self, shard: Path, images: Sequence[Path]) -> bool:
        if not shard.is_file():
            return False
        try:
            with safe_open(shard, framework="pt") as tensors:
                return bool((tensors.metadata() or {}).get("images") == _signature(images))
        except (SafetensorError, OSError):
            return False

    def _extract(self, images: Sequence[Path], what: str) -> Features:
        globals_, patches = [], []
        batches = [images[i : i + self.batch] for i in range(0, len(images), self.batch)]
        with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
            for paths in tqdm(
                batches, desc=f"features {what}", unit="batch", leave=False, disable=len(batches) < 8
            ):
                pixels = torch.stack(list(pool.map(self._pixels, paths)))
                whole, parts = self.backbone.encode_images(pixels, self.source)
                globals_.append(whole.cpu())
                patches.append(parts.half().cpu())
        return Features(torch.cat(globals_), torch.cat(patches))

    def _pixels(self, path: Path) -> Tensor:
        try:
            with Image.open(path) as image:
                return self.backbone.preprocess(image.convert("RGB"))
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise RunError(f"unreadable image: {path}: {error}") from error

    def _write(self, shard: Path, features: Features, images: Sequence[Path]) -> None:
        shard.parent.mkdir(parents=True, exist_ok=True)
        partial = shard.with_name(f"{shard.name}.{os.getpid()}-{threading.get_ident()}.partial")
        try:
            save_file(
                {"globals": features.globals, "patches": features.patches},
                partial,
                metadata={"images": _signature(images)},
            )
            partial.replace(shard)
        except OSError as error:
            raise RunError(f"--cache: {shard.parent}: cannot write: {error}") from error
        finally:
            partial.unlink(missing_ok=True)


def _signature(images: Sequence[Path]) -> str:
    stats = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in images]
    return hashlib.sha256(json.dumps(stats).encode()).hexdigest()


def _slug(name: str) -> str:
    """A file name for any class name: letters, digits, dot, dash; the shard's index keeps it unique."""
    return re.sub(r"[^A-Za-z0-9.-]+", "_", name)[:60]
