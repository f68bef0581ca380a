# leanvit needs Python 3.11 or newer and nothing else; every target makes the virtual environment it runs in.
#
#   make demo     the main job, end to end, on embedded data          make lint    ruff and mypy
#   make test     the tests (ARGS="-k name" passes options on)        make bench   the speed figures of the README
#   make venv     only the virtual environment                        make clean   removes caches and outputs

SHELL  := /bin/sh
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.made-from-pyproject
PYTHON ?= $(shell for python in python3 python python3.14 python3.13 python3.12 python3.11; do \
            $$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$python && break; done)
ARGS   ?=
DATA   ?=

.DEFAULT_GOAL := help
.PHONY: help demo test lint bench venv clean

help:
	@sed -n '/^#/!q; s/^# \{0,1\}//p' Makefile

demo: $(STAMP)
	$(BIN)/python -m leanvit demo $(ARGS)

# Several processes of one thread each: the models of the tests are too small for more.
test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses=auto --maxprocesses=4 --dist=worksteal $(ARGS)

lint: $(STAMP)
	$(BIN)/python -m ruff check .
	$(BIN)/python -m mypy

# The speed tables of docs/results. DATA=folder, of weights and photos (docs/measuring.md), adds all others: hours, but
# students that are trained already are not trained again.
bench: $(STAMP)
	$(BIN)/python benchmarks/speed.py $(ARGS)
	$(BIN)/python benchmarks/skipping.py
ifneq ($(DATA),)
	$(BIN)/python benchmarks/sparse_attention.py $(DATA)
	$(BIN)/python benchmarks/merging.py
	$(BIN)/python benchmarks/merging.py $(DATA)
	$(BIN)/python benchmarks/off_the_shelf.py $(DATA)
	$(BIN)/python benchmarks/sparse_patterns.py $(DATA)
	$(BIN)/python benchmarks/trained.py $(DATA)
	$(BIN)/python benchmarks/trained.py $(DATA) --img-size 224 --only "sparse half" "sparse quarter" "sparse, pruned" adavit castling
	$(BIN)/python benchmarks/precision.py $(DATA) --runs runs/trained
	$(BIN)/python benchmarks/growth.py
	$(BIN)/python benchmarks/growth.py --img-size 224 --batch-size 1 4 16 64 --output docs/results/growth_batch --plot docs/images/growth-batch.png
	$(BIN)/python benchmarks/pictures.py $(DATA)
endif

venv: $(STAMP)

# Out of date when pyproject.toml is newer; made anew when its Python is gone or the folder was moved.
$(STAMP): pyproject.toml
	@test -n "$(PYTHON)" || { echo "leanvit needs Python 3.11 or newer: install it, or say make PYTHON=/path/to/python3" >&2; exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || { echo "Making a virtual environment in $(VENV) ..."; $(PYTHON) -m venv --clear $(VENV); }
	@echo "Installing leanvit and what it needs into $(VENV) (PyTorch is large: minutes the first time) ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[dev]"
	@touch $@

clean:
	rm -rf build dist *.egg-info leanvit-demo .mypy_cache .pytest_cache .ruff_cache
	find leanvit tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
