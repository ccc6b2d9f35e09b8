# make run              set up, then run the notebook on made-up sample data (about a minute of training on a CPU)
# make run DATA=full    the same on Tiny ImageNet, found locally or downloaded; RECIPE=, EPOCHS=, CLASSES=, SEED=, RUN= override
# make test             set up, then run the tests
# make soak             every test of reliability in full (about six minutes), and its table
# make bench            benchmarks, a table and one JSON line each
# make gpu              the runs that need a GPU; stop it and it goes on
# make check            style, and that the committed notebook is its source's
# make compat           the fast tests with the versions that Colab has (PYTHON=python3.13, where there is one)
# make address REPOSITORY=https://github.com/NAME/PROJECT   where the code is published: into README, pyproject, notebook
# make publish RUN=runs/NAME   records of a finished run into results/, all tables anew; make tables: only these
# make notebook         run the committed notebook again, in place, on Tiny ImageNet

PYTHON ?= python3
DATA = sample
VENV := .venv
VENV_PYTHON := $(VENV)/bin/python
NOTEBOOK := notebooks/tiny_imagenet_resnet18.ipynb
NAME := $(basename $(notdir $(NOTEBOOK)))
# Plain text everywhere, also where the machine's own settings say otherwise.
export PYTHONUTF8 := 1
export NO_ALBUMENTATIONS_UPDATE := 1

# A line for each package: minutes without one look like a machine that hangs.
SHELL := /bin/bash
.SHELLFLAGS := -o pipefail -c
PHOTOGRAPH := 'import os, sklearn; print(os.path.join(sklearn.__path__[0], "datasets/images/china.jpg"))'
PIP_OPTIONS := --disable-pip-version-check --progress-bar off
PIP_LINES := { grep --line-buffered -E '^(Collecting|Installing|Building)' | cut -c -100 || true; }

# Only what stands on the command line counts: an environment variable EPOCHS may mean something else.
OVERRIDES := $(strip $(foreach name,RECIPE EPOCHS CLASSES SEED RUN,$(if $(filter command,$(firstword $(origin $(name)))),"$(name)=$($(name))")))
ifeq ($(DATA),full)
  # The figures of README and docs are replaced only by the run that they show.
  PARAMETERS := $(or $(OVERRIDES),FIGURES=images-A)
else ifeq ($(DATA),sample)
  PARAMETERS := RECIPE=smoke SOURCE=sample $(OVERRIDES)
else
  $(error DATA must be sample or full, not $(DATA))
endif

.PHONY: run test soak bench gpu check compat address notebook publish tables setup
.DEFAULT_GOAL := run

setup: $(VENV)/.done

# A checkout that was moved or copied along with its environment sets up again: the environment knows its old place.
ifneq ($(shell cat $(VENV)/.done 2>/dev/null),$(CURDIR))
$(VENV)/.done: moved
endif
.PHONY: moved
moved:

$(VENV)/.done: requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "tinylab needs Python 3.11 or newer: make PYTHON=python3.12"; exit 2; }
	@echo "setting up $(VENV): a few minutes, once"
	@$(VENV_PYTHON) -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	@$(VENV_PYTHON) -m pip install $(PIP_OPTIONS) -e ".[dev]" | $(PIP_LINES)
	@echo "$(CURDIR)" > $@

run: setup
	@$(VENV_PYTHON) notebooks/run.py runs/$(NAME)-$(DATA).ipynb --html $(PARAMETERS)
	@echo "the trained network in weights/ on a photograph by danielbuechele (CC BY 2.0, from scikit-learn):"
	@$(VENV)/bin/tinylab predict pretrained "$$($(VENV_PYTHON) -c $(PHOTOGRAPH))" --gradcam runs/photograph

# Two processes: each test computes on one thread, or waits for a process of its own.
test: setup
	@$(VENV_PYTHON) -m pytest -n 2 --dist loadfile

soak: setup
	@$(VENV_PYTHON) -m pytest -n 2 --dist loadfile tests/reliability --soak --table docs/reliability.md --timeout 1800

bench: setup
	@for script in benchmarks/bench_*.py; do echo "== $$script"; $(VENV_PYTHON) "$$script" || exit 1; done

gpu: setup
	@PYTHON=$(VENV_PYTHON) dev/gpu.sh

check: setup
	@$(VENV_PYTHON) -m ruff check
	@$(VENV_PYTHON) -m ruff format --check
	@$(VENV_PYTHON) -m pytest tests/test_layout.py tests/test_notebook.py -m "not slow"
	@! grep -q OWNER pyproject.toml || echo "note: where is this published? make address REPOSITORY=https://github.com/NAME/PROJECT"

address:
	@$(PYTHON) dev/address.py $(REPOSITORY)

notebook: setup
	@$(VENV_PYTHON) notebooks/run.py $(NOTEBOOK)

publish: setup
	@$(VENV_PYTHON) dev/publish.py $(RUN)

tables: setup
	@$(VENV_PYTHON) dev/publish.py

COMPAT := .venv-compat
compat: $(COMPAT)/.done
	@$(COMPAT)/bin/python -m pytest -m "not archive and not gpu and not slow"

$(COMPAT)/.done: requirements.txt pyproject.toml requirements-colab.txt
	@$(COMPAT)/bin/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(COMPAT)
	@$(COMPAT)/bin/python -m pip install $(PIP_OPTIONS) -c requirements-colab.txt -e ".[dev]" | $(PIP_LINES)
	@touch $@
