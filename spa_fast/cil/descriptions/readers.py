"""Reading description files as people have them: five published shapes and this project's own, told apart."""

from __future__ import annotations

import ast
import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from spa_fast.cil.data.labels import plain
from spa_fast.cil.data.layout import short
from spa_fast.cil.descriptions.schema import SCHEMA, ClassEntry, Descriptions, Status
from spa_fast.cil.errors import RunError
from spa_fast.cil.json_input import is_texts, read_json, read_text

_SUFFIX = "_descriptions.txt"


def read_document(
    path: Path, names: Sequence[str] = (), dataset: str = "", argument: str = "--descriptions"
) -> Descriptions:
    """Read a file, or a folder of `CLASS_descriptions.txt`; what is in it is not judged here.

    The formats, told apart by their shape:

    - own: `{"schema": ..., "dataset": ..., "classes": [{"name": ..., "descriptions": [...]}]}`
    - flat: `{class: [text, ...]}`
    - pairwise: `{class: {other class: [text, ...]}}`; the entry of a class with itself is used, else its
      texts against the others, most frequent first
    - by index: `{"0": [text, ...]}` with `*_label2class.json` beside it, or `names` in order
    - per data set: `{data set: {class: [template, ...]}}`; `{}` and `{c}` in a template are the class name
    - text: a folder of `CLASS_descriptions.txt` with lines `image<TAB>text`, or one such file

    Args:
        path: the file or folder.
        names: class names wanted; they settle what the file leaves open, and are not checked.
        dataset: which data set to take from a file of several.
        argument: how the user gave the file, for messages.

    Raises:
        RunError: unreadable, or of no known shape.
    """
    if path.is_dir() or path.name.endswith(_SUFFIX):
        return _read_texts(path, names, argument)
    duplicates: list[str] = []
    document = read_json(path, argument, duplicates)
    where = f"{argument}: {path}"
    if not isinstance(document, dict) or not document:
        raise RunError(f"{where}: expected an object of classes, got {_kind(document)}")
    if "classes" in document or "schema" in document:
        read = _own(document, where)
    elif all(isinstance(value, dict) for value in document.values()):
        read = _nested(document, names, dataset, where)
    elif all(key.isdecimal() for key in document) and not set(names) & set(document):
        read = _by_index(document, names, path, argument)
    else:
        read = Descriptions(tuple(ClassEntry(n, _texts(v, n, where)) for n, v in document.items()), "flat")
    return Descriptions(
        read.classes, read.form, read.dataset, read.generator, tuple(duplicates), read.remarks
    )


def fingerprint(path: Path) -> str:
    """SHA-256 of a description file, or of every text file of a folder by name."""
    if path.is_file():
        return hashlib.sha256(path.read_bytes()).hexdigest()
    digest = hashlib.sha256()
    for file in sorted(path.rglob("*.txt")):
        content = hashlib.sha256(file.read_bytes()).hexdigest()
        digest.update(f"{file.relative_to(path)} {content}\n".encode())
    return digest.hexdigest()


def _own(document: Mapping[str, Any], where: str) -> Descriptions:
    if document.get("schema", SCHEMA) != SCHEMA:
        raise RunError(f"{where}: expected schema {SCHEMA!r}, got {document['schema']!r}")
    classes, generator = document.get("classes"), document.get("generator", {})
    if not isinstance(classes, list):
        raise RunError(f"{where}: expected an object with a list 'classes'")
    if not isinstance(generator, dict):
        raise RunError(f"{where}: expected an object 'generator', got {_kind(generator)}")
    read = []
    for i, entry in enumerate(classes):
        entry = entry if isinstance(entry, dict) else {}
        name, lines, images = entry.get("name"), entry.get("descriptions"), entry.get("images", [])
        status, reason = entry.get("status", "manual"), entry.get("reason", "")
        date = entry.get("date", "")
        if not isinstance(name, str) or not is_texts(lines) or not is_texts(images):
            expected = "expected 'name' and a list of strings 'descriptions'"
            raise RunError(f"{where}: classes[{i}]: {expected}")
        if status not in get_args(Status):
            expected = ", ".join(get_args(Status))
            raise RunError(f"{where}: classes[{i}]: status: expected one of {expected}, got {status!r}")
        read.append(ClassEntry(name, tuple(lines), status, tuple(images), str(reason), str(date)))
    dataset = document.get("dataset", "")
    return Descriptions(tuple(read), "own", dataset if isinstance(dataset, str) else "", generator)


def _nested(document: Mapping[str, Any], names: Sequence[str], dataset: str, where: str) -> Descriptions:
    inner = Counter(name for others in document.values() for name in others)
    # In a pairwise file the classes are also the others; data sets are no classes.
    if 2 * sum(name in inner for name in document) >= len(document):
        return _pairwise(document, where)
    cover = {key: len(set(names) & set(classes)) for key, classes in document.items()}
    best = [key for key in document if cover[key] == max(cover.values())]
    chosen = next((key for key in document if plain(key) == plain(dataset)), None) if dataset else None
    if chosen is None and len(best) > 1:
        raise RunError(f"{where}: holds {short(sorted(document))}: say which by --preset or --classnames")
    chosen = chosen or best[0]
    classes = []
    for name, value in document[chosen].items():
        texts = [t.replace("{}", name).replace("{c}", name) for t in _texts(value, name, where)]
        classes.append(ClassEntry(name, tuple(texts)))
    return Descriptions(tuple(classes), "per data set", chosen)


def _pairwise(document: Mapping[str, Any], where: str) -> Descriptions:
    classes, without = [], []
    for name, others in document.items():
        if name in others:
            texts = _texts(others[name], name, where)
        else:
            without.append(name)
            counts = Counter(t for value in others.values() for t in _texts(value, name, where))
            texts = tuple(text for text, _ in counts.most_common())
        classes.append(ClassEntry(name, texts))
    remark = f"no entry with itself, texts against other classes used: {short(without)}"
    return Descriptions(tuple(classes), "pairwise", remarks=(remark,) if without else ())


def _by_index(document: Mapping[str, Any], names: Sequence[str], path: Path, argument: str) -> Descriptions:
    where = f"{argument}: {path}"
    maps = sorted(path.parent.glob("*_label2class.json"))
    own = [m for m in maps if path.stem.startswith(m.name.removesuffix("_label2class.json"))]
    # Counts that differ are not the same classes.
    in_order = names if len(names) == len(document) else ()
    labels: dict[str, str] = {str(i): name for i, name in enumerate(in_order)}
    source = "class names in order"
    if own or len(maps) == 1:
        chosen = max(own, key=lambda m: len(m.name)) if own else maps[0]
        labels, source = _label_map(read_json(chosen, argument), f"{argument}: {chosen}"), chosen.name
    if not labels:
        missing = (
            "classes are numbers: put *_label2class.json beside it, or give as many class names in order"
        )
        raise RunError(f"{where}: {missing}")
    nameless = [key for key in document if key not in labels]
    if nameless:
        raise RunError(f"{where}: no class name for number {short(nameless)} in {source}")
    classes = [ClassEntry(labels[key], _texts(v, f"{key}", where)) for key, v in document.items()]
    return Descriptions(tuple(classes), "by index", remarks=(f"numbers named by {source}",))


def _label_map(document: object, where: str) -> dict[str, str]:
    """{number: name} from that, from {name: number} or from a list."""
    if is_texts(document):
        return {str(i): name for i, name in enumerate(document)}
    if isinstance(document, dict) and all(isinstance(v, int) for v in document.values()):
        return {str(number): name for name, number in document.items()}
    if isinstance(document, dict) and is_texts([*document.values()]):
        return {str(number): name for number, name in document.items()}
    raise RunError(f"{where}: expected {{number: class name}}, {{class name: number}} or a list of names")


def _read_texts(path: Path, names: Sequence[str], argument: str) -> Descriptions:
    where = f"{argument}: {path}"
    files = [path] if path.is_file() else sorted(path.glob(f"*{_SUFFIX}"))
    if not files and (path / "generated_descriptions").is_dir():
        return _read_texts(path / "generated_descriptions", names, argument)
    if not files:
        raise RunError(f"{where}: expected CLASS{_SUFFIX} in the folder")
    folder = files[0].parent
    lists = [f / "classnames.txt" for f in (folder, folder.parent) if (f / "classnames.txt").is_file()]
    known = {plain(name): name for name in (*(_name_list(lists[0], argument) if lists else ()), *names)}
    classes = []
    for file in files:
        stem = file.name.removesuffix(_SUFFIX)
        lines = [line for line in read_text(file, argument).splitlines() if line.strip()]
        # Without a tab a line is all text.
        texts = tuple(line.partition("\t")[2] if "\t" in line else line for line in lines)
        classes.append(ClassEntry(known.get(plain(stem), stem.replace("_", " ")), texts))
    return Descriptions(tuple(classes), "text")


def _name_list(path: Path, argument: str) -> tuple[str, ...]:
    """A Python list literal of names; nothing is run."""
    try:
        names = ast.literal_eval(read_text(path, argument).strip())
    except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError) as error:
        raise RunError(f"{argument}: {path}: expected a list ['name', ...]: {error}") from error
    if not is_texts(names):
        raise RunError(f"{argument}: {path}: expected a list ['name', ...], got {_kind(names)}")
    return tuple(names)


def _texts(value: object, name: str, where: str) -> tuple[str, ...]:
    """A list of texts; one text, or nothing at all, stands for a list of them."""
    if value is None or isinstance(value, str):
        return (value,) if value else ()
    if not is_texts(value):
        raise RunError(f"{where}: class {name!r}: expected a list of texts, got {_kind(value)}")
    return tuple(value)


def _kind(value: object) -> str:
    if value == {} or value == []:
        return "an empty one"
    kinds = {dict: "an object", list: "a list", str: "a text", type(None): "null"}
    return kinds.get(type(value), type(value).__name__)
