"""`spa-fast describe`: class-wise descriptions of a new data set, written by a model or from a template."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spa_fast.cil.data.datasets import ImageFolders, read_image_folders
from spa_fast.cil.data.images import image_bytes
from spa_fast.cil.descriptions.budget import Budget
from spa_fast.cil.descriptions.describe_config import TEMPLATE, DescribeConfig
from spa_fast.cil.descriptions.exemplars import chooser, jpeg
from spa_fast.cil.descriptions.prompt import estimate, prompt_sha256
from spa_fast.cil.descriptions.readers import read_document
from spa_fast.cil.descriptions.schema import ClassEntry, Descriptions, write_descriptions
from spa_fast.cil.descriptions.threads import in_parallel
from spa_fast.cil.errors import RunError
from spa_fast.cil.lock import exclusive

if TYPE_CHECKING:
    from spa_fast.cil.descriptions.chat import Outcome, Writer

# After so many classes without any answer, none with one between them, the server is taken to be down.
LOST = 3

Say = Callable[[str], None]


def describe(
    config: DescribeConfig,
    say: Say,
    *,
    sleep: Callable[[float], object] | None = None,
    timeout: float = 60.0,
) -> int:
    """Write descriptions of every class; 1 if some are still missing, else 0.

    The file is replaced whole after every class; whatever ends the command, the next one goes on from there.

    Args:
        config: what to do.
        say: takes one line at a time.
        sleep: waits between attempts, in place of real time.
        timeout: seconds after which a request is given up.

    Raises:
        RunError: bad input, a server that refuses or does not answer, or a cost cap reached.
        KeyboardInterrupt: with what is stored by then.
    """
    data = read_image_folders(config.data, config.classnames)
    out = (config.out or Path(f"{data.root.resolve().name}_descriptions.json")).resolve()
    if not out.parent.is_dir():
        raise RunError(f"--out: no such folder: {out.parent}")
    budget = Budget(config.prices or (0.0, 0.0), config.max_cost)
    writer = None if config.from_template else _writer(config, budget, sleep, timeout)
    with exclusive(out.with_name(f".{out.name}.lock"), f"--out: {out} is being written by another command"):
        if writer is None:
            return _write_template(config, data, out, say)
        document = _earlier(out, data, _generator(config, writer))
        todo = [i for i, entry in enumerate(document.classes) if not entry.settled]
        say(f"{len(data.names)} classes, {len(todo)} to describe: {out}")
        if not todo:
            return 0
        _say_estimate(config, writer, budget, len(todo), say)
        if not config.allow_upload:
            say("nothing was sent: add --allow-upload (or --yes) to go on")
            return 1
        try:
            document = _ask_all(config, data, document, todo, writer, out, say)
        except KeyboardInterrupt as stop:
            raise KeyboardInterrupt(_left(out, data)) from stop
    counts = Counter(entry.status for entry in document.classes)
    sent, answered = budget.used
    spent = f", ${budget.cost(sent, answered):.4f}" if config.prices else ""
    states = ", ".join(f"{count} {status}" for status, count in counts.items())
    say(f"{states}; {sent} tokens sent, {answered} answered{spent}: {out}")
    missing = sum(not entry.settled for entry in document.classes)
    if missing:
        say(f"{missing} classes without text: run the same command again, or write them as status manual")
    return int(missing > 0)


def _left(out: Path, data: ImageFolders) -> str:
    """What an interrupted command leaves behind."""
    if not out.exists():
        return f"no class is described yet: {out} was not written"
    settled = sum(entry.settled for entry in read_document(out, argument="--out").classes)
    return f"{settled} of {len(data.names)} classes are stored in {out}; the same command asks for the others"


def _write_template(config: DescribeConfig, data: ImageFolders, out: Path, say: Say) -> int:
    if out.exists():
        raise RunError(f"--out: {out} exists; choose another file or remove it")
    texts = TEMPLATE[: config.n_descriptions]
    classes = tuple(ClassEntry(name, texts) for name in data.names)
    generator = {"model": "template", "params": {"n_descriptions": config.n_descriptions}, "date": _today()}
    write_descriptions(out, Descriptions(classes, "own", data.root.resolve().name, generator))
    say(f"{len(classes)} classes, each with the same {len(texts)} general texts: {out}")
    return 0


def _writer(
    config: DescribeConfig, budget: Budget, sleep: Callable[[float], object] | None, timeout: float
) -> Writer:
    try:
        from spa_fast.cil.descriptions.chat import Writer
    except ImportError as error:
        missing = f"{error.name} is not installed: pip install 'spa_fast[describe]'"
        raise RunError(f"describe: {missing}, or use --from-template") from error
    return Writer(
        config.model,
        config.base_url,
        asks=config.allow_upload,
        budget=budget,
        timeout=timeout,
        sleep=sleep,
    )


def _generator(config: DescribeConfig, writer: Writer) -> dict[str, Any]:
    """Who writes, from what: two runs into one file must agree on all but the date."""
    params: dict[str, object] = {"n_descriptions": config.n_descriptions, "exemplars": config.exemplars}
    if config.exemplars:
        params |= {"exemplar_selection": config.exemplar_selection, "backbone": config.backbone}
    return {
        "model": config.model,
        "base_url": writer.address,
        "params": params,
        "prompt_sha256": prompt_sha256(),
        "date": _today(),
    }


def _earlier(out: Path, data: ImageFolders, generator: Mapping[str, Any]) -> Descriptions:
    """The file to go on with, its date included, or a fresh one.

    Raises:
        RunError: the file is unreadable, of other classes, or written with other settings.
    """
    fresh = tuple(ClassEntry(name, (), "pending") for name in data.names)
    if not out.exists():
        return Descriptions(fresh, "own", data.root.resolve().name, generator)
    found = read_document(out, argument="--out")
    for key, value in generator.items():
        if key != "date" and found.generator.get(key) != value:
            there = found.generator.get(key)
            raise RunError(f"--out: {out} was written with {key} {there!r}, not {value!r}; choose another")
    if [entry.name for entry in found.classes] != list(data.names):
        raise RunError(f"--out: {out} is of other classes than {data.root}; choose another file")
    return found


def _say_estimate(config: DescribeConfig, writer: Writer, budget: Budget, classes: int, say: Say) -> None:
    sent, answered = (classes * n for n in estimate(config.exemplars, config.n_descriptions))
    cost = f", about ${budget.cost(sent, answered):.2f}" if config.prices else " (--prices gives dollars)"
    what = f"{classes * config.exemplars} images and the class names" if config.exemplars else "class names"
    say(f"{what} of {classes} classes leave this machine for {config.model} at {writer.address}")
    say(f"about {sent} tokens sent and {answered} answered{cost}; at most {writer.attempts} requests a class")


def _ask_all(
    config: DescribeConfig,
    data: ImageFolders,
    document: Descriptions,
    todo: list[int],
    writer: Writer,
    out: Path,
    say: Say,
) -> Descriptions:
    """Ask for every class, several at a time, and store each as it is answered.

    What ends the run lets no further class be asked for; answers under way are waited for and stored.
    """
    choose = chooser(config, data, config.cache or out.parent / "feature_cache", say)
    classes = list(document.classes)
    lost = 0
    ended: RunError | None = None

    def requests() -> Iterator[tuple[tuple[int, tuple[str, ...]], Callable[[], Outcome]]]:
        nonlocal ended
        for i in todo:
            if ended:
                return
            try:
                images = choose(i)
                sent = [jpeg(image) for image in images]
                shown = tuple(hashlib.sha256(image_bytes(image)).hexdigest() for image in images)
            except RunError as error:
                ended = error
                return
            yield (i, shown), partial(writer.ask, data.names[i], config.n_descriptions, sent)

    try:
        for done, ((i, shown), answer) in enumerate(in_parallel(requests(), config.parallel), 1):
            try:
                texts, status, reason, answered = answer.result()
            except RunError as error:
                ended = ended or error
                writer.stop()
                continue
            date = _today() if texts else ""
            classes[i] = ClassEntry(data.names[i], tuple(texts), status, shown if texts else (), reason, date)
            document = replace(document, classes=tuple(classes))
            write_descriptions(out, document)
            say(f"[{done}/{len(todo)}] {data.names[i]}: {status}{reason and ': '}{reason}")
            lost = 0 if answered else lost + 1
            if lost == LOST and not ended:
                ended = RunError(
                    f"describe: {writer.address}: no answer for {LOST} classes in a row ({reason}); "
                    "run the same command again later"
                )
                writer.stop()
    finally:
        writer.stop()
    if ended:
        raise ended
    return document


def _today() -> str:
    return datetime.now(UTC).date().isoformat()
