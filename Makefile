# Two commands on a fresh machine: `make demo` and `make test`. Both set up .venv themselves.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
DEVSTAMP := $(VENV)/.installed-dev
# Without the C that is made of the .pyx: the second of two installs makes it anew, and the next command would begin from the start.
KERNEL_SOURCES := $(filter-out $(patsubst %.pyx,%.c,$(wildcard ext/*.pyx)),$(wildcard ext/*.pyx ext/*.c ext/*.h ext/*.pxi))

.PHONY: setup setup-dev demo cluster test lint bench chaos clean

setup: $(STAMP)
setup-dev: $(DEVSTAMP)

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# torch comes first and from the constraints alone, so that no other package asks for a larger build of it.
$(STAMP): pyproject.toml setup.py constraints.txt $(KERNEL_SOURCES) | $(VENV)/bin/python
	@echo "Setting up $(VENV): the first time takes a few minutes"
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --constraint constraints.txt --editable .
	@touch $@

$(DEVSTAMP): $(STAMP)
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: $(STAMP)
	$(BIN)/kimera-stream demo

# Two edges, two engines, PostgreSQL and Redis (apt-get install postgresql redis-server), in the foreground; see docs/cluster.md.
# make cluster CLUSTER="--light --port 0"
cluster: $(STAMP)
	$(BIN)/python -m deploy.local_cluster $(CLUSTER)

test: $(DEVSTAMP)
	$(BIN)/python -m pytest

lint: $(DEVSTAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# The micro-benchmarks, then the kernel against the limit and its peers, which takes minutes; the other programs of bench/ are run by hand.
bench: $(DEVSTAMP)
	$(BIN)/python -m pytest bench --benchmark-only
	$(BIN)/python -m bench.kernel --json

# Faults against a deployment for MINUTES, checked from outside: see docs/oracle.md. DEPLOYMENT: sqlite, postgres or cluster.
MINUTES    ?= 30
DEPLOYMENT ?= sqlite
chaos: $(DEVSTAMP)
	$(BIN)/python -m tests.oracle --deployment $(DEPLOYMENT) --minutes $(MINUTES) $(if $(SEED),--seed $(SEED))

clean:
	rm -rf $(VENV) build dist *.egg-info kimera_stream/kernels/*.so
