"""What a run leaves behind for people and programs: JSON, CSV, a curve and overlays."""

from __future__ import annotations

import csv
import json
import platform
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import spa_fast
from spa_fast.cil.errors import writing
from spa_fast.cil.methods.local_branch import Explanation
from spa_fast.cil.metrics import AccuracyMatrix

# The figures that sum up a run, in percent.
SUMMARY = ("average", "last", "forgetting", "bwt")


def environment() -> dict[str, Any]:
    """Versions and hardware behind a figure."""
    from importlib.metadata import version

    packages = ("open_clip_torch", "torchvision", "pillow", "safetensors")
    return {
        "spa_fast": spa_fast.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        **{name: version(name) for name in packages},
        "platform": platform.platform(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
    }


def label(method: str) -> str:
    """What a method is called beside its figures."""
    return "SPA (reconstructed)" if method == "spa" else method


def result_row(
    method: str, matrix: AccuracyMatrix, seconds: float, config: Mapping[str, Any]
) -> dict[str, Any]:
    """One run as results.json holds it; accuracies in percent."""
    return {
        "method": method,
        "label": label(method),
        "average": matrix.average,
        "last": matrix.last,
        "forgetting": matrix.forgetting,
        "bwt": matrix.bwt,
        "accuracies": matrix.accuracies,
        "matrix": matrix.square(),
        "task_sizes": matrix.sizes,
        "seconds": round(seconds, 2),
        "config": config,
        "environment": environment(),
    }


def write_json(path: Path, document: Mapping[str, Any]) -> None:
    """Indented JSON; NaN is refused."""
    with writing(path):
        path.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def append_jsonl(path: Path, record: Mapping[str, Any]) -> None:
    """Add one line."""
    with writing(path), path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record, allow_nan=False) + "\n")


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """One line per row; the first row names the columns."""
    with writing(path), path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def stage_rows(matrix: AccuracyMatrix) -> list[dict[str, Any]]:
    """results.csv of a single run: one line per stage."""
    return [
        {
            "stage": b,
            "accuracy": f"{a:.2f}",
            **{f"task_{i}": f"{r:.2f}" if r is not None else "" for i, r in enumerate(row)},
        }
        for b, (a, row) in enumerate(zip(matrix.accuracies, matrix.square(), strict=True))
    ]


def lamda_summary(matrix: AccuracyMatrix) -> list[str]:
    """The last lines of a log of LAMDA's repositories, for programs that read those; two decimals."""
    curve = [round(a, 2) for a in matrix.accuracies]
    return [f"CNN top1 curve: {curve}", f"Average Accuracy (CNN): {round(sum(curve) / len(curve), 2)}"]


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Left-aligned first column, right-aligned others."""
    widths = [max(len(str(row[i])) for row in (header, *rows)) for i in range(len(header))]

    def line(row: Sequence[str]) -> str:
        return "  ".join(
            c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))
        )

    return "\n".join([line(header), "  ".join("-" * w for w in widths), *map(line, rows)])


def draw_curve(path: Path, curves: Mapping[str, Sequence[float]], title: str) -> None:
    """Accuracy over classes seen so far after each stage, one line per method."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.add_subplot()
    for name, values in curves.items():
        axes.plot(range(1, len(values) + 1), values, marker="o", markersize=3.5, label=name)
    axes.set(xlabel="tasks learnt", ylabel="accuracy on classes seen (%)", title=title)
    axes.set_xticks(range(1, max(len(v) for v in curves.values()) + 1))
    axes.grid(alpha=0.3)
    if len(curves) > 1:
        axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    with writing(path):
        figure.savefig(path, dpi=130)


def draw_overlay(
    path: Path,
    image: Image.Image,
    grid: int,
    why: Explanation,
    texts: Sequence[str],
    title: str,
) -> None:
    """Three panels: kept patches on the image, relevance of every patch, transport plan to descriptions.

    Args:
        path: PNG to write.
        image: the image as the encoder saw it, square.
        grid: patches per side.
        why: what the local branch found.
        texts: M descriptions.
        title: heading.
    """
    from matplotlib.figure import Figure

    M, k = why.similarity.shape[::-1]
    many = M > 8
    figure = Figure(figsize=(15, max(4.6, 0.25 * M)), layout="constrained")
    left, middle, right = figure.subplots(1, 3, width_ratios=[1, 1, 1.5])
    _draw_kept(left, image, grid, why.kept.tolist())
    middle.imshow(image.convert("L"), cmap="gray", alpha=0.5, extent=(0, grid, grid, 0))
    heat = why.relevance.view(grid, grid).numpy()
    shown = middle.imshow(heat, extent=(0, grid, grid, 0), alpha=0.65, cmap="viridis")
    figure.colorbar(shown, ax=middle, shrink=0.8, label="cosine to the descriptions")
    middle.set_title("relevance of every patch", fontsize=10)
    for axes in (left, middle):
        axes.set_axis_off()

    plan = why.transport.plan.T
    mass = right.imshow((plan * plan.numel()).numpy(), aspect="auto", cmap="magma", vmin=0)
    named = [textwrap.shorten(t, 50) if many else "\n".join(textwrap.wrap(t, 34)) for t in texts]
    right.set_yticks(range(M), named, fontsize=7 if many else 9)
    ticks = range(0, k, 1 if k <= 20 else 5)
    right.set_xticks(ticks, [str(i + 1) for i in ticks], fontsize=8)
    right.set_xlabel("kept patch", fontsize=9)
    right.set_title("transport plan (1 = even spread)", fontsize=10)
    total = plan.sum(-1)
    cosines = (plan * why.similarity.T).sum(-1) / total
    sides = right.secondary_yaxis("right")
    labels = [f"{100 * m:.0f} %, {c:.2f}" for m, c in zip(total.tolist(), cosines.tolist(), strict=True)]
    sides.set_yticks(range(M), labels, fontsize=7 if many else 9)
    sides.set_ylabel("plan mass, its mean cosine", fontsize=9)
    figure.colorbar(mass, ax=right, shrink=0.8, pad=0.02)
    figure.suptitle(title, fontsize=11)
    with writing(path):
        figure.savefig(path, dpi=110, format="png")


def _draw_kept(axes: Any, image: Image.Image, grid: int, kept: Sequence[int]) -> None:
    """The image with kept patches outlined and numbered, best first."""
    from matplotlib.patches import Rectangle
    from matplotlib.patheffects import withStroke

    # White with a dark rim shows on every background.
    rim = [withStroke(linewidth=3, foreground="black")]
    axes.imshow(image, extent=(0, grid, grid, 0))
    for rank, index in enumerate(kept):
        y, x = divmod(index, grid)
        axes.add_patch(
            Rectangle((x, y), 1, 1, fill=False, edgecolor="white", linewidth=1.4, path_effects=rim)
        )
        text = {
            "color": "white",
            "fontsize": 8 if grid <= 10 else 6.5,
            "ha": "center",
            "va": "center",
            "path_effects": rim,
        }
        axes.text(x + 0.5, y + 0.5, str(rank + 1), **text)
    axes.set_title("kept patches, best first", fontsize=10)
