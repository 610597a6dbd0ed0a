"""Write bench/RESULTS.md from pytest-benchmark's JSON.

    python bench/report.py [NEW.json ...]

Files each NEW.json as bench/results/<device>.json, in place of an older one, then writes the tables of all
results there.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

BENCH = Path(__file__).parent
COMMAND = "make results"
# The row of a group that the others are compared with: the first of these it has, else its slowest.
BASELINES = ("torch loop", "torch", "Cholesky", "gemm alone", "reference", "encode")


def slug(machine: dict[str, Any]) -> str:
    device = machine["device"] + ("" if machine["cuda"] else f" {machine['cpu_capability']}")
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def load(path: Path) -> dict[str, Any]:
    try:
        result: dict[str, Any] = json.loads(path.read_text())
        result["machine_info"]["device"], groups(result)
    except (OSError, ValueError, KeyError, TypeError) as error:
        sys.exit(f"{path}: not a result of `{COMMAND}`: {error!r}")
    return result


def groups(result: dict[str, Any]) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """File to group to rows, in the order they ran; a row not measured holds a reason."""
    found: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for row in result["benchmarks"]:
        who = row["extra_info"].get("backend", row["name"])
        peak = row["extra_info"].get("peak_mem_mb")
        entry = {"who": who, "ms": 1e3 * row["stats"]["min"], "rounds": row["stats"]["rounds"], "peak": peak}
        entry["shares"] = row["extra_info"].get("shares", {})
        name, shape = row["group"] or row["name"], row["extra_info"].get("shape")
        if isinstance(shape, str) and shape not in name:
            name = f"{name}, {shape}"
        file = Path(row["fullname"].partition("::")[0]).name
        found.setdefault(file, {}).setdefault(name, []).append(entry)
    for row in result["not_measured"]:
        rows = found.setdefault(row["file"], {}).setdefault(row["group"], [])
        rows.append({"who": row["backend"], "reason": row["reason"]})
    return found


def table(rows: list[dict[str, Any]]) -> list[str]:
    timed = [row for row in rows if "ms" in row]
    if not timed:
        return [f"- {row['who']}: not measured: {row['reason']}" for row in rows]
    named = [row for start in BASELINES for row in timed if row["who"].startswith(start)]
    base = named[0] if named else max(timed, key=lambda row: row["ms"])
    memory = any(row["peak"] is not None for row in timed)
    lines = [
        f"| who | ms | times {base['who']} |" + (" extra peak MB |" if memory else ""),
        "|---|---|---|" + ("---|" if memory else ""),
    ]
    for row in rows:
        if "reason" in row:
            lines.append(f"| {row['who']} | not measured: {row['reason']} | |" + (" |" if memory else ""))
            continue
        peak = "" if row["peak"] is None else f"{row['peak']:.0f}"
        cells = [row["who"], digits(row["ms"]), digits(base["ms"] / row["ms"]), *([peak] if memory else [])]
        lines.append(f"| {' | '.join(cells)} |")
    for row in timed:
        if row["shares"]:
            parts = [f"{stage} {percent} %" for stage, percent in row["shares"].items() if percent]
            lines += ["", f"{row['who']}: {', '.join(parts)}."]
    return lines


def digits(x: float) -> str:
    return f"{x:.0f}" if x >= 100 else f"{x:.3g}"


def section(result: dict[str, Any]) -> list[str]:
    machine = result["machine_info"]
    versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items())
    commit = result.get("commit_info", {})
    state = f"{commit.get('id', 'unknown')[:10]}{' with changes' if commit.get('dirty') else ''}"
    lines = [
        f"## {machine['device']}",
        "",
        f"{result['datetime'][:10]}, commit {state}, Python {machine['python_version']}, {versions}; torch's "
        f"CPU code {machine['cpu_capability']}; load average {result['load_average']:.1f} at the end.",
    ]
    for file, found in groups(result).items():
        lines += ["", f"### {file}"]
        for name, rows in found.items():
            lines += ["", f"#### {name}", "", *table(rows)]
    return lines


def report(results: list[dict[str, Any]]) -> str:
    lines = [
        "# Measured",
        "",
        f"Written by `{COMMAND}` (`pytest bench --benchmark-only`, then `python bench/report.py`). A row is "
        "the fastest of its rounds, fp32, one thread where it does not say otherwise. Every row's result "
        "agreed with a reference's, draws by their moments; a matrix product alone is there as a floor. The "
        "third column is how many times faster a row is than the one its heading names. Extra peak: memory "
        "of one call above what was there before. Percentages are of one call, each stage without those "
        "inside of it.",
    ]
    for result in results:
        lines += ["", *section(result)]
    if not any(result["machine_info"]["cuda"] for result in results):
        lines += ["", "## GPU", "", "Not measured: no result of a CUDA device has been filed."]
    return "\n".join(lines) + "\n"


def main(arguments: list[str]) -> None:
    folder = BENCH / "results"
    folder.mkdir(exist_ok=True)
    for argument in arguments:
        result = load(Path(argument))
        target = folder / f"{slug(result['machine_info'])}.json"
        target.write_text(json.dumps(result, indent=1, sort_keys=True) + "\n")
    results = [load(path) for path in sorted(folder.glob("*.json"))]
    if not results:
        sys.exit(f"no results in {folder}: run `{COMMAND}`")
    (BENCH / "RESULTS.md").write_text(report(results))


if __name__ == "__main__":
    main(sys.argv[1:])
