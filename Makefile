# Every target sets up what it needs: a fresh clone needs nothing beyond make and Python 3.11.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo reproduce test test-fast install check bench mutation clean

demo: $(STAMP)  ## train on real patient data with and without curvature control
	$(BIN)/lowland compare --out lowland-results/compare

reproduce: $(STAMP)  ## a paper's study in small: networks to critical points, figures, claims
	$(BIN)/lowland reproduce hsr

# Two workers of one thread each: more threads would wait for each other. Tests of a file share
# their fixtures, so they stay together.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadscope

test: $(STAMP)
	$(PYTEST)

test-fast: $(STAMP)  ## the tests that take less than a few seconds
	$(PYTEST) -m "not slow"

install: $(STAMP)

check: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: $(STAMP)
	$(BIN)/python benchmarks/exact.py --keep
	$(BIN)/python benchmarks/deep.py --keep
	$(BIN)/python benchmarks/training.py --keep
	$(BIN)/python benchmarks/weakness.py --keep
	$(BIN)/python benchmarks/illusion.py --keep

mutation: $(STAMP)  ## break lines on purpose and see whether the tests notice
	$(BIN)/python benchmarks/mutation.py

# The stamp is written last: an interrupted set-up leaves none, and the next run starts afresh.
$(STAMP): pyproject.toml constraints.txt $(wildcard src/lowland/exact/csrc/*)
	rm -rf $(VENV)
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "lowland needs Python 3.11 or newer: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) build dist lowland-results .pytest_cache .mypy_cache .ruff_cache .hypothesis
