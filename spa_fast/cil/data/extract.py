"""From images to features: threads decode ahead while the encoder runs."""

from __future__ import annotations

import itertools
import os
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from spa_fast.cil.backbone import Backbone, PatchSource
from spa_fast.cil.data.features import ClassFeatures
from spa_fast.cil.data.images import ImageRef, read_image
from spa_fast.cil.errors import RunError

# Batches decoded before the encoder asks for them; 64 images of 224 pixels are 39 MB.
AHEAD = 3


@dataclass
class Extractor:
    """The frozen encoder and what is kept of its output.

    Attributes:
        backbone: the encoder.
        source: where patch tokens leave the image tower.
        limit: patches kept per image; 0 keeps all.
        dtype: of the patches kept.
        batch: images per encoder call; a batch never spans two classes, so that a class extracted again has
            the same bits.
        encoder_seconds: time spent in encoder calls so far.
    """

    backbone: Backbone
    source: PatchSource
    limit: int
    dtype: torch.dtype
    batch: int = 64
    encoder_seconds: float = 0.0

    def classes(self, classes: Iterable[Sequence[ImageRef]]) -> Iterator[ClassFeatures]:
        """Features of each class's images, in turn.

        Raises:
            RunError: an image that cannot be read, or features that are not finite.
        """
        classes = list(classes)
        pieces = (images[i : i + self.batch] for images in classes for i in range(0, len(images), self.batch))
        queue: deque[list[Future[Tensor]]] = deque()
        pool = ThreadPoolExecutor(len(os.sched_getaffinity(0)), "decode")

        def decode_ahead(count: int) -> None:
            for piece in itertools.islice(pieces, count):
                queue.append([pool.submit(self._pixels, image) for image in piece])

        try:
            decode_ahead(AHEAD)
            for images in classes:
                parts = []
                for _ in range(0, len(images), self.batch):
                    pixels = torch.stack([future.result() for future in queue.popleft()])
                    decode_ahead(1)
                    parts.append(self._encode(pixels))
                whole, patches = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
                finite = (whole.isfinite().all(-1) & patches.isfinite().all(-1).all(-1)).tolist()
                if not all(finite):
                    hint = "are the weights whole? --cache-dtype bfloat16 holds larger numbers"
                    raise RunError(f"features are not finite: {images[finite.index(False)]}; {hint}")
                yield ClassFeatures(whole, patches)
        finally:
            pool.shutdown(cancel_futures=True)

    def _pixels(self, image: ImageRef) -> Tensor:
        try:
            return self.backbone.preprocess(read_image(image))
        except RunError as error:
            hint = "train --exclude FILE leaves it out; what was stored is whole"
            raise RunError(f"{error}; {hint}") from error

    def _encode(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        start = time.perf_counter()
        whole, patches = self.backbone.encode_images(pixels, self.source)
        self.encoder_seconds += time.perf_counter() - start
        return whole, nearest_patches(whole, patches, self.limit).to(self.dtype)


def nearest_patches(whole: Tensor, patches: Tensor, limit: int) -> Tensor:
    """The `limit` patches [B, limit, D] of each image closest in cosine to its global token, in their order.

    No text takes part: what is kept cannot depend on classes that have not arrived. 0 keeps all.
    """
    if not limit:
        return patches
    closest = F.cosine_similarity(patches, whole[:, None], dim=-1).topk(limit, dim=1).indices.sort(1).values
    return patches.gather(1, closest[..., None].expand(-1, -1, patches.shape[-1]))
