"""Stand-ins for the known data sets: their true class folders with a few tiny images each, written fast."""

import io
import struct
from pathlib import Path

import numpy as np
from PIL import Image

from spa_fast.cil.data.catalog import DATA_SETS, DataSet, folder_names, label_names


def class_folders(data_set: DataSet) -> list[str]:
    """Folder names whose sorted order is the label order, as the published sets have them."""
    if by_folder := folder_names(data_set):
        return sorted(by_folder)
    labels = [name.replace(" ", "_").replace("/", "-") for name in label_names(data_set)]
    return labels if labels == sorted(labels) else [f"{i:03d}.{name}" for i, name in enumerate(labels, 1)]


def write_twin(root: Path, data_set: DataSet, train: int, test: int) -> Path:
    """The data set with `train` + `test` images in all, spread evenly; no two files are equal."""
    folder = root / data_set.folder
    if data_set.key == "cifar224":
        return write_cifar(folder, train, test)
    picture = _tiny_jpeg()
    names = class_folders(data_set)
    for split, count in (("train", train), ("test", test)):
        for i, name in enumerate(names):
            (folder / split / name).mkdir(parents=True)
            for j in range(i, count, len(names)):
                # Bytes after the end of a JPEG are not part of the picture.
                (folder / split / name / f"{j}.jpg").write_bytes(picture + f"{split}{j}".encode())
    return folder


def write_all_twins(root: Path, per_class: int) -> Path:
    """All known data sets with `per_class` images a class and split."""
    for data_set in DATA_SETS.values():
        count = per_class * data_set.classes
        write_twin(root, data_set, count, count)
    return root


def write_cifar(folder: Path, train: int, test: int) -> Path:
    """CIFAR-100's three files, instruction by instruction as Python 2 wrote them."""
    folder.mkdir(parents=True)
    names = [name.replace(" ", "_") for name in label_names(DATA_SETS["cifar224"])]
    meta = {"fine_label_names": names, "coarse_label_names": ["a", "b"]}
    (folder / "meta").write_bytes(b"\x80\x02" + stream(meta) + b".")
    rng = np.random.default_rng(0)
    for split, count in (("train", train), ("test", test)):
        content = {
            "filenames": [f"{split}_s_{i:06d}.png" for i in range(count)],
            "batch_label": f"{split}ing batch 1 of 1",
            "fine_labels": [i % 100 for i in range(count)],
            "data": rng.integers(0, 256, (count, 3072), np.uint8),
        }
        (folder / split).write_bytes(b"\x80\x02" + stream(content) + b".")
    return folder


def stream(value: object) -> bytes:
    """One value as a run of instructions."""
    if isinstance(value, str):
        return b"U" + struct.pack("<B", len(value)) + value.encode() + b"q\x01"
    if isinstance(value, int):
        return b"K" + struct.pack("<B", value) if value < 256 else b"J" + struct.pack("<i", value)
    if isinstance(value, list):
        return b"]q\x02(" + b"".join(map(stream, value)) + b"e"
    if isinstance(value, dict):
        return b"}(" + b"".join(stream(key) + stream(item) for key, item in value.items()) + b"u"
    assert isinstance(value, np.ndarray)
    shape = b"".join(map(stream, map(int, value.shape))) + b"\x86"
    kind = b"cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    raw = value.tobytes()
    start = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
    return start + b"(K\x01" + shape + kind + b"\x89T" + struct.pack("<i", len(raw)) + raw + b"tb"


def _tiny_jpeg() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (90, 120, 150)).save(buffer, "JPEG")
    return buffer.getvalue()
