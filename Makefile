# Every target sets itself up: a virtual environment in .venv, made once, refreshed when the requirements change.
# Needs only make and Python 3.11+.   make PYTHON=python3.12 test   picks the interpreter.
# For torch's CPU wheel where the plain one would bring CUDA:
#   make demo PIP_FLAGS="--extra-index-url https://download.pytorch.org/whl/cpu"

PYTHON ?= python3
PIP_FLAGS ?=
PYTEST_FLAGS ?=

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install -c constraints.txt $(PIP_FLAGS)
REQUIREMENTS := pyproject.toml constraints.txt

export PIP_NO_INPUT := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: help demo test format lint types tests examples docs studies bench fmt clean

help:
	@echo 'make demo      draw a stability map and explain a spike on this machine: tables here, pages that open offline'
	@echo 'make test      the gate: format, lint, types, tests, examples, docs (what CI runs)'
	@echo 'make studies   rerun the recorded studies behind the claims'
	@echo 'make bench     measure speed against plain PyTorch loops'
	@echo 'make docs      build the documentation into build/docs'
	@echo 'make fmt       format the code and apply safe lint fixes'
	@echo 'make clean     remove .venv, build/ and caches'

demo: $(VENV)/.stamp-run
	$(BIN)/aftershock demo

test: format lint types tests examples docs
	@echo 'make test: all passed'

format: $(VENV)/.stamp-dev
	$(BIN)/ruff format --check .

lint: $(VENV)/.stamp-dev
	$(BIN)/ruff check .

types: $(VENV)/.stamp-dev
	$(BIN)/pyright --pythonpath $(BIN)/python

tests: $(VENV)/.stamp-dev
	$(BIN)/python -m pytest -q -n 2 $(PYTEST_FLAGS)

examples: $(VENV)/.stamp-dev
	$(BIN)/python -m pytest -q --doctest-modules src

docs: $(VENV)/.stamp-dev
	$(BIN)/python -m sphinx -q -W --keep-going -b html docs build/docs
	@echo 'open build/docs/index.html'

studies: $(VENV)/.stamp-run
	$(BIN)/aftershock claims --run all

bench: $(VENV)/.stamp-run
	$(BIN)/python -m benchmarks.run

fmt: $(VENV)/.stamp-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .hypothesis
	find src tests benchmarks docs -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

# A stamp is touched last, so an interrupted set-up is simply done again.
$(VENV)/.stamp-venv:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo 'aftershock needs Python 3.11 or newer, and "$(PYTHON)" is missing or older:' \
	    'install one and run make PYTHON=/path/to/python3'; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo '"$(PYTHON)" cannot make virtual environments: on Debian or Ubuntu run' \
	    '"apt-get install python3-venv" as root, elsewhere choose another one with make PYTHON=/path/to/python3'; exit 1; }
	@echo 'Setting up $(VENV): once, some minutes (torch is a large download).'
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.stamp-run: $(REQUIREMENTS) | $(VENV)/.stamp-venv
	$(PIP) -e '.[fit,plots]'
	@touch $@

$(VENV)/.stamp-dev: $(REQUIREMENTS) | $(VENV)/.stamp-venv
	$(PIP) -e '.[dev,docs]'
	@touch $(VENV)/.stamp-run $@
