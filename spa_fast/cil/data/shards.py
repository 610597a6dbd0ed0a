"""A folder of checksummed safetensors shards: mapped when read, written whole or not at all, one writer."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import platform
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

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
        partial = self.path / f"{name}.{os.getpid()}-{threading.get_ident()}.partial"
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            if name != ABOUT and self._described() != self.about:
                self._place(ABOUT, json.dumps(self.about, indent=1).encode())
            with partial.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(self.path / name)
        except OSError as error:
            left = "what was stored before is whole"
            raise OSError(f"--cache: {self.path / name}: cannot write: {error}; {left}") from error
        finally:
            with contextlib.suppress(OSError):
                partial.unlink()

    def _described(self) -> object:
        try:
            return json.loads((self.path / ABOUT).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None

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

        The lock is the kernel's: it goes with its process, however that ends. What a killed writer left
        half written is removed.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as stack:
            while True:
                file = stack.enter_context((self.path / LOCK).open("a+", encoding="utf-8"))
                if not _acquire(file.fileno(), self.path, say):
                    break
                # `cache clear` may have removed the file while we waited for it.
                with contextlib.suppress(FileNotFoundError):
                    if os.fstat(file.fileno()).st_ino == (self.path / LOCK).stat().st_ino:
                        for partial in self.path.glob("*.partial"):
                            partial.unlink()
                        break
            file.truncate(0)
            since = datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
            file.write(f"process {os.getpid()} on {platform.node()} since {since}")
            file.flush()
            yield
            file.truncate(0)


def _acquire(descriptor: int, path: Path, say: Say) -> bool:
    """Wait for the lock; False where the file system has none."""
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"feature cache {path}: waiting for {holder(path) or 'another process'}, which writes to it")
            fcntl.flock(descriptor, fcntl.LOCK_EX)
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            raise
        say(f"feature cache {path}: no locks on this file system; a second writer repeats work, no more")
        return False
    return True


def holder(path: Path) -> str:
    """The process that writes to a shard folder now, or nothing."""
    try:
        with (path / LOCK).open("r", encoding="utf-8") as file:
            try:
                fcntl.flock(file.fileno(), fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return file.read() or "another process"
    except OSError:
        pass
    return ""


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
