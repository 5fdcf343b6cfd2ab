# Two commands matter: `make run` and `make test`. Everything is installed into .venv, nothing elsewhere.
# PYTHON=python3.12, HOST=, PORT=9000, GRPC_PORT=9001, JOBS=4, ARGS="-k words" may be given on the command line.

PYTHON ?= python3
HOST ?= 127.0.0.1
PORT ?= 8000
GRPC_PORT ?= 8001
ARGS ?=
# Processes that share the tests. Half of a test's time is waiting for others. 0: one, without helpers.
JOBS ?= 2

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
MARQO := 2.1.0 3.18.0 3.18.2
SOURCES := repository server tests examples grafana $(wildcard bench/*.py bench/peers/*.py)

# Hundreds of short processes import the same sources in a test run: they are compiled once.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help run test check clients schema pictures bench bench-peers format lock build clean

help:
	@echo "make run     install, serve examples/models on http://$(HOST):$(PORT), show what to try"
	@echo "make test    install, run the tests (ARGS=... goes to pytest)"
	@echo "make check   format, lint, types, floors, tests: what CI runs"
	@echo "make clients install the clients that some tests drive, each in its own place (-j3: at once)"
	@echo "make schema  install what compares grafana/ with Grafana's own types (needs npm)"
	@echo "make pictures draw docs/pictures anew, of a real run of four minutes (needs prometheus)"
	@echo "make bench   compare with limits and peers (ARGS=--quick: a first look; see bench/compare.py)"
	@echo "make format  rewrite the sources in the one format"
	@echo "make lock    resolve constraints.txt anew"
	@echo "make build   a wheel in dist/"
	@echo "make clean   remove .venv and everything else that is made"

# The stamps make a second call fast and independent of the network.
$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 11) or sys.exit("Model Depot needs Python 3.11 or newer; $(PYTHON) is %d.%d. Try: make PYTHON=python3.12 $(MAKECMDGOALS)" % v[:2])'
	@echo "making $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo "could not make $(VENV); on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }

$(VENV)/.runtime: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "installing the server (torch and onnxruntime are large: the first time takes minutes)"
	@$(PIP) install -c constraints.txt -e .
	@touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "installing the server and the development tools"
	@$(PIP) install --no-compile -c constraints.txt -e '.[dev]'  # most of it is never imported
	@touch $(VENV)/.runtime $@

run: $(VENV)/.runtime
	@$(BIN)/python examples/when_ready.py http://$(HOST):$(PORT) & \
	exec $(BIN)/modeldepot serve examples/models --trust-code --host $(HOST) --port $(PORT) --grpc-port $(GRPC_PORT) $(ARGS)

# A file's tests stay together, for what they share. Files begin in order: the long ones come first.
test: $(VENV)/.dev
	@$(BIN)/python -m pytest --numprocesses $(JOBS) --dist loadfile --no-loadscope-reorder $(ARGS)

check: $(VENV)/.dev
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	@$(MAKE) --no-print-directory test

# Marqo's clients of several years, which pin what they need: each has a place of its own in build/marqo.
# Tests that drive them skip without.
clients: $(MARQO:%=build/marqo/%/.installed)

build/marqo/%/.installed: | $(VENV)/bin/python
	@rm -rf $(@D) && mkdir -p build/marqo && $(BIN)/python -m venv --without-pip $(@D)
	@$(PIP) --python $(@D)/bin/python install --no-compile --only-binary :all: marqo==$*
	@touch $@

# Peers that cannot be installed are told and left out. ARGS=--no-peers: none are installed.
bench: $(if $(findstring --no-peers,$(ARGS)),$(VENV)/.dev,bench-peers)
	@$(BIN)/python -m bench.compare $(ARGS)

# Grafana's own types, and what compares the boards with them. Needs node; a test skips without.
schema: build/schema/.installed

build/schema/.installed:
	@mkdir -p $(@D) && npm install --silent --no-audit --no-fund --prefix $(@D) @grafana/schema@11.6.0 typescript@5.8.3
	@touch $@

bench-peers: $(VENV)/.dev
	@$(BIN)/python -m bench.environment || echo "bench/.venv could not be made: no peers" >&2

pictures: $(VENV)/.dev
	@$(BIN)/python -m grafana.picture docs/pictures

format: $(VENV)/.dev
	$(BIN)/ruff check --fix-only --select I $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

# torch first, so that a CPU wheel that pip was given (--find-links) is taken and kept.
lock:
	@rm -rf build/lock && mkdir -p build && $(PYTHON) -m venv build/lock
	build/lock/bin/python -m pip -q install "$$(grep '^torch==' constraints.txt)"
	build/lock/bin/python -m pip -q install -e '.[dev]' hatchling
	@grep '^#' constraints.txt > build/constraints.txt
	@build/lock/bin/python -m pip freeze --all --exclude pip --exclude modeldepot \
	  | sed -nE 's/^([A-Za-z0-9_.-]+==[^+ ]+).*/\1/p' | LC_ALL=C sort -f >> build/constraints.txt
	@mv build/constraints.txt constraints.txt && rm -rf build/lock
	@echo "constraints.txt: $$(grep -c == constraints.txt) packages"

build: $(VENV)/.dev
	@$(PIP) wheel --no-deps --wheel-dir dist .

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache bench/out bench/.venv
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
