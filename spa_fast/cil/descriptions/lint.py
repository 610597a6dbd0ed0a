"""Judging descriptions before any training: faults stop a run, notes are for people."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Sequence
from itertools import zip_longest
from pathlib import Path

from spa_fast.cil.config import SpaConfig
from spa_fast.cil.data.catalog import DATA_SETS
from spa_fast.cil.descriptions.lengths import over_length, overflow
from spa_fast.cil.descriptions.readers import read_document
from spa_fast.cil.descriptions.schema import ClassEntry, Descriptions
from spa_fast.cil.descriptions.wording import text_fault, wrong_language
from spa_fast.cil.errors import RunError, did_you_mean
from spa_fast.cil.findings import Findings, file_all

# Of the words of two classes' texts together, the share in both from which the sets are near-identical. Among
# the packaged files the closest two classes, two gulls, share 0.49.
NEAR_IDENTICAL = 0.8


def lint(
    document: Descriptions,
    names: Sequence[str] = (),
    *,
    subset: bool = False,
    tokens: Callable[[str], int] | None = None,
    limit: int = 77,
    template: str = SpaConfig.description_template,
) -> Findings:
    """Judge a file.

    Args:
        document: what was read.
        names: class names that must be there; none takes those of the file.
        subset: whether the file may hold further classes.
        tokens: counts the tokens of a text as the text encoder does, start and end included.
        limit: most tokens it takes.
        template: how class name and description are joined for it.
    """
    counts = [len(entry.texts) for entry in document.classes]
    each = f"{min(counts)} to {max(counts)} texts each" if counts else "no texts"
    findings = Findings(f"{document.form} format, {len(counts)} classes, {each}")
    file_all(findings.faults, "duplicate key", [repr(key) for key in document.duplicate_keys])
    file_all(findings.notes, "reading", document.remarks)
    _check_names(findings, document, names, subset)
    for entry in document.classes:
        _check_texts(findings, entry, template)
    _check_alike(findings, document)
    _check_leaks(findings, document.classes)
    if tokens:
        pairs = [(entry.name, text) for entry in document.classes for text in entry.texts]
        if over := over_length(pairs, tokens, limit, template):
            findings.notes[f"{overflow(len(over), len(pairs), limit)}, the rest is cut"] = over
    return findings


def read_descriptions(path: Path, names: Sequence[str], *, subset: bool = False) -> list[list[str]]:
    """Descriptions of each class, in the order of `names`, for a run.

    Args:
        path: the file or folder, in any format of `read_document`.
        names: class names.
        subset: whether the file may hold further classes.

    Raises:
        RunError: unreadable file, or one that `lint` faults.
    """
    document = read_document(path, names)
    faults = lint(document, names, subset=subset).faults
    if faults:
        (kind, found), *others = faults.items()
        count = len(found) - 1 + sum(map(len, (found for _, found in others)))
        more = f"; {count} more by `spa-fast descriptions lint`" if count else ""
        raise RunError(f"--descriptions: {path}: {kind}: {found[0]}{more}")
    texts = {entry.name: [t.strip() for t in entry.texts if t.strip()] for entry in document.classes}
    return [texts[name] for name in names]


def _check_names(findings: Findings, document: Descriptions, names: Sequence[str], subset: bool) -> None:
    found = Counter(entry.name for entry in document.classes)
    data_set = DATA_SETS.get(document.dataset)
    expected = len(names) or (data_set.classes if data_set else 0)
    enough = len(found) >= expected if subset or not names else len(found) == expected
    missing = [name for name in names if name not in found]
    file_all(findings.faults, "missing class", _hinted("class {!r} has no descriptions", missing, found))
    without = [_without_text(e) for e in document.classes if not any(map(str.strip, e.texts))]
    file_all(findings.faults, "class without text", without)
    twice = [f"class {name!r} appears twice" for name, count in found.items() if count > 1]
    file_all(findings.faults, "duplicate class", twice)
    if names and not subset:
        known = set(names)
        unknown = [name for name in found if name not in known]
        file_all(findings.faults, "unknown class", _hinted("unknown class {!r}", unknown, names))
    if not enough:
        findings.faults["number of classes"].append(f"expected {expected}, found {len(found)}")


def _check_texts(findings: Findings, entry: ClassEntry, template: str) -> None:
    texts = [text for text in entry.texts if text.strip()]
    blank = len(entry.texts) - len(texts)
    if blank and texts:
        findings.notes["blank text"].append(f"{entry.name}: {blank}")
    for text in texts:
        if fault := text_fault(text):
            findings.faults[fault[0]].append(f"{entry.name}: {_cut(text)}: {fault[1]}")
    twice = [text for text, count in Counter(_words(t) for t in texts).items() if count > 1]
    file_all(findings.notes, "text given twice", [f"{entry.name}: {_cut(' '.join(t))}" for t in twice])
    if len(texts) == 1:
        findings.notes["one text only: transport has nothing to choose"].append(entry.name)
    if texts and wrong_language(texts):
        findings.notes["not English"].append(f"{entry.name}: {_cut(texts[0])}")
    named = [text for text in texts if _holds(_words(text), _words(entry.name))]
    if named and "{name}" in template:
        findings.notes["class name in its own text"].append(f"{entry.name}: {_cut(named[0])}")
    if len(named) < len(texts) and "{name}" not in template:
        findings.notes["class name absent from its text"].append(entry.name)


def _check_alike(findings: Findings, document: Descriptions) -> None:
    if document.from_template:
        findings.notes["from template"].append("every class has the same texts")
        return
    by_words: dict[frozenset[str], list[str]] = defaultdict(list)
    for entry in document.classes:
        if words := frozenset(_words(" ".join(entry.texts))):
            by_words[words].append(entry.name)
    same = [names for names in by_words.values() if len(set(names)) > 1]
    file_all(findings.faults, "same texts", [" and ".join(names) for names in same])
    # All pairs of more classes than this are not compared.
    bags = list(by_words.items())[:2000]
    for i, (words, names) in enumerate(bags):
        for others, other_names in bags[:i]:
            sizes = sorted((len(words), len(others)))
            if sizes[0] >= NEAR_IDENTICAL * sizes[1] and (
                len(words & others) >= NEAR_IDENTICAL * len(words | others)
            ):
                findings.notes["nearly the same texts"].append(f"{other_names[0]} and {names[0]}")


def _check_leaks(findings: Findings, classes: Sequence[ClassEntry]) -> None:
    """Other classes' names; of one word only if it says what the class is, not what it has."""
    by_first: dict[str, list[tuple[str, ...]]] = defaultdict(list)
    for entry in classes:
        words = _words(entry.name)
        if words:
            by_first[words[0]].append(words)
    for entry in classes:
        own = _words(entry.name)
        for text in entry.texts:
            words = _words(text)
            for i, word in enumerate(words):
                for name in by_first.get(word, ()):
                    if words[i : i + len(name)] == name and not _holds(own, name) and len("".join(name)) > 3:
                        findings.notes["another class's name"].append(f"{entry.name}: {_cut(text)}")


def _without_text(entry: ClassEntry) -> str:
    why = entry.status + (f": {entry.reason}" if entry.reason else "")
    told = "" if entry.status in ("ok", "manual") else f" ({why})"
    return f"class {entry.name!r} has no descriptions{told}"


def _hinted(what: str, names: Sequence[str], known: Collection[str]) -> list[str]:
    """A line per name; the closest known name is looked up for the few that are shown."""
    hints = [did_you_mean(name, known) for name in names[:5]]
    return [what.format(name) + hint for name, hint in zip_longest(names, hints, fillvalue="")]


def _words(text: str) -> tuple[str, ...]:
    return tuple(re.findall(r"\w+", text.lower().replace("_", " ")))


def _holds(words: tuple[str, ...], part: tuple[str, ...]) -> bool:
    return bool(part) and any(words[i : i + len(part)] == part for i in range(len(words)))


def _cut(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")
