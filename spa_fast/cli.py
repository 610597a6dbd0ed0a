"""Command line: spa-fast train | eval | predict | explain | demo | env."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import tyro
from tyro.conf import OmitArgPrefixes, Positional

from spa_fast.cil.errors import RunError
from spa_fast.cil.run_config import RunConfig


def say(line: str) -> None:
    """One line to standard output, at once."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def train(config: OmitArgPrefixes[RunConfig], out: Path) -> None:
    """Train a method over all tasks and write a run folder.

    Args:
        config: settings of the run.
        out: run folder; must not exist or be empty.
    """
    from spa_fast.cil.train import train as run

    run(config, out, say)


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


def demo(out: Path = Path("runs/demo"), seeds: int = 3, first_seed: int = 0) -> None:
    """Run the ablation ladder over the embedded world: offline, no GPU.

    Args:
        out: folder to write; an earlier demo in it is replaced.
        seeds: worlds and class orders to average over.
        first_seed: seed of the first world.
    """
    from spa_fast.cil.demo.ladder import run_demo

    if seeds < 1 or first_seed < 0:
        raise RunError(f"demo: expected --seeds >= 1 and --first-seed >= 0, got {seeds} and {first_seed}")
    run_demo(out, range(first_seed, first_seed + seeds), say)


def env() -> None:
    """Print versions, devices, backends and compiled parts as JSON."""
    from spa_fast._backends import available
    from spa_fast._native import native_info
    from spa_fast.cil.report import environment

    usable = {name: reason or "usable" for name, reason in available().items()}
    say(json.dumps({"environment": environment(), "backends": usable, "native": native_info()}, indent=1))


def main(argv: list[str] | None = None) -> int:
    """Run a command; bad input is one line on standard error and exit code 2, a failing disk 3."""
    commands: dict[str, Callable[..., None]] = {
        "train": train,
        "eval": evaluate,
        "predict": predict,
        "explain": explain,
        "demo": demo,
        "env": env,
    }
    # A terminated run cleans up like an interrupted one.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        tyro.extras.subcommand_cli_from_dict(commands, prog="spa-fast", args=argv)
    except RunError as error:
        return _refuse(error, 2)
    except BrokenPipeError:
        # Whoever read our output has gone; say nothing more, not even at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        return _refuse(error, 3)
    except KeyboardInterrupt:
        sys.stderr.write("spa-fast: interrupted; an unfinished run folder was removed\n")
        return 130
    return 0


def _refuse(error: Exception, code: int) -> int:
    sys.stderr.write(f"spa-fast: error: {' '.join(str(error).split())}\n")
    return code


if __name__ == "__main__":
    sys.exit(main())
