"""What a machine can hold of the layout: who imports whom, banned constructs, sizes, public names."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import spa_fast

ROOT = Path(__file__).parents[1]
FOLDERS = ("spa_fast", "kernels", "csrc", "bench", "tests", "examples")
SHIPPED = sorted(p for folder in ("spa_fast", "kernels") for p in (ROOT / folder).rglob("*.py"))
PYTHON = sorted(p for folder in FOLDERS for p in (ROOT / folder).rglob("*.py"))

# A module may import modules of lower layers, and those of its own folder.
LAYERS = [
    {"kernels", "reference", "_native", "_checks"},
    {"_backends", "_aliases"},
    {"_ops"},
    {"_features", "_bank"},
    {"transport", "gaussian", "project"},
    {"patches", "bank"},
    {"align", "compat"},
    {"cil"},
    {"cli"},
]
# What may be imported beside the standard library; by default torch.
EXTERNAL = {
    "kernels": {"torch", "triton"},
    "_backends": {"torch", "triton"},
    "bank": {"torch", "safetensors"},
}
# Rooms that may use the package as its users do.
USERS = ("cil", "cli")
MAX_LINES = {"reference": 250, "_ops": 250, "kernels": 250, "cil": 250}
MAX_LINES_ELSE = 500
MAX_KERNEL_LINES = 100

BANNED_NAMES = {"utils", "util", "helpers", "helper", "common", "misc"}
BANNED = {
    "block pointers": r"make_block_ptr",
    "autotuning at run time": r"triton\.(autotune|heuristics)",
    "pickle": r"\b(import pickle|from pickle|pickle\.|cloudpickle)",
    "eval or exec": r"(?<![\w.])(eval|exec)\([^)]",
    "unsafe yaml": r"yaml\.load\(",
    "a shell": r"shell\s*=\s*True",
    "environment variables": r"os\.(environ|getenv|putenv)",
    "torch.load of objects": r"weights_only\s*=\s*False",
}


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts if parts[0] == "spa_fast" else ("spa_fast", *parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room_of(module: str) -> str:
    return [*module.split("."), ""][1]


def imports_of(path: Path) -> set[str]:
    """Absolute names of everything imported anywhere in the file, also inside functions."""
    module, found = module_of(path), set()
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, *([base] if base else [])])
            found |= {f"{base}.{alias.name}" for alias in node.names} if base == "spa_fast" else {base}
    return found


def layer_of(room: str) -> int:
    layers = [level for level, rooms in enumerate(LAYERS) if room in rooms]
    assert layers, f"spa_fast.{room} has no layer: say in LAYERS who may import it"
    return layers[0]


@pytest.mark.parametrize("path", SHIPPED, ids=module_of)
def test_import_directions(path: Path) -> None:
    room = room_of(module_of(path))
    for name in imports_of(path):
        top, other = name.split(".")[0], room_of(name)
        if top == "spa_fast":
            if room in ("", other) or (room in USERS and other in ("", *spa_fast.__all__)):
                continue
            assert layer_of(other) < layer_of(room), f"{path}: {room} may not import {name}"
            assert room not in ("kernels", "reference"), f"{path}: {room} stands alone"
        elif room not in ("", *USERS) and top not in sys.stdlib_module_names:
            assert top in EXTERNAL.get(room, {"torch"}), f"{path}: {room} may not import {name}"


def test_nothing_shipped_imports_tests_bench_or_examples() -> None:
    for path in SHIPPED:
        tops = {name.split(".")[0] for name in imports_of(path)}
        assert not tops & {"tests", "bench", "examples", "kernels", "pytest", "hypothesis"}, path


def test_every_file_says_in_its_name_what_it_does() -> None:
    for path in PYTHON:
        assert path.stem not in BANNED_NAMES, path
        assert not re.search(r"(^|_)(fast|opt|new|old)_|_v\d+$|_(opt|new|old)$", path.stem), path


@pytest.mark.parametrize("path", SHIPPED, ids=module_of)
def test_banned_constructs(path: Path) -> None:
    text = path.read_text()
    for what, pattern in BANNED.items():
        assert not re.search(pattern, text), f"{path}: {what}"


@pytest.mark.parametrize("path", SHIPPED, ids=module_of)
def test_files_stay_short(path: Path) -> None:
    room = room_of(module_of(path))
    limit = MAX_LINES.get(room, MAX_LINES_ELSE)
    lines = len(path.read_text().splitlines())
    assert lines <= limit, f"{path}: {lines} lines, at most {limit}"
    for node in ast.walk(ast.parse(path.read_text())):
        jitted = isinstance(node, ast.FunctionDef) and any(
            "jit" in ast.unparse(d) for d in node.decorator_list
        )
        if room == "kernels" and jitted:
            size = node.end_lineno - node.lineno + 1
            assert size <= MAX_KERNEL_LINES, f"{path}: kernel {node.name} has {size} lines"


def test_op_names_are_private() -> None:
    for path in (ROOT / "spa_fast" / "_ops").glob("*.py"):
        for name in re.findall(r'"spa_fast::(\w+)"', path.read_text()):
            assert name.startswith("_"), f"{path}: {name}"


def test_public_names() -> None:
    assert set(spa_fast.__all__) >= {
        "SinkhornAlign",
        "PatchAligner",
        "sinkhorn",
        "sinkhorn_align",
        "topk_patches",
        "spa_scores",
        "GaussianBank",
        "sample_gaussian",
    }
    for name in spa_fast.__all__:
        assert getattr(spa_fast, name) is not None
        assert name == "__version__" or getattr(spa_fast, name).__doc__, f"{name} has no docstring"


def test_import_is_light() -> None:
    code = (
        "import sys, time, torch, numpy\n"
        "start, before = time.perf_counter(), set(sys.modules)\n"
        "import spa_fast\n"
        "took = time.perf_counter() - start\n"
        "new = {m.split('.')[0] for m in set(sys.modules) - before} - set(sys.stdlib_module_names)\n"
        "heavy = [m for m in ('torch._dynamo', 'triton') if m in sys.modules and m not in before]\n"
        'sys.stdout.write(f\'{took};{sorted(new - {"torch", "numpy", "spa_fast"})};{heavy}\')\n'
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    took, foreign, heavy = run.stdout.split(";")
    assert foreign == "[]", foreign
    assert heavy == "[]", heavy
    assert float(took) < 1.0
