"""Features of a frozen encoder on disk: one shard per split and class, and one per class's texts."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import re
import shutil
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Literal, get_args

import torch
from tqdm import tqdm

import spa_fast
from spa_fast.cil.backbone import Backbone, PatchSource
from spa_fast.cil.data.datasets import ImageFolders
from spa_fast.cil.data.extract import Extractor
from spa_fast.cil.data.features import ClassFeatures
from spa_fast.cil.data.images import ImageRef, image_bytes, stamp
from spa_fast.cil.data.layout import Split
from spa_fast.cil.data.shards import Say, ShardFault, ShardFolder, digest
from spa_fast.cil.data.text_cache import TextCache
from spa_fast.cil.errors import RunError, cannot_write

# Changed when the content or meaning of a shard changes.
FORMAT = "spa_fast.features/2"

CacheKey = Literal["stat", "content"]
CacheDtype = Literal["float16", "bfloat16"]


@dataclasses.dataclass(frozen=True)
class Storage:
    """What is stored of an image, and how it is known again.

    Attributes:
        patches: `all`, or `topk:K` for the K patches closest in cosine to the global token.
        dtype: of patches; global and text tokens are fp32.
        key: `stat` knows an image by path, size and time; `content` by its bytes, read where path, size or
            time have changed.
    """

    patches: str = "all"
    dtype: CacheDtype = "float16"
    key: CacheKey = "stat"

    def __post_init__(self) -> None:
        if not re.fullmatch(r"all|topk:[1-9][0-9]{0,5}", self.patches):
            raise RunError(
                f"--cache-patches: expected all or topk:K, for example topk:64, got {self.patches!r}"
            )
        if self.dtype not in get_args(CacheDtype) or self.key not in get_args(CacheKey):
            raise RunError(f"--cache-dtype, --cache-key: unknown {self.dtype!r} or {self.key!r}")

    @property
    def limit(self) -> int:
        """Patches kept per image; 0 is all."""
        return 0 if self.patches == "all" else int(self.patches.partition(":")[2])


class FeatureCache:
    """Features by (split, class), extracted when first asked for.

    Args:
        folder: where shards live; one sub-folder per data set and, in it, per encoder and settings.
        data: the image folders.
        backbone: the frozen encoder.
        source: where patch tokens leave the image tower.
        storage: what is stored.
        say: takes one line at a time on what is extracted and why.
    """

    def __init__(
        self,
        folder: Path,
        data: ImageFolders,
        backbone: Backbone,
        *,
        source: PatchSource = "value_path",
        storage: Storage | None = None,
        say: Say = lambda line: None,
    ) -> None:
        storage = storage or Storage()
        if storage.limit > backbone.n_patches:
            raise RunError(
                f"--cache-patches: the backbone has {backbone.n_patches} patches, got {storage.patches}"
            )
        about = {"format": FORMAT, "weights": backbone.fingerprint, "spa_fast": spa_fast.__version__}
        texts = ShardFolder(folder / "texts" / digest(about)[:16], {**about, "backbone": backbone.name})
        self.texts = TextCache(texts, backbone, say)
        about |= {"source": source, "patches": storage.patches, "dtype": storage.dtype}
        self.key = digest(about)[:16]
        # Known by content, a data set may move; known by path, another path is another data set.
        where = {"stat": str(data.root.resolve()), "content": ["content", *data.folders]}[storage.key]
        path = folder / f"{_slug(data.root.name)}-{digest(where)[:8]}" / self.key
        about |= {"backbone": backbone.name, "data": data.root.name, "key": storage.key}
        self.shards = ShardFolder(path, about)
        self.data = data
        self.backbone = backbone
        self.source = source
        self.storage = storage
        self.say = say
        self._current: set[tuple[Split, int]] = set()

    @property
    def folder(self) -> Path:
        """Where the shards of these images and settings live."""
        return self.shards.path

    def load(self, split: Split, folder_index: int) -> ClassFeatures:
        """Features of one class, mapped from its shard or, the first time, extracted from its images."""
        wanted = (split, folder_index)
        if self._fault(*wanted):
            self._fill([wanted])
        _, tensors = self.shards.read(self._name(*wanted))
        return ClassFeatures(tensors["globals"], tensors["patches"])

    def fill(self, *splits: Split) -> None:
        """Extract what is not stored whole, of the given splits or all of them.

        Raises:
            RunError: an image cannot be read.
            OSError: the folder cannot be written or the disk is full; every shard stored is whole.
        """
        self._fill([pair for pair in self._all() if not splits or pair[0] in splits])
        # Damaged, it keeps `cache` from finding the shards, not us.
        self.shards.describe()

    def missing(self) -> list[ImageRef]:
        """Images whose features are not stored whole, all splits."""
        return [image for pair in self._faults(self._all()) for image in self._images(*pair)]

    def check_writable(self) -> None:
        """Refuse early a folder that cannot take shards.

        Raises:
            RunError, OSError: a file is in its place, or the disk says no.
        """
        try:
            self.shards.check_writable()
        except OSError as error:
            what = "features that are missing must be stored there"
            raise cannot_write(f"--cache: {self.folder}", error, what) from error

    def _fill(self, pairs: Sequence[tuple[Split, int]]) -> None:
        if not self._faults(pairs):
            return
        self.check_writable()
        with self.shards.lock(self.say):
            # Another process may have written some while we waited.
            faults = self._faults(pairs)
            for pair, fault in faults.items():
                if fault != "not there":
                    self.say(f"feature cache: {self.folder / self._name(*pair)}: {fault}; extracted again")
            if faults:
                self._extract(list(faults))

    def _extract(self, pairs: Sequence[tuple[Split, int]]) -> None:
        classes = [self._images(*pair) for pair in pairs]
        images, start = sum(map(len, classes)), time.perf_counter()
        self._check_space(images)
        # Signed before they are read: an image that changes meanwhile is noticed by the next run.
        labels = [self._metadata(*pair) for pair in pairs]
        dtype = getattr(torch, self.storage.dtype)
        extractor = Extractor(self.backbone, self.source, self.storage.limit, dtype)
        stored: Future[None] | None = None
        with (
            ThreadPoolExecutor(1, "store") as writer,
            tqdm(total=images, desc="features", unit="img", leave=False, disable=None) as bar,
        ):
            for pair, metadata, features in zip(pairs, labels, extractor.classes(classes), strict=True):
                if stored:
                    stored.result()
                tensors = {"globals": features.globals, "patches": features.patches}
                stored = writer.submit(self.shards.write, self._name(*pair), metadata, tensors)
                bar.update(len(features))
            if stored:
                stored.result()
        seconds = time.perf_counter() - start
        size = sum((self.folder / self._name(*pair)).stat().st_size for pair in pairs)
        busy = 100 * extractor.encoder_seconds / seconds
        self.say(
            f"features: {images} images in {seconds:.1f} s ({images / seconds:.1f} images/s, encoder busy "
            f"{busy:.0f} %), {size / 1e6:.1f} MB in {self.folder}"
        )

    def _check_space(self, images: int) -> None:
        patches = self.storage.limit or self.backbone.n_patches
        need = images * self.backbone.width * (4 + 2 * patches)
        free = shutil.disk_usage(self.folder).free
        if free < need:
            raise OSError(f"--cache: {self.folder}: {need / 1e9:.2f} GB needed, {free / 1e9:.2f} GB free")

    def _faults(self, pairs: Sequence[tuple[Split, int]]) -> dict[tuple[Split, int], str]:
        """Why shards cannot be used, of those that cannot; reading them brings them into memory."""
        with ThreadPoolExecutor(len(os.sched_getaffinity(0)), "verify") as pool:
            found = list(pool.map(lambda pair: self._fault(*pair), pairs))
        return {pair: fault for pair, fault in zip(pairs, found, strict=True) if fault}

    def _fault(self, split: Split, index: int) -> str:
        """Why a shard cannot be used, or nothing."""
        try:
            metadata, _ = self.shards.read(self._name(split, index))
        except ShardFault as fault:
            return str(fault)
        if (split, index) in self._current:
            return ""
        if (metadata.get("key"), metadata.get("class")) != (self.key, self._class(split, index)):
            return "it holds another class's or encoder's features"
        images = self._images(split, index)
        if metadata.get("stat") != self._stat(images) and (
            self.storage.key == "stat" or metadata.get("content") != _content(images)
        ):
            return "its images have changed"
        self._current.add((split, index))
        return ""

    def _metadata(self, split: Split, index: int) -> dict[str, str]:
        images = self._images(split, index)
        about = {"key": self.key, "class": self._class(split, index), "stat": self._stat(images)}
        return {**about, "content": _content(images)} if self.storage.key == "content" else about

    def _stat(self, images: Sequence[ImageRef]) -> str:
        return digest([str(self.data.root.resolve()), *(stamp(image) for image in images)])

    def _class(self, split: Split, index: int) -> str:
        return f"{split}/{self.data.folders[index]}"

    def _images(self, split: Split, index: int) -> tuple[ImageRef, ...]:
        return self.data.images[split][index]

    def _all(self) -> list[tuple[Split, int]]:
        return [(split, index) for split, found in self.data.images.items() for index in range(len(found))]

    def _name(self, split: Split, index: int) -> str:
        return f"{split}-{index:04d}-{_slug(self.data.folders[index])}.safetensors"


def _content(images: Sequence[ImageRef]) -> str:
    return digest([hashlib.sha256(image_bytes(image)).hexdigest() for image in images])


def _slug(name: str) -> str:
    """A file name for any class name: letters, digits, dot, dash; the shard's index keeps it unique."""
    return re.sub(r"[^A-Za-z0-9.-]+", "_", name)[:60]
