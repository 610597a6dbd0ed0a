"""`spa-fast descriptions lint`: a readable table per file, before any GPU time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from spa_fast.cil.data.catalog import description_file, find_data_set, label_names
from spa_fast.cil.descriptions.lint import lint
from spa_fast.cil.descriptions.readers import read_document
from spa_fast.cil.errors import RunError
from spa_fast.cil.json_input import is_texts, read_json
from spa_fast.cil.open_clip_import import import_open_clip


def lint_files(
    files: Sequence[Path],
    classnames: Path | None,
    preset: str,
    template: str,
    say: Callable[[str], None],
) -> int:
    """Lint files, print a table each; 1 if any has a fault, else 0.

    Raises:
        RunError: no files, or class names that cannot be read.
    """
    if not files:
        raise RunError("descriptions lint: expected at least one file")
    if classnames and preset:
        raise RunError("--classnames, --preset: expected one of them")
    data_set = find_data_set(preset.partition("_")[0], "--preset") if preset else None
    names = label_names(data_set) if data_set else _read_names(classnames) if classnames else ()
    tokenizer = import_open_clip().SimpleTokenizer()
    bad = 0
    for path in files:
        try:
            document = read_document(path, names, data_set.key if data_set else "", argument="file")
        except RunError as error:
            say(f"{path}: not read\n  FAULT  {error}")
            bad += 1
            continue
        # As for a run, packaged files alone may hold more classes than the published subset.
        packaged = data_set is not None and path.resolve() == description_file(data_set).resolve()
        findings = lint(
            document,
            names,
            subset=packaged,
            tokens=lambda text: len(tokenizer.encode(text)) + 2,
            template=template,
        )
        first, *rows = findings.lines()
        for line in (f"{path}: {first}", *rows):
            say(line)
        bad += bool(findings.faults)
    say(f"{len(files)} checked, {bad} with faults")
    return int(bad > 0)


def _read_names(path: Path) -> tuple[str, ...]:
    """Class names: a list, the values of {folder: name}, or the only list of {data set: list}."""
    names = read_json(path, "--classnames")
    if isinstance(names, dict):
        names = [*names.values()]
        names = names[0] if len(names) == 1 and isinstance(names[0], list) else names
    if not is_texts(names) or not names:
        raise RunError(f"--classnames: {path}: expected a list of names or an object of folder: class name")
    return tuple(name.strip() for name in names)
