"""One call looked at closely: time, peak of memory beyond what was there, and its row of a benchmark."""

from __future__ import annotations

import ctypes
import gc
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from cases import DEVICE

from spa_fast._native import native_info


def synchronised(run: Callable[[], Any]) -> Callable[[], Any]:
    """`run` until its result is there."""
    if not torch.cuda.is_available():
        return run

    def wait() -> Any:
        out = run()
        torch.cuda.synchronize()
        return out

    return wait


def seconds_and_peak_mb(run: Callable[[], Any]) -> tuple[float, float | None, Any]:
    """Wall time, peak of memory above the state before in MB (None where nobody counts it), result."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before: float | None = torch.cuda.memory_allocated() / 1e6
    else:
        before = _reset_resident()
    start = time.perf_counter()
    out = run()
    took = time.perf_counter() - start
    if before is None:
        return took, None, out
    peak = torch.cuda.max_memory_allocated() / 1e6 if torch.cuda.is_available() else _resident("VmHWM")
    return took, max(0.0, peak - before), out


def record(benchmark: Any, peak: float | None, **info: Any) -> None:
    """What a row says beside its time."""
    benchmark.extra_info |= {
        "dtype": "float32",
        "device": DEVICE,
        "threads": torch.get_num_threads(),
        "cpus": os.cpu_count(),
        "simd": native_info().get("simd"),
        "peak_mem_mb": None if peak is None else round(peak, 1),
        **info,
    }


def time_row(benchmark: Any, run: Any, parity: Any = None, seconds: float = 1, **info: Any) -> None:
    """Rounds of about `seconds` in all, at most 30: a slow peer's few, none longer than needed."""
    once, peak, out = seconds_and_peak_mb(run)
    if parity is not None:
        parity(*out)
    if once < 0.5:
        # What the first call sets up once is not the call's memory.
        once, peak, out = seconds_and_peak_mb(run)
    del out
    record(benchmark, peak, **info)
    # Beyond `seconds` the call above was the warm-up, and one more is timed.
    rounds, iterations = max(1, min(30, int(seconds / once) + 1)), max(1, round(1e-3 / once))
    benchmark.pedantic(run, rounds=rounds, iterations=iterations, warmup_rounds=0 if once > 0.1 else 3)


def _reset_resident() -> float | None:
    """Sets the process's high-water mark to what it holds now, freed memory handed back; Linux only."""
    if sys.platform != "linux":
        return None
    ctypes.CDLL(None).malloc_trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    return _resident("VmRSS")


def _resident(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith(field))
