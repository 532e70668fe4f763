# `make demo` and `make test` work on a bare machine with Python >= 3.11: the environment is made when there is none.
#   PYTHON=python3.12  interpreter for a new environment      EXTRA=cuda13  accelerator extra (pyproject.toml)
#   ARGS=...           more arguments for demo or pytest      WORKERS=2     test processes

VENV ?= .venv
PYTHON ?=
EXTRA ?=
ARGS ?=
WORKERS ?= auto
RUN := $(VENV)/bin/python
SOURCES := pyproject.toml $(wildcard constraints/*.txt) .ci/install

# First-touch page faults of large temporaries cost a third of a step on a CPU; glibc can be told to keep its memory.
KEEP_MEMORY := MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=100000000000 MALLOC_TOP_PAD_=268435456
DEMO_ENVIRONMENT := $(if $(filter Linux,$(shell uname -s)),$(if $(shell command -v nvidia-smi 2>/dev/null),,$(KEEP_MEMORY)))

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow lint format constraints clean

help:
	@echo "make demo         train the demo on this machine and draw samples (runs/demo)"
	@echo "make test         everything a change must pass: lint, types, import rules, tests"
	@echo "make test-slow    the longer checks as well (kills, bit flips, random cuts)"
	@echo "make lint         lint, types and import rules only"
	@echo "make format       let ruff rewrite what it can"
	@echo "make constraints  renew the pinned versions in constraints/"
	@echo "make clean        remove the environment and caches; runs/ stays"

demo: $(VENV)/.installed-run
	$(DEMO_ENVIRONMENT) $(RUN) -m ear_jax.main --config=configs/lite_hybrid.py --workdir=runs/demo $(ARGS)

test: lint
	$(RUN) -m pytest -n $(WORKERS) --maxprocesses=4 --dist=loadfile -m "not slow" $(ARGS)

test-slow: lint
	$(RUN) -m pytest $(ARGS)

lint: $(VENV)/.installed-dev
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m basedpyright --pythonpath $(RUN)
	$(VENV)/bin/lint-imports

format: $(VENV)/.installed-dev
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

constraints:
	@for version in 3.11 3.12; do \
	    file=constraints/py$$(echo $$version | tr -d .).txt; \
	    { head -n 2 $$file; uv pip compile --quiet --upgrade --no-header --no-annotate --no-emit-index-url \
	        --no-emit-find-links --extra dev --python-version $$version pyproject.toml; } > $$file.new \
	    && mv $$file.new $$file || exit 1; \
	done

$(VENV)/.installed-dev: $(SOURCES)
	@VENV=$(VENV) PYTHON="$(PYTHON)" sh .ci/install dev $(EXTRA)

# What the tests need includes what the demo needs.
$(VENV)/.installed-run: $(SOURCES)
	@if [ -n "$$(find $(VENV)/.installed-dev -newer pyproject.toml 2>/dev/null)" ] && [ -z "$(EXTRA)" ]; then \
	    $(MAKE) --no-print-directory $(VENV)/.installed-dev && touch $@; \
	else VENV=$(VENV) PYTHON="$(PYTHON)" sh .ci/install run $(EXTRA); fi

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .import_linter_cache build dist
	find . -name __pycache__ -type d -not -path "./runs/*" -prune -exec rm -rf {} +
