"""Reading one image, wherever it is stored: a file of its own or a row of a larger one."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from tqdm import tqdm

from spa_fast.cil.data.probe import probe
from spa_fast.cil.errors import RunError

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".jfif", ".png", ".avif", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm"}


@dataclass(frozen=True)
class StoredImage:
    """An image that is one row of a larger file.

    Attributes:
        file: the file.
        row: which image of it.
        pixels: uint8 [3, H, W], RGB; a view, nothing is copied.
    """

    file: Path
    row: int
    pixels: np.ndarray = field(repr=False, compare=False)

    def __str__(self) -> str:
        return f"{self.file}[{self.row}]"


ImageRef = Path | StoredImage


def relative_name(image: ImageRef, root: Path) -> str:
    """How lists name an image: its path inside the data folder, `file[row]` for a stored one."""
    if isinstance(image, StoredImage):
        return f"{image.file.relative_to(root)}[{image.row}]"
    return str(image.relative_to(root))


def stamp(image: ImageRef) -> tuple[str, int, int]:
    """(name, bytes, mtime) by which a changed image is noticed."""
    path = image if isinstance(image, Path) else image.file
    stat = path.stat()
    return Path(str(image)).name, stat.st_size, stat.st_mtime_ns


def image_bytes(image: ImageRef) -> bytes:
    """The stored bytes of one image, by which its content is known.

    Raises:
        RunError: unreadable file.
    """
    if isinstance(image, StoredImage):
        return image.pixels.tobytes()
    try:
        return image.read_bytes()
    except OSError as error:
        raise RunError(f"unreadable image: {image}: {error}") from error


def check_images(images: Iterable[ImageRef]) -> list[Path]:
    """Read the header and the end of every image file, so that a broken one is found before any long work.

    Only what looks broken is decoded. Damage in between is found when the image is read.

    Returns:
        Images that are read but too small or too large for photographs.

    Raises:
        RunError: naming the first unreadable file.
    """
    odd = []
    paths = [image for image in images if isinstance(image, Path)]
    with warnings.catch_warnings(record=True) as huge:
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", Image.DecompressionBombWarning)
        for path in tqdm(paths, desc="checking images", unit="img", leave=False, disable=None):
            huge.clear()
            found = probe(path)
            if huge or (found.fault and found.fault[0] == "tiny image"):
                odd.append(path)
            if found.fault:
                _decode(path)
    return odd


def _decode(path: Path) -> None:
    """Decode an image coarsely, to see whether that works."""
    try:
        with _opened(path) as image:
            image.draft("RGB", (32, 32))
            image.load()
    except RunError as error:
        raise RunError(f"{error}; data check --quarantine FILE lists such images for --exclude") from error


def read_image(image: ImageRef) -> Image.Image:
    """An image in RGB, turned upright as its EXIF data say.

    Raises:
        RunError: unreadable file, or pixels of more than 8 bits a channel.
    """
    if isinstance(image, StoredImage):
        return Image.fromarray(np.ascontiguousarray(image.pixels.transpose(1, 2, 0)))
    with _opened(image) as opened:
        upright = ImageOps.exif_transpose(opened)
        # Pillow warns of a palette with transparency that is not made RGBA first; the colours are the same.
        return (upright.convert("RGBA") if "transparency" in upright.info else upright).convert("RGB")


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    try:
        with Image.open(path) as image:
            if image.mode[0] in "IF":
                raise ValueError(f"pixels of mode {image.mode}: convert them to 8 bits a channel")
            yield image
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise RunError(f"unreadable image: {path}: {error}") from error
