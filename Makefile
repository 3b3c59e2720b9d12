# make install | quickstart | test | test-all | lint | types | constraints       (PYTHON=python3.12 make ... picks the Python)
#
# `test` holds every claim by a representative; `test-all` adds the tests marked exhaustive: all ZeRO stages, faults, kill
# points, architectures and recipes, offload (whose operators are compiled first) and the launchers. `pytest` alone runs all.
# `install` makes .venv if it is missing and installs the versions of constraints.txt; a stamp in .venv makes the second
# run cost nothing until pyproject.toml or constraints.txt changes.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# One pytest worker per core, at most 4: each holds torch and a model.
JOBS ?= $(shell n=$$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2); echo $$((n < 4 ? n : 4)))

# torch and DeepSpeed look for `ninja` and `deepspeed` on PATH.
export PATH := $(abspath $(BIN)):$(PATH)
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help install quickstart test test-all lint types constraints

help:
	@sed -n '1,/^$$/s/^# \?//p' Makefile

install: $(STAMP)

# torch first and alone, so that nothing else gets to choose its build.
$(STAMP): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "make: $(PYTHON) not found; install Python 3.10 or newer, or say PYTHON=/path/to/python make install" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "make: $$($(PYTHON) -V) is too old; install Python 3.10 or newer and say PYTHON=python3.12 make install" >&2; exit 1; }
	@command -v "$${CXX:-c++}" >/dev/null || { echo "make: no C++ compiler ($${CXX:-c++}), DeepSpeed compiles its CPU operators with it; install g++ (apt-get install g++) or set CXX" >&2; exit 1; }
	@$(PYTHON) -c 'import os, sysconfig; open(os.path.join(sysconfig.get_paths()["include"], "Python.h")).close()' 2>/dev/null || { echo "make: $(PYTHON) has no Python.h, DeepSpeed compiles against it; install it (apt-get install python3-dev)" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "make: $(PYTHON) cannot make virtual environments; install that (apt-get install python3-venv)" >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV), a few minutes the first time ..."
	@test -t 1 || quiet=-qq; set -x; \
	$(BIN)/python -m pip install $${quiet-} $$(grep '^torch==' constraints.txt) -c constraints.txt; \
	$(BIN)/python -m pip install $${quiet-} --editable '.[all,dev]' -c constraints.txt
	@touch $@

quickstart: install
	@$(BIN)/adapt quickstart $(ARGS)

# One thread per process: the workers, and the ranks that tests launch, share the cores.
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadgroup
test test-all: install
	@rm -f $(VENV)/torch_extensions/*/lock $(VENV)/torch_extensions/*/*/lock
	@$(PYTEST) $(if $(filter test,$@),-m 'not exhaustive') $(ARGS)

lint: install
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

# pyright does not follow setuptools' package-dir mapping, so the mapped names are linked where it looks.
types: install
	@mkdir -p $(VENV)/pyright
	@ln -sfn ../../eval $(VENV)/pyright/adapt_eval
	@ln -sfn ../../recipes $(VENV)/pyright/adapt_recipes
	@ln -sfn ../../launch $(VENV)/pyright/adapt_launch
	@$(BIN)/pyright adapt eval

# constraints.txt again: what .venv holds now (run the tests on it first), extended by uv to every Python that we
# support. torch brings its own CUDA packages in the versions that it pins, so they are left out.
constraints: install
	@$(BIN)/python -m pip install --quiet uv
	@$(BIN)/python -m pip freeze --exclude-editable --exclude uv | sed 's/+cpu$$//' > $(VENV)/constraints.txt
	@$(BIN)/uv pip compile --quiet --universal --python-version 3.10 --all-extras --no-annotate --no-header \
		pyproject.toml --output-file $(VENV)/constraints.txt
	@{ echo "# Written by \`make constraints\`: the versions that the tests ran on. Bounds are in pyproject.toml."; \
		grep -vE '^(nvidia-|cuda-|triton)' $(VENV)/constraints.txt; } > constraints.txt
	@touch $(STAMP)
