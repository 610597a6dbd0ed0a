# Every target sets up .venv by itself. PYTHON chooses the interpreter (3.11 or newer).
PYTHON ?= python3
BIN := .venv/bin

.PHONY: .venv demo test bench results lint

.venv: .venv/installed

.venv/installed: constraints.txt pyproject.toml setup.py CMakeLists.txt $(wildcard csrc/*.cpp csrc/*.h)
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -c constraints.txt -e ".[dev]"
	touch $@

demo: .venv
	$(BIN)/spa-fast demo --out runs/demo

test: .venv
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests

bench: .venv
	$(BIN)/python -m pytest bench --benchmark-only

# On a quiet machine: every benchmark, filed under bench/results/ and written up in bench/RESULTS.md.
results: .venv
	mkdir -p build
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest bench --benchmark-only -q --benchmark-json=build/bench.json
	$(BIN)/python bench/report.py build/bench.json

lint: .venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
