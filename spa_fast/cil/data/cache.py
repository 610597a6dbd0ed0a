"""Features of a frozen encoder on disk: one safetensors shard per split and class, extracted once."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import tempfile
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from spa_fast.cil.backbone import Backbone, PatchSource
from spa_fast.cil.data.datasets import ImageFolders, Split, read_image
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

    def sha256(self) -> str:
        """Checksum of the content."""
        digest = hashlib.sha256()
        for tensor in (self.globals, self.patches):
            digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()


class FeatureCache:
    """Features by (split, class), extracted when first asked for.

    Args:
        folder: where shards live; one sub-folder per (backbone, patch source, format).
        data: the image folders.
        backbone: the frozen encoder.
        source: where patch tokens leave the image tower.
        batch: images per encoder call.
    """

    def __init__(
        self,
        folder: Path,
        data: ImageFolders,
        backbone: Backbone,
        *,
        source: PatchSource = "value_path",
        batch: int = 64,
    ) -> None:
        key = hashlib.sha256(f"{backbone.fingerprint}|{source}|{FORMAT}".encode()).hexdigest()[:16]
        where = hashlib.sha256(str(data.root.resolve()).encode()).hexdigest()[:8]
        self.folder = folder / f"{_slug(data.root.name)}-{where}" / key
        self.data = data
        self.backbone = backbone
        self.source = source
        self.batch = batch
        self._verified: set[Path] = set()

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
        """Whether the shard holds these images' features, whole: its checksum is read once a process."""
        try:
            with safe_open(shard, framework="pt") as tensors:
                metadata = tensors.metadata() or {}
                if metadata.get("images") != _signature(images):
                    return False
                if shard not in self._verified:
                    stored = Features(tensors.get_tensor("globals"), tensors.get_tensor("patches"))
                    if metadata.get("sha256") != stored.sha256():
                        return False
                    self._verified.add(shard)
                return True
        except (SafetensorError, OSError):
            return False

    def _extract(self, images: Sequence[Path], what: str) -> Features:
        globals_, patches = [], []
        batches = [images[i : i + self.batch] for i in range(0, len(images), self.batch)]
        with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
            bar = tqdm(batches, desc=f"features {what}", leave=False, disable=len(batches) < 8)
            for paths in bar:
                pixels = torch.stack(list(pool.map(self._pixels, paths)))
                whole, parts = self.backbone.encode_images(pixels, self.source)
                globals_.append(whole)
                patches.append(parts.half())
        return Features(torch.cat(globals_), torch.cat(patches))

    def _pixels(self, path: Path) -> Tensor:
        return self.backbone.preprocess(read_image(path))

    def check_writable(self) -> None:
        """Refuse early a folder that cannot take shards.

        Raises:
            RunError: naming the folder.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.folder):
                pass
        except OSError as error:
            raise RunError(f"--cache: {self.folder}: cannot write: {error}") from error

    def _write(self, shard: Path, features: Features, images: Sequence[Path]) -> None:
        partial = shard.with_name(f"{shard.name}.{os.getpid()}-{threading.get_ident()}.partial")
        tensors = {"globals": features.globals, "patches": features.patches}
        try:
            shard.parent.mkdir(parents=True, exist_ok=True)
            save_file(tensors, partial, {"images": _signature(images), "sha256": features.sha256()})
            partial.replace(shard)
        except (OSError, SafetensorError) as error:
            raise RunError(f"--cache: {shard.parent}: cannot write: {error}") from error
        finally:
            with contextlib.suppress(OSError):
                partial.unlink()
        self._verified.add(shard)


def _signature(images: Sequence[Path]) -> str:
    stats = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in images]
    return hashlib.sha256(json.dumps(stats).encode()).hexdigest()


def _slug(name: str) -> str:
    """A file name for any class name: letters, digits, dot, dash; the shard's index keeps it unique."""
    return re.sub(r"[^A-Za-z0-9.-]+", "_", name)[:60]
