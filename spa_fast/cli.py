"""Command line: spa-fast COMMAND; `main` lists them."""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

import tyro
from tyro.conf import OmitArgPrefixes, Positional, Suppress, arg

from spa_fast.cil.data.catalog import DataSet, find_folder, read_templates
from spa_fast.cil.descriptions.describe_config import DescribeConfig
from spa_fast.cil.errors import RunError
from spa_fast.cil.run_config import RunConfig
from spa_fast.cil.tracking import TrackerName


def say(line: str) -> None:
    """One line to standard output, at once."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def train(
    config: OmitArgPrefixes[RunConfig],
    out: Path | None = None,
    data_root: Path | None = None,
    config_file: Annotated[Path | None, arg(name="config")] = None,
    track: TrackerName = "none",
) -> None:
    """Train a method over all tasks and write a run folder.

    Args:
        config: settings of the run.
        out: run folder; must not exist or be empty. Default runs/ and a name from data, split, method,
            backbone with weights, and seed.
        data_root: folder of several data sets, where --preset and --config look for theirs.
        config_file: experiment JSON of ENGINE, AREA, C3Box or PILOT to start from; every key is answered.
        track: where figures go beside metrics.jsonl; each tracker is an extra of the same name.
    """
    from spa_fast.cil.presets import run_name
    from spa_fast.cil.train import train as run

    run(config, out or Path("runs") / run_name(config), say, track)


def start(argv: list[str]) -> tuple[RunConfig | None, list[str]]:
    """What `train` starts from: the settings of --preset or --config, and the other arguments.

    A file given to --templates is replaced by the texts in it for the data set.
    """
    from spa_fast.cil.lamda_json import read_experiment
    from spa_fast.cil.presets import parse_preset, preset_config

    parser = argparse.ArgumentParser("spa-fast train", add_help=False, allow_abbrev=False)
    for flag in ("--preset", "--config"):
        parser.add_argument(flag)
    for flag in ("--data-root", "--data"):
        parser.add_argument(flag, flag.replace("a-", "a_"), type=Path)
    parser.add_argument("--templates", nargs="*")
    known, rest = parser.parse_known_args(argv)
    data = [] if known.data is None else ["--data", str(known.data)]

    def others(data_set: DataSet | None) -> list[str]:
        texts = known.templates
        if texts and len(texts) == 1 and texts[0].endswith(".json"):
            texts = read_templates(Path(texts[0]), data_set, "--templates")
        return [*data, *([] if texts is None else ["--templates", *texts]), *rest]

    def locate(data_set: DataSet | None) -> Path:
        if known.data:
            return Path(known.data)
        if data_set is None or known.data_root is None:
            # Asked for help, nothing is looked up.
            if {"-h", "--help"} & set(rest):
                return Path("DATA")
            name = data_set.key if data_set else "an unknown data set"
            raise RunError(
                f"--data: {name}: expected --data FOLDER, or --data-root FOLDER for known data sets"
            )
        return find_folder(known.data_root, data_set)

    if known.preset and known.config:
        raise RunError("--preset, --config: expected one of them")
    if known.preset:
        data_set = parse_preset(known.preset)[0]
        return preset_config(known.preset, locate(data_set)), others(data_set)
    if known.config:
        config, lines = read_experiment(Path(known.config), locate)
        for line in lines:
            say(line)
        return config, others(config.data_set)
    if known.data_root:
        raise RunError("--data-root: expected --preset or --config beside it")
    return None, others(None)


def evaluate(run: Positional[Path], /, data: Path | None = None) -> None:
    """Score a finished run again, after its last task, on its test images.

    Args:
        run: run folder.
        data: data folder; default the one it was trained on.
    """
    from spa_fast.cil.predict import evaluate_run

    for line in evaluate_run(run, data):
        say(line)


def predict(run: Positional[Path], images: Positional[tuple[Path, ...]], /, top: int = 5) -> None:
    """Print the top classes of images with their scores (cosines, fused).

    Args:
        run: run folder.
        images: image files.
        top: classes shown per image.
    """
    from spa_fast.cil.predict import predict_images

    for line in predict_images(run, images, top):
        say(line)


def data(
    action: Positional[Literal["check"]],
    /,
    preset: tuple[str, ...] = (),
    data_root: Path | None = None,
    data: Path | None = None,
    classnames: Path | None = None,
    image_list: Path | None = None,
    quarantine: Path | None = None,
) -> int:
    """Examine data sets without decoding them; exit code 1 if one has a fault.

    Args:
        action: check.
        preset: presets or data sets to check; default all that --data-root holds.
        data_root: folder of several data sets.
        data: one data set; with one --preset it is checked as that one.
        classnames: as for train, with --data.
        image_list: as for train, with --data.
        quarantine: text file to write for --exclude: images that cannot be used, and training images that
            are test images too.
    """
    from spa_fast.cil.data.doctor import check_all

    return check_all(preset, data_root, data, classnames, image_list, quarantine, say)


def describe(config: OmitArgPrefixes[DescribeConfig]) -> int:
    """Have a model write descriptions of every class, from images or from names; resumes where it stopped.

    Nothing is sent without --allow-upload: first an estimate is printed. Needs the extra `describe`.

    Args:
        config: what to describe.
    """
    from spa_fast.cil.descriptions.generate import describe as run

    return run(config, say)


def descriptions(
    action: Positional[Literal["lint"]],
    files: Positional[tuple[Path, ...]],
    /,
    classnames: Path | None = None,
    preset: str = "",
    description_template: str = "{name} with {description}",
) -> int:
    """Judge files of class-wise descriptions before any training; exit code 1 if one has a fault.

    Args:
        action: lint.
        files: description files or folders, in any format that train reads.
        classnames: JSON file of the class names that must be there: a list, or {folder: name}.
        preset: preset or data set whose classes must be there.
        description_template: as for train; tokens are counted on the joined text.
    """
    from spa_fast.cil.descriptions.lint_files import lint_files

    return lint_files(files, classnames, preset, description_template, say)


_SWEEP_FLAGS = ("--seeds", "--vary", "--out", "--jobs", "--track", "--data-root", "--data")


def sweep(
    presets: Annotated[Positional[tuple[str, ...]], arg(metavar="PRESET...")],
    /,
    seeds: int = 3,
    vary: Literal["order", "training"] = "order",
    out: Path = Path("runs/sweep"),
    jobs: int = 1,
    track: TrackerName = "none",
    data_root: Path | None = None,
    data: Path | None = None,
    settings: Suppress[tuple[str, ...]] = (),
) -> int:
    """Train presets over several seeds, one process a device; any other argument is handed to train.

    Finished runs in the folder are kept, half-done ones are done again. Prints mean and spread and writes
    sweep.csv; exit code 1 if a run failed.

    Args:
        presets: presets, before any other argument.
        seeds: runs of each preset.
        vary: order: class orders 1993, 1994, ... as in LAMDA's seed lists; training: order 1993, training
            seeds 1, 2, ...
        out: folder of the run folders.
        jobs: runs at a time on the CPU; with CUDA there is one on each device.
        track: as for train.
        data_root: as for train.
        data: as for train, with one preset.
        settings: arguments of train.
    """
    from spa_fast.cil.sweep import plan, run_sweep, slots
    from spa_fast.cil.tracking import tracker_module

    if not presets:
        raise RunError("sweep: expected presets before any other argument, for example cub_B0_Inc20")
    if seeds < 1 or jobs < 1:
        raise RunError(f"sweep: expected --seeds >= 1 and --jobs >= 1, got {seeds} and {jobs}")
    if data and len(presets) > 1:
        raise RunError(f"--data: expected --data-root with {len(presets)} presets")
    tracker_module(track)
    places = [f"--{name}={path}" for name, path in (("data-root", data_root), ("data", data)) if path]
    plans = []
    for preset in presets:
        arguments = ["--preset", preset, *places, *settings]
        default, rest = start(arguments)
        assert default is not None
        prog = "spa-fast train"
        config = tyro.cli(OmitArgPrefixes[RunConfig], default=default, args=rest, prog=prog)
        plans.append(plan(config, ["train", *arguments, "--track", track], seeds, vary, out))
    # The first seed of every preset, then the second.
    runs = [run for group in zip(*plans, strict=True) for run in group]
    if len({run.folder for run in runs}) < len(runs):
        raise RunError(f"sweep: a preset is named twice: {', '.join(presets)}")
    given = any(argument.partition("=")[0] == "--device" for argument in settings)
    return run_sweep(runs, out, slots(config.device if given else None, jobs), say)


def split_sweep(argv: list[str]) -> tuple[list[str], tuple[str, ...]]:
    """Arguments of `sweep` itself, and those that it hands to `train`."""
    own = list(itertools.takewhile(lambda argument: not argument.startswith("-"), argv))
    settings: list[str] = []
    rest = iter(argv[len(own) :])
    for argument in rest:
        flag, equals, _ = argument.partition("=")
        if flag.replace("_", "-") in _SWEEP_FLAGS:
            own += [argument, *([] if equals else itertools.islice(rest, 1))]
        else:
            (own if flag in ("-h", "--help") else settings).append(argument)
    return own, tuple(settings)


def cache(
    action: Positional[Literal["info", "verify", "clear"]],
    /,
    cache: Path = Path("runs/feature_cache"),
) -> int:
    """List, verify or remove extracted features.

    `verify` compares every checksum, names damaged shards and ends with code 1. It knows no images and so
    changes nothing: the next train or eval with the same settings extracts those shards again, alone.

    Args:
        action: info, verify or clear.
        cache: folder of extracted features, as for train.
    """
    from spa_fast.cil.data.cache_folders import ACTIONS

    return ACTIONS[action](cache, say)


def explain(
    run: Positional[Path],
    image: Positional[Path],
    /,
    name: Annotated[str, tyro.conf.arg(name="class")],
    out: Path = Path("explanation.png"),
) -> None:
    """Draw the patches that a class keeps of an image, every patch's relevance, and the transport plan.

    Args:
        run: run folder of spa.
        image: image file.
        name: class whose descriptions choose and are aligned.
        out: PNG to write, in place of an earlier one.
    """
    from spa_fast.cil.predict import explain_image

    say(explain_image(run, image, name, out))


def demo(
    out: Path = Path("runs/demo"), seeds: int = 3, first_seed: int = 0, keep: Path | None = None
) -> None:
    """Run the ablation ladder over the embedded world: offline, no GPU.

    Args:
        out: folder to write; an earlier demo in it is replaced.
        seeds: worlds and class orders to average over.
        first_seed: seed of the first world.
        keep: new folder for the first world, its descriptions and a run of spa over it, to try the other
            commands on.
    """
    from spa_fast.cil.checkpoint import check_out
    from spa_fast.cil.demo.ladder import keep_run, run_demo

    if seeds < 1 or first_seed < 0:
        raise RunError(f"demo: expected --seeds >= 1 and --first-seed >= 0, got {seeds} and {first_seed}")
    if keep:
        check_out(keep, argument="--keep")
    run_demo(out, range(first_seed, first_seed + seeds), say)
    if keep:
        keep_run(keep, first_seed, say)


def env() -> None:
    """Print versions, devices, backends and compiled parts as JSON."""
    from spa_fast._backends import available
    from spa_fast._native import native_info
    from spa_fast.cil.report import environment

    usable = {name: reason or "usable" for name, reason in available().items()}
    say(json.dumps({"environment": environment(), "backends": usable, "native": native_info()}, indent=1))


# What an interrupted command leaves, where the interrupt does not say it.
_LEFT = {
    "train": "no unfinished run folder is left",
    "demo": "no unfinished run folder is left",
    "sweep": "finished runs are kept: the same command goes on with the others",
}


def main(argv: list[str] | None = None) -> int:
    """Run a command; bad input is one line on standard error and exit code 2, a failing disk 3."""
    commands: dict[str, Callable[..., int | None]] = {
        "train": train,
        "eval": evaluate,
        "predict": predict,
        "data": data,
        "cache": cache,
        "describe": describe,
        "descriptions": descriptions,
        "sweep": sweep,
        "explain": explain,
        "demo": demo,
        "env": env,
    }
    # A terminated run cleans up like an interrupted one.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    args = sys.argv[1:] if argv is None else argv
    try:
        if args[:1] == ["train"]:
            config, rest = start(args[1:])
            args = ["train", *rest]
            commands["train"] = functools.partial(train, config=config) if config else train
        if args[:1] == ["sweep"]:
            own, settings = split_sweep(args[1:])
            args = ["sweep", *own]
            commands["sweep"] = functools.partial(sweep, settings=settings)
        code = tyro.extras.subcommand_cli_from_dict(commands, prog="spa-fast", args=args)
    except RunError as error:
        return _refuse(error, 2)
    except BrokenPipeError:
        # Whoever read our output has gone; say nothing more, not even at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        return _refuse(error, 3)
    except KeyboardInterrupt as stop:
        left = str(stop) or _LEFT.get("".join(args[:1]), "")
        sys.stderr.write(f"spa-fast: interrupted{left and '; '}{left}\n")
        return 130
    return code or 0


def _refuse(error: Exception, code: int) -> int:
    sys.stderr.write(f"spa-fast: error: {' '.join(str(error).split())}\n")
    return code


if __name__ == "__main__":
    sys.exit(main())
