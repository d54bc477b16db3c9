# memtier: `make help` lists the targets. Everything a target needs, it installs (as root on Debian and Ubuntu).
SHELL := /bin/bash
.ONESHELL:
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= $(shell tools/find-python)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.stamp
UV_VERSION := 0.9.30
SOURCES := packages tests tools deploy/image
export UV_PROJECT_ENVIRONMENT := $(CURDIR)/$(VENV)
export UV_LINK_MODE := copy

.PHONY: help setup fmt check test e2e soak storm demo bench bench-saving vm proto chart-readme bpf images clean

help:  ## List the targets
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z0-9-]+):.*## /\1\t/' | expand -t 12

$(STAMP): pyproject.toml uv.lock $(wildcard packages/*/pyproject.toml) tools/bootstrap
	@PYTHON="$(PYTHON)" UV_VERSION=$(UV_VERSION) tools/bootstrap $(VENV)
	touch $@

setup: $(STAMP)  ## Make .venv with the three packages and the development tools

fmt: $(STAMP)  ## Format the code and sort the imports
	$(BIN)/ruff format $(SOURCES)
	$(BIN)/ruff check --fix $(SOURCES)

check: $(STAMP)  ## ruff, mypy --strict, import contracts, spelling, generated code, chart README and BPF object fresh
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/mypy packages/*/src tests tools deploy/image
	$(BIN)/lint-imports
	$(BIN)/codespell
	$(BIN)/python tools/gen_proto.py --check
	$(BIN)/python tools/gen_chart_readme.py --check
	$(BIN)/python -m memtier_engine.trackers.bpf.build --check

test: $(STAMP)  ## Run all tests that need no virtual machine
	@tools/test-tools
	$(BIN)/pytest -n 2 --durations=10 $(PYTEST_ARGS)

e2e: $(STAMP)  ## Run the end-to-end tests in the test VM (built on first use)
	$(BIN)/pytest --durations=10 tests/e2e $(PYTEST_ARGS)

SOAK_MINUTES ?= 60

soak: $(STAMP)  ## An hour of churn under nri-memtierd: memory flat, nothing left behind (root; SOAK_MINUTES=60)
	PYTHONPATH=tests $(BIN)/python -m soak $(SOAK_MINUTES)

STORM_MINUTES ?= 30
STORM_SEED ?=

storm: $(STAMP)  ## Restarts, upgrades, full volumes at random over a node in the test VM (STORM_MINUTES=30 STORM_SEED=1)
	tests/vm/run --smp 1 --nodes '2048:0 512:' --timeout $$(($(STORM_MINUTES) * 60 + 1200)) -- env PYTHONPATH=/host/tests PYTHONDONTWRITEBYTECODE=1 \
	    python3 -u tests/e2e/guest/nri_storm.py $(STORM_MINUTES) $(STORM_SEED)

demo: $(STAMP)  ## Page out the idle memory of a real process and show it (root)
	$(BIN)/memtier demo $(DEMO_ARGS)

bench: $(STAMP)  ## Benchmarks: each line is a ratio against something else in the same run
	PYTHONPATH=tests $(BIN)/python -m bench $(BENCH_ARGS)

bench-saving: $(STAMP)  ## Memory saved and its price, on real programs, here and in the VM, as a table and drawings (root)
	$(BIN)/uv sync --frozen --inexact -q --group bench
	PYTHONPATH=tests $(BIN)/python -m bench.saving $(SAVING_ARGS)

vm: $(STAMP)  ## Open a shell in the test VM
	tests/vm/run --shell

proto: $(STAMP)  ## Generate the protobuf modules from proto/
	$(BIN)/python tools/gen_proto.py

chart-readme: $(STAMP)  ## Make the table of values in the Helm chart's README from values.yaml
	$(BIN)/python tools/gen_chart_readme.py

bpf: $(STAMP)  ## Compile the BPF object from its C source, if that changed (clang)
	@$(BIN)/python -m memtier_engine.trackers.bpf.build --check 2>/dev/null && exit 0
	command -v clang >/dev/null || { [ "$$(id -u)" = 0 ] && apt-get install -y --no-install-recommends clang llvm; }
	$(BIN)/python -m memtier_engine.trackers.bpf.build

IMAGE_VERSION ?= devel
IMAGE_NAME ?= localhost/memtier/nri-memtierd

IMAGE_VARIANT ?= slim

images: $(STAMP)  ## Build the container image and its manifests into build/images (IMAGE_VERSION=devel IMAGE_VARIANT=bcc)
	deploy/image/build.py --name $(IMAGE_NAME) --version $(IMAGE_VERSION) --variant $(IMAGE_VARIANT) $(IMAGE_ARGS)
	$(BIN)/python deploy/image/manifests.py --out build/images \
		--image $(IMAGE_NAME):$(IMAGE_VERSION)$(patsubst %,-%,$(filter-out slim,$(IMAGE_VARIANT)))

clean:  ## Remove what the other targets made in this folder
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
