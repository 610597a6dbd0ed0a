"""bench/report.py: what pytest-benchmark recorded as tables, and what was not measured said."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

PATH = Path(__file__).parents[1] / "bench" / "report.py"


@pytest.fixture
def report() -> ModuleType:
    spec = importlib.util.spec_from_file_location("bench_report", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def result(cuda: bool = False) -> dict[str, Any]:
    def row(who: str, seconds: float, peak: float | None) -> dict[str, Any]:
        extra = {"backend": who, "peak_mem_mb": peak}
        return {
            "group": "fwd 1x2",
            "name": who,
            "fullname": f"bench/bench_pairs.py::bench_fwd[{who}]",
            "extra_info": extra,
            "stats": {"min": seconds, "rounds": 3},
        }

    return {
        "machine_info": {
            "device": "Some GPU" if cuda else "Some CPU, 2 cores",
            "cuda": cuda,
            "cpu_capability": "AVX2",
            "python_version": "3.11.7",
            "versions": {"torch": "2.13.0"},
        },
        "datetime": "2026-01-02T03:04:05",
        "load_average": 0.25,
        "commit_info": {"id": "0123456789abcdef", "dirty": True},
        "benchmarks": [row("native", 0.002, 1.0), row("torch loop", 0.5, None)],
        "not_measured": [
            {"group": "fwd 1x2", "backend": "triton", "reason": "no CUDA device", "file": "bench_pairs.py"}
        ],
    }


def test_report_tables(report: ModuleType) -> None:
    text = report.report([result()])
    assert "\n### bench_pairs.py\n\n#### fwd 1x2\n\n| who |" in text
    assert "| native | 2 | 250 | 1 |" in text
    assert "| torch loop | 500 | 1 |  |" in text
    assert "| triton | not measured: no CUDA device | | |" in text
    assert "commit 0123456789 with changes" in text
    assert "Not measured: no result of a CUDA device" in text
    assert "## GPU" not in report.report([result(), result(cuda=True)])


def test_report_says_where_the_time_goes(report: ModuleType) -> None:
    staged = result()
    staged["benchmarks"][0]["extra_info"]["shares"] = {"backward": 60, "rest": 40, "draws": 0}
    assert "\nnative: backward 60 %, rest 40 %.\n" in report.report([staged])


def test_report_files_results_by_device(report: ModuleType, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(report, "BENCH", tmp_path)
    new = tmp_path / "new.json"
    with pytest.raises(SystemExit, match="no results"):
        report.main([])
    new.write_text(json.dumps(result()))
    report.main([str(new)])
    assert [p.name for p in (tmp_path / "results").iterdir()] == ["some-cpu-2-cores-avx2.json"]
    assert (tmp_path / "RESULTS.md").read_text() == report.report([result()])
    new.write_text('{"benchmarks": []}')
    with pytest.raises(SystemExit, match=r"new\.json: not a result"):
        report.main([str(new)])
