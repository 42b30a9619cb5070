# Every target sets itself up from a bare clone with only Python >= 3.11, and works when run again.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OUT := build
# A GPU build: make venv EXTRAS=test,cuda13,triton
EXTRAS ?= test
REPLAY_REQUESTS ?= 3000
REPLAY_ARGS ?= --device-tokens 100000
DEMO_ARGS ?=
PYTEST_ARGS ?= -n 2 --dist worksteal
PIP := $(BIN)/python -m pip --disable-pip-version-check
# The versions that the suite runs with; CONSTRAINTS= takes the newest ones.
CONSTRAINTS ?= -c constraints.txt
INSTALL := $(PIP) install --quiet $(CONSTRAINTS) -e
SOURCES := pyproject.toml constraints.txt
# The newest JAX, and XLA's compiler for GPUs: an environment of its own, with Python 3.12.
H200_VENV := .venv-h200
H200_PIP := $(H200_VENV)/bin/python -m pip --disable-pip-version-check
PYTHON312 ?=

.PHONY: help venv test slow mutants test-h200 integrations replay demo lint format docs dist bench extras clean

help:  ## what there is
	@grep -E '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*##/\t/' | expand -t 11

venv: $(VENV)/.installed-test  ## .venv with everything the tests need

test: $(VENV)/.installed-test  ## the whole suite, on the CPU
	JAX_PLATFORMS=cpu $(BIN)/python -m pytest $(PYTEST_ARGS) -m "not slow"

slow: $(VENV)/.installed-test  ## the tests that take minutes
	JAX_PLATFORMS=cpu $(BIN)/python -m pytest -m slow

mutants: $(VENV)/.installed-test  ## every planted bug, which the tests have to find; hours
	JAX_PLATFORMS=cpu $(BIN)/python -m tests.model.mutants --jobs 2

test-h200: $(H200_VENV)/.installed  ## compiled for H200s, and Mosaic GPU interpreted; needs no GPU, may skip nothing
	JAXCACHE_NO_SKIP=1 JAX_PLATFORMS=cpu $(H200_VENV)/bin/python -m pytest $(PYTEST_ARGS) -m "(h200 or mosaic) and not slow" tests

integrations: $(VENV)/.installed-test  ## engines of others on jaxcache, each in its own environment: minutes, and a download
	$(BIN)/python -m pytest -s integrations

replay: $(VENV)/.installed-cli  ## a generated chat trace through the real stack, every hit proven right
	@mkdir -p $(OUT)
	$(BIN)/python -m jaxcache trace --requests $(REPLAY_REQUESTS) --out $(OUT)/chat.jsonl
	$(BIN)/python -m jaxcache replay $(OUT)/chat.jsonl --json $(OUT)/replay.json --report $(OUT)/replay.html $(REPLAY_ARGS)

demo: $(VENV)/.installed-cli  ## chats with a small model, with the prefix cache and without: what it saves
	JAX_COMPILATION_CACHE_DIR=$(OUT)/compiled $(BIN)/python -m examples.engine.demo $(DEMO_ARGS)

lint: $(VENV)/.installed-dev  ## ruff and pyright
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m pyright --pythonpath $(BIN)/python

format: $(VENV)/.installed-dev  ## what lint asks for, where it can be done for you
	$(BIN)/python -m ruff check --fix .
	$(BIN)/python -m ruff format .

docs: $(VENV)/.installed-docs  ## the documentation, into build/site; a warning is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet --strict

dist: $(VENV)/.installed-dev  ## wheel and sdist, each installed and tried in an empty environment
	$(BIN)/python .ci/smoke_dist.py $(OUT)/dist

bench: $(VENV)/.installed-test  ## the device benchmark, small, on whatever device there is
	$(BIN)/python -m benchmarks.device --small

extras: $(BIN)/python  ## do cuda12 and cuda13 resolve, with triton? installs nothing
	$(BIN)/python .ci/resolve_extras.py

clean:  ## forget the environment and what the targets wrote
	rm -rf $(VENV) $(H200_VENV) $(OUT)

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "jaxcache needs Python >= 3.11; this is $$($(PYTHON) --version). Try: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --upgrade pip

$(VENV)/.installed-cli: $(SOURCES) | $(BIN)/python
	$(INSTALL) '.[cli,viz]'
	@touch $@

$(VENV)/.installed-test: $(SOURCES) | $(BIN)/python
	$(INSTALL) '.[$(EXTRAS)]'
	@touch $@

$(VENV)/.installed-docs: $(SOURCES) | $(BIN)/python
	$(INSTALL) '.[docs]'
	@touch $@

$(VENV)/.installed-dev: $(SOURCES) | $(BIN)/python
	$(INSTALL) '.[dev]'
	@touch $@

$(H200_VENV)/bin/python:
	@for python in $(or $(PYTHON312),python3.12 $(PYTHON) $$(ls -d $$HOME/.pyenv/versions/3.12.*/bin/python 2>/dev/null | sort -rV)); do \
	  if $$python -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))' 2>/dev/null; then exec $$python -m venv $(H200_VENV); fi; \
	done; echo "compiling for an H200 needs Python 3.12. Try: make test-h200 PYTHON312=/path/to/python3.12"; exit 1
	$(H200_PIP) install --quiet --upgrade pip

$(H200_VENV)/.installed: $(SOURCES) .ci/h200.txt | $(H200_VENV)/bin/python
	$(H200_PIP) install --quiet -c constraints.txt -e '.[test]'
	$(H200_PIP) install --quiet --no-deps -r .ci/h200.txt
	@touch $@
