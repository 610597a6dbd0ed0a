"""Import open_clip lazily, also where torchvision's wheel does not match a CPU build of torch."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType

import torch

# The two operators that torchvision's fake kernels refer to while it is imported.
_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_MISSING = "operator torchvision::nms does not exist"
# A library removes its operators when it is collected, so it lives as long as this module.
_library: torch.library.Library | None = None


def import_open_clip() -> ModuleType:
    """Return the module `open_clip`.

    A torchvision wheel built for CUDA fails to import beside a CPU torch, because its compiled operators
    cannot be loaded; transforms and models need none of them. On exactly that failure the two missing schemas
    are declared, half-imported modules are forgotten, and the import is tried once more. Other errors pass
    through.

    Raises:
        ImportError: open_clip is not installed.
        RuntimeError: an import failure other than the one repaired here.
    """
    global _library
    try:
        return importlib.import_module("open_clip")
    except RuntimeError as error:
        if str(error) != _MISSING or _library is not None:
            raise
    _library = torch.library.Library("torchvision", "FRAGMENT")
    for schema in _SCHEMAS:
        _library.define(schema)
    for name in list(sys.modules):
        if name.partition(".")[0] in ("torchvision", "open_clip", "timm"):
            del sys.modules[name]
    return importlib.import_module("open_clip")
