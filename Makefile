# luthier: every command a developer or a newcomer types. Each sets up what it needs in .venv.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.ready
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export LUTHIER_DEMO_BEGAN := $(shell date +%s)

.PHONY: help setup demo check test quick test-postgres clean
help:            ## list these commands
	@grep -E '^[a-z-]+: .*##' $(MAKEFILE_LIST) | sed -E 's/: .*## /\t/' | expand -t 18

setup: $(STAMP)  ## make .venv with everything pinned in constraints.txt

# torch first and alone: this version has a small CPU build; a newer one would bring gigabytes of CUDA.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet torch==2.13.0 -c constraints.txt
	$(BIN)/pip install --quiet -e '.[dev,postgres]' -c constraints.txt
	touch $@

demo: $(STAMP)   ## train, gate, promote, serve and roll back the prompt-injection guard
	$(BIN)/python examples/demo.py

check: $(STAMP)  ## what one runs all day: lint, types, import rules, house tests (seconds)
	$(BIN)/ruff check src tests examples
	$(BIN)/ruff format --check src tests examples
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m pytest tests/house

test: check      ## everything CI runs
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests --ignore=tests/house --numprocesses 2 --dist loadscope

quick: $(STAMP)  ## the tests that take seconds
	$(BIN)/python -m pytest tests -m 'not slow' -x

test-postgres: $(STAMP) ## the store's tests on a real PostgreSQL 15, started on loopback
	$(BIN)/python -m tests.postgres -- tests/test_store.py tests/faults/test_store_faults.py

clean:           ## remove what setup and tests made; the home folder stays
	rm -rf $(VENV) build dist src/*.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
