"""What the header and the last bytes of an image file tell; no pixels are decoded."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

# Fewer pixels than this on a side is no photograph.
_TINY = 4
_TAIL = 4096
_ENDS = {"JPEG": b"\xff\xd9", "PNG": b"IEND\xaeB`\x82"}
_CONVERTED = {"CMYK": "CMYK, converted to RGB", "P": "palette, converted to RGB"}
_ORIENTATION = 0x0112


@dataclass
class Probe:
    """One image file.

    Attributes:
        size: bytes.
        tail: hash of the last bytes; equal files have equal ones.
        fault: (kind, what) that makes it unusable, if any.
        notes: what is odd and taken care of when it is read.
    """

    size: int = 0
    tail: bytes = b""
    fault: tuple[str, str] | None = None
    notes: list[str] = field(default_factory=list)


def probe(path: Path) -> Probe:
    """Look at one image file.

    Pillow's warning of images that are too large must be an error here (`warnings.simplefilter`).
    """
    found = Probe()
    try:
        with path.open("rb") as file:
            found.size = file.seek(0, 2)
            file.seek(max(0, found.size - _TAIL))
            end = file.read()
            found.tail = hashlib.sha256(end).digest()
            file.seek(0)
            with Image.open(file) as image:
                _read_header(found, image, end)
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        found.fault = "huge image", str(error).split(",")[0]
    except (OSError, SyntaxError, ValueError) as error:
        why = "not an image" if "cannot identify" in str(error) else " ".join(str(error).split())
        found.fault = "unreadable image", why
    return found


def _read_header(found: Probe, image: Image.Image, end: bytes) -> None:
    if image.mode[0] in "IF":
        raise ValueError(f"pixels of mode {image.mode}: convert them to 8 bits a channel")
    if image.format in _ENDS and _ENDS[image.format] not in end:
        raise ValueError("truncated: the file has no end")
    if min(image.size) < _TINY:
        found.fault = "tiny image", f"{image.width}x{image.height}"
    if image.mode in _CONVERTED:
        found.notes.append(_CONVERTED[image.mode])
    if "exif" in image.info and image.getexif().get(_ORIENTATION, 1) != 1:
        found.notes.append("EXIF rotation, turned upright")
