"""A folder of checksummed safetensors shards: mapped when read, written whole or not at all, one writer."""

from __future__ import annotations

import contextlib
import hashlib
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from spa_fast.cil.atomic import replacing
from spa_fast.cil.lock import exclusive

# Names a shard folder as one and says what its shards hold.
ABOUT = "cache.json"
LOCK = ".lock"

Say = Callable[[str], None]


class ShardFault(Exception):
    """Why a shard cannot be used."""


class ShardFolder:
    """Shards by name.

    Args:
        path: the folder; created by the first write.
        about: what its shards have in common; written beside them.
    """

    def __init__(self, path: Path, about: Mapping[str, str]) -> None:
        self.path = path
        self.about = dict(about)
        self._whole: set[tuple[str, int, int, int]] = set()

    def read(self, name: str) -> tuple[dict[str, str], dict[str, Tensor]]:
        """Metadata and memory-mapped tensors of a shard; its checksum is compared once per process.

        Raises:
            ShardFault: not there, truncated, or its checksum differs.
        """
        file = self.path / name
        try:
            stat = file.stat()
            with safe_open(file, framework="pt") as shard:
                metadata = dict(shard.metadata() or {})
                tensors = {key: shard.get_tensor(key) for key in shard.keys()}  # noqa: SIM118
        except FileNotFoundError:
            raise ShardFault("not there") from None
        except (SafetensorError, OSError, ValueError, RuntimeError) as error:
            raise ShardFault(f"unreadable ({' '.join(str(error).split())})") from error
        stored = metadata.pop("sha256", None)
        version = (name, stat.st_ino, stat.st_size, stat.st_mtime_ns)
        if version not in self._whole:
            if stored != checksum(metadata, tensors):
                raise ShardFault("its checksum differs")
            self._whole.add(version)
        return metadata, tensors

    def write(self, name: str, metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> None:
        """Put a shard in place; whatever goes wrong, an earlier one of that name stays whole.

        Raises:
            OSError: the disk is full or fails.
        """
        sealed = {**metadata, "sha256": checksum(metadata, tensors)}
        # Through our own file: save_file makes it private to its owner, and caches are shared.
        self._place(name, save({key: tensor.contiguous() for key, tensor in tensors.items()}, sealed))

    def _place(self, name: str, content: bytes) -> None:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            if name != ABOUT:
                self.describe()
            with replacing(self.path / name) as partial:
                partial.write_bytes(content)
        except OSError as error:
            left = "what was stored before is whole"
            raise OSError(f"--cache: {self.path / name}: cannot write: {error}; {left}") from error

    def describe(self) -> None:
        """Write what the shards have in common beside them, where it does not lie and can be written."""
        with contextlib.suppress(OSError, ValueError):
            if json.loads((self.path / ABOUT).read_text(encoding="utf-8")) == self.about:
                return
        with contextlib.suppress(OSError):
            self._place(ABOUT, json.dumps(self.about, indent=1).encode())

    def check_writable(self) -> None:
        """Try to write.

        Raises:
            OSError: with the reason.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=self.path):
            pass

    @contextlib.contextmanager
    def lock(self, say: Say) -> Iterator[None]:
        """Be the only writer; waits for another one and says who it is.

        What a killed writer left half written is removed.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        about = f"feature cache {self.path}"
        with exclusive(self.path / LOCK, f"{about}: another process writes to it", wait=say) as held:
            if held:
                for partial in self.path.glob("*.partial"):
                    partial.unlink()
            else:
                say(f"{about}: no locks on this file system; a second writer repeats work, no more")
            yield


def checksum(metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of everything a shard says: metadata, names, types, shapes and bytes."""
    digest = hashlib.sha256(json.dumps(dict(metadata), sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def digest(value: Any) -> str:
    """SHA-256 of a JSON-ready value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
