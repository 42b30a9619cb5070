# Every target sets itself up from a bare clone with only Python >= 3.11, and works when run again.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OUT := build
# A GPU build: make venv EXTRAS=test,cuda13,triton
EXTRAS ?= test
REPLAY_REQUESTS ?= 3000
REPLAY_ARGS ?= --device-tokens 100000
PYTEST_ARGS ?= -n 2 --dist worksteal
PIP := $(BIN)/python -m pip --disable-pip-version-check
INSTALL := $(PIP) install --quiet -c constraints.txt -e
SOURCES := pyproject.toml constraints.txt

.PHONY: help venv test replay lint format bench extras clean

help:  ## what there is
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*##/\t/' | expand -t 10

venv: $(VENV)/.installed-test  ## .venv with everything the tests need

test: $(VENV)/.installed-test  ## the whole suite, on the CPU
	JAX_PLATFORMS=cpu $(BIN)/python -m pytest $(PYTEST_ARGS)

replay: $(VENV)/.installed-cli  ## a generated chat trace through the real stack, every hit proven right
	@mkdir -p $(OUT)
	$(BIN)/python -m jaxcache trace --requests $(REPLAY_REQUESTS) --out $(OUT)/chat.jsonl
	$(BIN)/python -m jaxcache replay $(OUT)/chat.jsonl --json $(OUT)/replay.json --report $(OUT)/replay.html $(REPLAY_ARGS)

lint: $(VENV)/.installed-dev  ## ruff and pyright
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m pyright --pythonpath $(BIN)/python

format: $(VENV)/.installed-dev  ## what lint asks for, where it can be done for you
	$(BIN)/python -m ruff check --fix .
	$(BIN)/python -m ruff format .

bench: $(VENV)/.installed-test  ## the device benchmark, small, on whatever device there is
	$(BIN)/python -m benchmarks.device --small

extras: $(BIN)/python  ## do cuda12 and cuda13 resolve? installs nothing
	$(BIN)/python .ci/resolve_extras.py

clean:  ## forget the environment and what the targets wrote
	rm -rf $(VENV) $(OUT)

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

$(VENV)/.installed-dev: $(SOURCES) | $(BIN)/python
	$(INSTALL) '.[dev]'
	@touch $@
