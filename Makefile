# make demo   the first run: installs into .venv, trains a small hybrid on this interpreter's standard library
# make demo-full   goes on: fine-tuning, reinforcement learning, distillation, healing
# make test   style, types and the quick tests       make test-all   the slow ones too
# make bench  speed beside transformers on this CPU   make clean      forgets everything that was made
#
# PYTHON=python3.12 picks the interpreter of a new .venv; pip obeys its own PIP_* variables.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TESTS ?= tests

.PHONY: demo demo-full test test-all check bench clean

demo: $(VENV)/installed
	$(BIN)/trimaran demo

demo-full: $(VENV)/installed
	$(BIN)/trimaran demo --full

check: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Two processes of one thread each: that is what two cores hold.
test: check
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 $(TESTS)

test-all: check
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 -m "" $(TESTS)

bench: $(VENV)/installed-dev
	$(BIN)/python benchmarks/cpu.py --peers transformers --cases train,prefill,decode

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "make: $(PYTHON) is missing or older than Python 3.11; next: make PYTHON=/path/to/a/newer/python3"; exit 2; }
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
		echo "make: $(PYTHON) cannot make a virtual environment; next: install its venv package (python3-venv)"; exit 2; }

# The stamps are renewed when pyproject.toml or the kernels change, and only then.
SOURCES := pyproject.toml hatch_build.py $(wildcard src/trimaran/ops/kernels/*.h src/trimaran/ops/kernels/*.cpp)

$(VENV)/installed: $(SOURCES) | $(BIN)/python
	$(BIN)/python -m pip install -e .
	@touch $@

$(VENV)/installed-dev: $(SOURCES) | $(BIN)/python
	$(BIN)/python -m pip install -e '.[dev]'
	@touch $(VENV)/installed $@

clean:
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +
