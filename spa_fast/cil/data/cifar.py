"""CIFAR-100 as torchvision leaves it on disk, read as data: nothing in the files is imported or called.

The files `train`, `test` and `meta` are Python object streams. Such a stream is a program, and the standard
reader runs it. The reader here knows only the instructions that those three files consist of: numbers, texts,
lists, dictionaries and one array of bytes. Any other instruction, and any global name but those of a NumPy
array, is refused.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from spa_fast.cil.data.images import StoredImage
from spa_fast.cil.errors import RunError

FILES = ("meta", "test", "train")
SIDE = 32

_ARRAY_NAMES = {
    "numpy.core.multiarray _reconstruct",
    "numpy._core.multiarray _reconstruct",
    "numpy ndarray",
    "numpy dtype",
}
# A stored text longer than this stays a view of the file: the pixels.
_LONG = 1 << 16


def is_cifar(root: Path) -> bool:
    """Whether the folder holds the three files."""
    return all((root / name).is_file() for name in FILES)


def read_cifar(root: Path) -> tuple[tuple[str, ...], dict[str, list[list[StoredImage]]]]:
    """Class names in label order, and per split the images of each class in file order.

    Raises:
        RunError: a file that is not what CIFAR-100's makers publish.
    """
    meta = _read(root / "meta")
    names = meta.get("fine_label_names")
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise RunError(f"--data: {root / 'meta'}: expected a list of texts fine_label_names")
    splits = {}
    for split in ("train", "test"):
        path = root / split
        content = _read(path)
        labels, data = content.get("fine_labels"), content.get("data")
        size = 3 * SIDE * SIDE
        if not isinstance(labels, list) or not isinstance(data, np.ndarray) or data.ndim != 2:
            raise RunError(f"--data: {path}: expected fine_labels and an array data, got {list(content)}")
        if data.shape != (len(labels), size):
            raise RunError(
                f"--data: {path}: expected data of shape {(len(labels), size)} for {len(labels)} labels, "
                f"got {data.shape}"
            )
        images: list[list[StoredImage]] = [[] for _ in names]
        for row, label in enumerate(labels):
            if not isinstance(label, int) or not 0 <= label < len(names):
                got = label if isinstance(label, int) else type(label).__name__
                raise RunError(f"--data: {path}: expected labels 0 to {len(names) - 1}, got {got}")
            images[label].append(StoredImage(path, row, data[row].reshape(3, SIDE, SIDE)))
        splits[split] = images
    return tuple(names), splits


def _read(path: Path) -> dict[str, Any]:
    try:
        content = _Stream(np.memmap(path, np.uint8, mode="r").data).read()
    except (OSError, ValueError, IndexError, KeyError, TypeError, RecursionError, struct.error) as error:
        raise RunError(f"--data: {path}: not a CIFAR-100 file: {error}") from error
    if not isinstance(content, dict):
        raise RunError(f"--data: {path}: not a CIFAR-100 file: expected a dictionary")
    return content


class _Name(str):
    """A global that the stream mentions; it stays a name."""


class _Array:
    """An array whose content the stream has yet to give."""


class _Mark:
    """Start of a run of items on the stack."""


class _Stream:
    """One object stream: a stack, a memo, and the instructions that CIFAR-100's files consist of."""

    def __init__(self, data: memoryview) -> None:
        self.data = data
        self.at = 0
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def read(self) -> Any:
        """The object that the stream describes."""
        if bytes(self.take(2)) != b"\x80\x02":
            raise ValueError("expected an object stream of protocol 2")
        while (code := bytes(self.take(1))) != b".":
            instruction = _INSTRUCTIONS.get(code)
            if instruction is None:
                raise ValueError(f"instruction {code!r} at byte {self.at - 1} is not one of data")
            instruction(self)
        (content,) = self.stack
        return content

    def take(self, n: int) -> memoryview:
        if n < 0 or self.at + n > len(self.data):
            raise ValueError(f"truncated: {n} bytes wanted at byte {self.at} of {len(self.data)}")
        self.at += n
        return self.data[self.at - n : self.at]

    def number(self, kind: str) -> int:
        (value,) = struct.unpack("<" + kind, self.take(struct.calcsize("<" + kind)))
        return int(value)

    def line(self) -> str:
        text = bytes(self.data[self.at : self.at + 256]).split(b"\n")[0]
        self.take(len(text) + 1)
        return text.decode("ascii")

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def text(self, kind: str) -> None:
        raw = self.take(self.number(kind))
        self.push(raw if len(raw) > _LONG else bytes(raw).decode("latin-1"))

    def remember(self, kind: str) -> None:
        self.memo[self.number(kind)] = self.stack[-1]

    def items(self) -> list[Any]:
        start = len(self.stack) - 1
        while not isinstance(self.stack[start], _Mark):
            start -= 1
        items = self.stack[start + 1 :]
        del self.stack[start:]
        return items

    def pair_up(self, n: int) -> None:
        values = tuple(self.stack[len(self.stack) - n :])
        del self.stack[len(self.stack) - n :]
        self.push(values)

    def name(self) -> None:
        name = f"{self.line()} {self.line()}"
        if name not in _ARRAY_NAMES:
            raise ValueError(f"it asks for {name!r}, which data do not need")
        self.push(_Name(name))

    def apply(self) -> None:
        """The only two calls that data contain: a new array, and its element type."""
        arguments, name = self.stack.pop(), self.stack.pop()
        if not isinstance(name, _Name) or name == "numpy ndarray":
            raise ValueError(f"a call of {name!r}")
        if name == "numpy dtype" and arguments[0] != "u1":
            raise ValueError(f"expected an array of bytes, got {arguments[0]!r}")
        self.push("u1" if name == "numpy dtype" else _Array())

    def fill(self) -> None:
        """Give an array its content; an element type needs none."""
        state, target = self.stack.pop(), self.stack.pop()
        if isinstance(target, _Array):
            _version, shape, kind, by_columns, raw = state
            if kind != "u1":
                raise ValueError("an array without an element type")
            raw = raw.encode("latin-1") if isinstance(raw, str) else raw
            target = np.frombuffer(raw, np.uint8).reshape(shape, order="F" if by_columns else "C")
        elif target != "u1":
            raise ValueError("state for something other than an array")
        self.push(target)

    def extend(self, items: list[Any]) -> None:
        _of(self.stack[-1], list).extend(items)

    def set_items(self, items: list[Any]) -> None:
        target = _of(self.stack[-1], dict)
        for key, value in zip(items[::2], items[1::2], strict=True):
            # Anything else may be nested deeper than Python can hash.
            target[_of(key, str)] = value


def _of(value: Any, kind: type) -> Any:
    if type(value) is not kind:
        raise ValueError(f"expected a {kind.__name__}, got {type(value).__name__}")
    return value


_INSTRUCTIONS: dict[bytes, Callable[[_Stream], None]] = {
    b"}": lambda s: s.push({}),
    b"]": lambda s: s.push([]),
    b")": lambda s: s.push(()),
    b"N": lambda s: s.push(None),
    b"\x88": lambda s: s.push(True),
    b"\x89": lambda s: s.push(False),
    b"(": lambda s: s.push(_Mark()),
    b"K": lambda s: s.push(s.number("B")),
    b"M": lambda s: s.push(s.number("H")),
    b"J": lambda s: s.push(s.number("i")),
    b"U": lambda s: s.text("B"),
    b"T": lambda s: s.text("i"),
    b"q": lambda s: s.remember("B"),
    b"r": lambda s: s.remember("I"),
    b"h": lambda s: s.push(s.memo[s.number("B")]),
    b"j": lambda s: s.push(s.memo[s.number("I")]),
    b"\x85": lambda s: s.pair_up(1),
    b"\x86": lambda s: s.pair_up(2),
    b"\x87": lambda s: s.pair_up(3),
    b"t": lambda s: s.push(tuple(s.items())),
    b"a": lambda s: s.extend([s.stack.pop()]),
    b"e": lambda s: s.extend(s.items()),
    b"s": lambda s: s.set_items([s.stack.pop(-2), s.stack.pop()]),
    b"u": lambda s: s.set_items(s.items()),
    b"c": lambda s: s.name(),
    b"R": lambda s: s.apply(),
    b"b": lambda s: s.fill(),
}
