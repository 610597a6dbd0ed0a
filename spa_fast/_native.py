"""The compiled extension spa_fast._C: loaded once, and the reason kept where it is absent."""

import json
from functools import cache
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any


@cache
def _load() -> tuple[ModuleType | None, str | None]:
    try:
        return import_module("spa_fast._C"), None
    except ModuleNotFoundError as error:
        if error.name != "spa_fast._C":
            return None, f"spa_fast._C does not load: {error}"
    except ImportError as error:
        return None, f"spa_fast._C does not load: {error}"
    return None, _recorded("reason") or "spa_fast._C has not been built: pip install ."


def _recorded(key: str) -> str | None:
    """What setup.py left behind."""
    try:
        record = json.loads((Path(__file__).parent / "_native_build.json").read_text())
    except FileNotFoundError:
        return None
    value: str | None = record.get(key)
    return value


def extension() -> ModuleType | None:
    """Return spa_fast._C, or None where `native_info()` tells why it is absent."""
    return _load()[0]


def native_info() -> dict[str, Any]:
    """Describe the compiled extension.

    Returns:
        `available` (bool) and `reason` (why it is absent, else None). Where it is available also `version`,
        `compiler`, `build_type`, `simd_compiled` (list of instruction sets), `simd` (the one chosen on this
        processor), `openmp` (bool), `cuda_archs` (list, empty without CUDA) and then `cuda_reason`, why.
    """
    module, reason = _load()
    built: dict[str, Any] = {} if module is None else module.build_info()
    if module is not None and not built["cuda_archs"]:
        built["cuda_reason"] = _recorded("cuda_reason") or "built without CUDA"
    return {"available": module is not None, "reason": reason, **built}
