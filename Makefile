# `make demo` and `make test` need Python 3.11 or 3.12 and do the rest themselves, in .venv.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

# Tests and demo start Python many times: compiling every module anew takes half of each start.
unexport PYTHONDONTWRITEBYTECODE

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
REQUIREMENTS := pyproject.toml constraints.txt
# 3.11 first: it is what constraints.txt was tested with. `make demo PYTHON=/path/to/python` overrides the search.
PYTHON ?=
CANDIDATES := $(or $(PYTHON),python3.11 python3.12 python3 python)

.PHONY: help demo test check lint types format track-env clean

help:
	@echo "make demo       install what the demo needs and run it into runs/demo"
	@echo "make test       install what the tests need and run them (CPU, no licensed data)"
	@echo "make check      lint, types and tests: what to run before a commit"
	@echo "make format     let ruff sort, fix and format"
	@echo "make track-env  optional: MediaPipe, a second landmark detector (--detector mediapipe), in .track-env"
	@echo "make clean      remove the environments, caches and builds; runs/ stays"

demo: $(VENV)/.stamp-demo
	$(BIN)/geodiff4d demo --out runs/demo

test: $(VENV)/.stamp-test
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder

check: lint types test

lint: $(VENV)/.stamp-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.stamp-dev
	$(BIN)/pyright

format: $(VENV)/.stamp-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

track-env: $(VENV)/.stamp-demo
	bash tools/make_track_env.sh

clean:
	rm -rf $(VENV) .track-env .pytest_cache .ruff_cache .hypothesis build dist src/*.egg-info
	find src tests tools -name __pycache__ -type d -prune -exec rm -rf {} +

# Each stamp is newer than what it was made from, or the installation runs again.
# A larger set includes the smaller ones, so `make demo` after `make test` installs nothing.
$(VENV)/.stamp-demo: $(REQUIREMENTS) | $(VENV)/.stamp-venv
	$(PIP) install --quiet --constraint constraints.txt --editable .
	@touch $@

$(VENV)/.stamp-test: $(REQUIREMENTS) | $(VENV)/.stamp-venv
	$(PIP) install --quiet --constraint constraints.txt --editable '.[test]'
	@touch $(VENV)/.stamp-demo $@

$(VENV)/.stamp-dev: $(REQUIREMENTS) | $(VENV)/.stamp-venv
	$(PIP) install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $(VENV)/.stamp-demo $(VENV)/.stamp-test $@


# An environment that is there and works is kept; one that was left half-made, or whose Python is gone, is made anew.
SUPPORTED := import sys, ensurepip, venv; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 13))
$(VENV)/.stamp-venv:
	@if $(BIN)/python -c '$(SUPPORTED)' 2>/dev/null && $(PIP) --version >/dev/null 2>&1; then touch $@; exit 0; fi; \
	for p in $(CANDIDATES); do \
	  if "$$p" -c '$(SUPPORTED)' 2>/dev/null; then \
	    echo "setting up $(VENV) with $$("$$p" --version)"; \
	    rm -rf $(VENV); "$$p" -m venv $(VENV); touch $@; exit 0; \
	  fi; \
	done; \
	echo "geodiff4d needs Python 3.11 or 3.12 with the venv module; tried $(CANDIDATES)." >&2; \
	echo "Install one (Debian, Ubuntu: apt install python3 python3-venv), or name it: make test PYTHON=/path/to/python3.12" >&2; \
	exit 1
