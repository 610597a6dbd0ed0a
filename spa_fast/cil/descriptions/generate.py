"""`spa-fast describe`: class-wise descriptions of a new data set, written by a model or from a template."""

from __future__ import annotations

import hashlib
import io
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spa_fast.cil.data.cache import FeatureCache
from spa_fast.cil.data.datasets import ImageFolders, read_image_folders
from spa_fast.cil.data.images import ImageRef, image_bytes, read_image
from spa_fast.cil.descriptions.describe_config import TEMPLATE, DescribeConfig
from spa_fast.cil.descriptions.readers import read_document
from spa_fast.cil.descriptions.schema import ClassEntry, Descriptions, write_descriptions
from spa_fast.cil.descriptions.select import select_exemplars
from spa_fast.cil.errors import RunError
from spa_fast.cil.loading import load_backbone
from spa_fast.cil.lock import exclusive

if TYPE_CHECKING:
    from spa_fast.cil.descriptions.chat import Writer

# Long side in pixels of the images that are sent: what vision models look at in low detail.
SIDE = 512
# After so many classes in a row without any answer the server is taken to be down.
LOST = 3

Say = Callable[[str], None]


def describe(
    config: DescribeConfig,
    say: Say,
    *,
    sleep: Callable[[float], object] = time.sleep,
    timeout: float = 60.0,
) -> int:
    """Write descriptions of every class; 1 if some are still missing, else 0.

    The file is replaced whole after every class; whatever ends the command, the next one goes on from there.

    Args:
        config: what to do.
        say: takes one line at a time.
        sleep: waits between attempts.
        timeout: seconds without a byte after which a request is given up.

    Raises:
        RunError: bad input, a server that refuses or does not answer, or a cost cap reached.
    """
    data = read_image_folders(config.data, config.classnames)
    out = (config.out or Path(f"{data.root.resolve().name}_descriptions.json")).resolve()
    if not out.parent.is_dir():
        raise RunError(f"--out: no such folder: {out.parent}")
    busy = f"--out: {out} is being written by another command"
    if config.from_template:
        with exclusive(out.with_name(f".{out.name}.lock"), busy):
            return _write_template(config, data, out, say)
    writer = _writer(config, sleep, timeout)
    with exclusive(out.with_name(f".{out.name}.lock"), busy):
        document = _earlier(out, data, _generator(config, writer))
        todo = [i for i, entry in enumerate(document.classes) if entry.status not in ("ok", "manual")]
        say(f"{len(data.names)} classes, {len(todo)} to describe: {out}")
        if not todo:
            return 0
        _say_estimate(config, writer, len(todo), say)
        if not config.allow_upload:
            say("nothing was sent: add --allow-upload (or --yes) to go on")
            return 1
        document = _ask_all(config, data, document, todo, writer, out, say)
    counts = Counter(entry.status for entry in document.classes)
    sent, answered = writer.used
    spent = f", ${writer.cost(sent, answered):.4f}" if config.prices else ""
    states = ", ".join(f"{count} {status}" for status, count in counts.items())
    say(f"{states}; {sent} tokens sent, {answered} answered{spent}: {out}")
    missing = len(document.classes) - counts["ok"] - counts["manual"]
    if missing:
        say(f"{missing} classes without text: run the same command again, or write them as status manual")
    return int(missing > 0)


def _write_template(config: DescribeConfig, data: ImageFolders, out: Path, say: Say) -> int:
    if out.exists():
        raise RunError(f"--out: {out} exists; choose another file or remove it")
    texts = TEMPLATE[: config.n_descriptions]
    classes = tuple(ClassEntry(name, texts) for name in data.names)
    generator = {"model": "template", "params": {"n_descriptions": config.n_descriptions}, "date": _today()}
    write_descriptions(out, Descriptions(classes, "own", data.root.resolve().name, generator))
    say(f"{len(classes)} classes, each with the same {len(texts)} general texts: {out}")
    return 0


def _writer(config: DescribeConfig, sleep: Callable[[float], object], timeout: float) -> Writer:
    try:
        from spa_fast.cil.descriptions.chat import Writer
    except ImportError as error:
        missing = f"{error.name} is not installed: pip install 'spa_fast[describe]'"
        raise RunError(f"describe: {missing}, or use --from-template") from error
    return Writer(
        config.model,
        config.base_url,
        prices=config.prices or (0.0, 0.0),
        max_cost=config.max_cost,
        timeout=timeout,
        sleep=sleep,
    )


def _generator(config: DescribeConfig, writer: Writer) -> dict[str, Any]:
    """Who writes, from what: two runs into one file must agree on all but the date."""
    from spa_fast.cil.descriptions.chat import prompt_sha256

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
    """The file to go on with, or a fresh one.

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
    return replace(found, generator=generator)


def _say_estimate(config: DescribeConfig, writer: Writer, classes: int, say: Say) -> None:
    from spa_fast.cil.descriptions.chat import ATTEMPTS, estimate

    sent, answered = (classes * n for n in estimate(config.exemplars, config.n_descriptions))
    cost = f", about ${writer.cost(sent, answered):.2f}" if config.prices else " (--prices gives dollars)"
    what = f"{classes * config.exemplars} images and the class names" if config.exemplars else "class names"
    say(f"{what} of {classes} classes leave this machine for {config.model} at {writer.address}")
    say(f"about {sent} tokens sent and {answered} answered{cost}; at most {ATTEMPTS} requests a class")


def _ask_all(
    config: DescribeConfig,
    data: ImageFolders,
    document: Descriptions,
    todo: list[int],
    writer: Writer,
    out: Path,
    say: Say,
) -> Descriptions:
    choose = _chooser(config, data, out)
    classes = list(document.classes)
    lost = 0
    for done, i in enumerate(todo, 1):
        name = data.names[i]
        images = choose(i)
        texts, status, reason = writer.ask(name, config.n_descriptions, [_jpeg(image) for image in images])
        shown = tuple(hashlib.sha256(image_bytes(image)).hexdigest() for image in images)
        classes[i] = ClassEntry(name, tuple(texts), status, shown if texts else (), reason)
        document = replace(document, classes=tuple(classes))
        write_descriptions(out, document)
        say(f"[{done}/{len(todo)}] {name}: {status}{reason and ': '}{reason}")
        lost = 0 if writer.answered else lost + 1
        if lost == LOST:
            raise RunError(
                f"describe: {writer.address}: no answer for {LOST} classes in a row ({reason}); "
                "run the same command again later"
            )
    return document


def _chooser(config: DescribeConfig, data: ImageFolders, out: Path) -> Callable[[int], list[ImageRef]]:
    """Chooses the images of a class by its index."""
    if not config.exemplars:
        return lambda index: []
    backbone = load_backbone(config.backbone, device=config.device)
    cache = FeatureCache(config.cache or out.parent / "feature_cache", data, backbone)
    cache.fill("train")

    def choose(index: int) -> list[ImageRef]:
        features = cache.load("train", index).globals
        rows = select_exemplars(features, config.exemplars, config.exemplar_selection)
        return [data.images["train"][index][row] for row in rows]

    return choose


def _jpeg(image: ImageRef) -> bytes:
    """The image as it is sent: upright, small, without its metadata (place, time, camera)."""
    picture = read_image(image)
    picture.thumbnail((SIDE, SIDE))
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=90, exif=b"")
    return file.getvalue()


def _today() -> str:
    return datetime.now(UTC).date().isoformat()
