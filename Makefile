# Targets for people and for continuous integration.  `make demo` and `make test` need nothing but git, make and Python.
BIN := .venv/bin
# Mounts want root.  What runs as root leaves no byte code in the tree of a user who isn't.
AS_ROOT := $(shell [ "$$(id -u)" -eq 0 ] || echo sudo) env PYTHONDONTWRITEBYTECODE=1
PYTEST_ARGS ?=

.PHONY: help setup demo test soak soak-processes soak-cases bench cuts lint format lock clean

help:
	@echo "make setup   Debian packages that are missing, and .venv with UKAI in it, compiled"
	@echo "make demo    three nodes on this machine: a disk moves while it is in use"
	@echo "make test    lint, types and all tests (PYTEST_ARGS='-k name' for some)"
	@echo "make soak    the simulator over many seeds (SEEDS=20000 FIRST=1)"
	@echo "make soak-processes   kills, cut cables, full disks … over real processes (MINUTES=30 SEED=1)"
	@echo "make bench   speed of a three-node cluster (BENCH_QUICK=1, BENCH_PEERS=1, BENCH_ARGS='--rows seq-read')"
	@echo "make cuts    power cuts under a real guest with SQLite on ext4 (CUTS=100)"
	@echo "make soak-cases       every step of each protocol, every cut: what make test has a sample of"
	@echo "make lint    ruff and mypy"
	@echo "make format  rewrites the sources as ruff wants them"
	@echo "make lock    newest versions into the lock files"
	@echo "make clean   removes what these targets made"

setup:
	@deploy/setup.sh

demo: setup
	@$(BIN)/python deploy/demo.py

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

test: lint
	$(AS_ROOT) UKAI_REQUIRE_FUSE=1 $(BIN)/python -m pytest $(PYTEST_ARGS)

SEEDS ?= 2000
FIRST ?= 1
soak: setup
	$(BIN)/python -m tests.sim.run $(FIRST) $(SEEDS)

MINUTES ?= 30
SEED ?=
soak-processes: setup
	$(AS_ROOT) $(BIN)/python -m tests.soak.run --minutes $(MINUTES) $(if $(SEED),--seed $(SEED))

BENCH_ARGS ?=
bench: setup
	@$(AS_ROOT) BENCH_PEERS=$(BENCH_PEERS) BENCH_QUICK=$(BENCH_QUICK) $(BIN)/python -m bench.run $(BENCH_ARGS)

CUTS ?= 100
cuts: setup
	$(AS_ROOT) $(BIN)/python -m tests.durability.cuts $(CUTS)

soak-cases: setup
	$(AS_ROOT) UKAI_REQUIRE_FUSE=1 UKAI_TEST_CASES=all $(BIN)/python -m pytest tests/processes/test_fault_points.py \
	    tests/processes/test_cuts.py tests/processes/test_links.py tests/processes/test_state_machine.py tests/processes/test_matrix.py \
	    tests/processes/test_disk_errors.py tests/metad/test_store.py tests/sim/test_disk_faults.py \
	    -o faulthandler_timeout=3600 $(PYTEST_ARGS)

format: setup
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .

lock: setup
	$(BIN)/python -m venv build/lock
	build/lock/bin/pip --quiet install pip-tools
	CUSTOM_COMPILE_COMMAND="make lock" build/lock/bin/pip-compile --quiet --upgrade --strip-extras --generate-hashes \
	    --no-emit-index-url --no-emit-find-links --extra dev --output-file requirements.lock pyproject.toml
	CUSTOM_COMPILE_COMMAND="make lock" build/lock/bin/pip-compile --quiet --upgrade --allow-unsafe --generate-hashes \
	    --no-emit-index-url --no-emit-find-links --output-file requirements-build.lock requirements-build.in

clean:
	$(AS_ROOT) rm -rf .venv build dist ukai.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find ukai tests deploy bench -name __pycache__ -type d -prune -exec rm -rf {} +
