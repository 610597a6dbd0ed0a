"""Stored features read again, from memory and from the disk."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

from spa_fast.cil.data.features import Stacked
from spa_fast.cil.data.shards import ShardFolder

# Caltech-101's training images through a tower of width 192.
SHARDS, PER_CLASS, N, D, BATCH = 100, 21, 196, 192, 64


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> ShardFolder:
    folder = ShardFolder(tmp_path_factory.mktemp("shards"), {"format": "bench"})
    g = torch.Generator().manual_seed(0)
    for i in range(SHARDS):
        tensors = {"patches": torch.randn(PER_CLASS, N, D, generator=g).half()}
        folder.write(f"{i}.safetensors", {}, tensors)
    return folder


def verify(folder: ShardFolder) -> None:
    again = ShardFolder(folder.path, folder.about)
    for i in range(SHARDS):
        again.read(f"{i}.safetensors")


def read_batches(folder: ShardFolder) -> None:
    rows = Stacked([folder.read(f"{i}.safetensors")[1]["patches"] for i in range(SHARDS)])
    for batch in torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).split(BATCH):
        rows[batch]


@pytest.mark.parametrize("pages", ["warm", "cold"])
@pytest.mark.parametrize("work", [verify, read_batches])
def bench_reading(benchmark: Any, one_thread: None, folder: ShardFolder, work: Any, pages: str) -> None:
    """Every shard by one thread; cold: the page cache holds none of it."""
    # Checksums are compared once, so that batches time reading alone.
    read_batches(folder)
    want = torch.randn(PER_CLASS, N, D, generator=torch.Generator().manual_seed(0)).half()
    assert torch.equal(folder.read("0.safetensors")[1]["patches"], want)

    def evict() -> None:
        for file in folder.path.iterdir():
            descriptor = os.open(file, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)

    benchmark.group = f"stored features, {SHARDS} shards of {PER_CLASS} images, N={N} D={D} fp16"
    what = "all checksums" if work is verify else f"one epoch in random batches of {BATCH}"
    benchmark.extra_info |= {"backend": f"{what}, {pages}"}
    benchmark.pedantic(work, (folder,), setup=evict if pages == "cold" else None, rounds=10)
