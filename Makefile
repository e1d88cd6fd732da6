# Every target makes .venv and installs what it needs by itself; a second run reinstalls nothing.
#
# LIGHTNING_INT8_PYTHON=/path/to/python (or PYTHON=...) uses that interpreter as it is instead: nothing is created or
# installed, no network is needed. For machines that come with PyTorch and Lightning.

VENV := .venv
BASE_PYTHON ?= python3
CHOSEN := $(or $(LIGHTNING_INT8_PYTHON),$(PYTHON))

ifeq ($(CHOSEN),)
RUN := $(VENV)/bin/python
READY := $(VENV)/.installed
else
RUN := $(CHOSEN)
READY := lightning_int8/kernels
endif

# What `make train` takes; each is optional.
TRAIN_ARGS := $(if $(RECIPE),--recipe $(RECIPE)) $(if $(CONFIG),--config $(CONFIG)) $(if $(STEPS),--steps $(STEPS)) \
	$(if $(SEED),--seed $(SEED)) $(ARGS)
WORKERS ?= 2
# Most of a GPU test's time is compiling kernels, which workers do side by side.
GPU_WORKERS ?= 6

BENCH_MODELS := benchmarks.models:llama_1b benchmarks.models:llama_8b_6layers

.DEFAULT_GOAL := help
.PHONY: help setup train test lint format gpu-test bench clean

help: ## Show the targets
	@echo "make setup              make .venv and install everything, with the tested versions"
	@echo "make train              train in full precision and in INT8, compare, write runs/latest"
	@echo "     RECIPE=block       row | block | jetfire | rowwise | llm_int8; default: the config's, row in ours"
	@echo "     CONFIG=file.yaml   default: examples/configs/tiny.yaml, with a GPU 125m.yaml"
	@echo "     STEPS=n SEED=n     optimizer steps and seed;  ARGS='...' any other argument"
	@echo "make test               all tests but the GPU's, with line coverage;  ARGS='-k name'"
	@echo "make lint               ruff (lint and format) and mypy"
	@echo "make format             let ruff fix and format"
	@echo "make gpu-test           the tests that need a GPU; writes docs/results/<date>-<gpu>-gpu-tests.md"
	@echo "make bench              measure on this GPU, INT8 against BF16 and FP8; writes docs/results and README's table"
	@echo "     CONFIG=file.yaml   your model in place of the Llamas;  ARGS='...' as of lightning-int8-bench"
	@echo "make clean              remove what the tools wrote (not .venv, not runs/)"
	@echo "PYTHON=python3          in front of any target: use that interpreter as it is, install nothing"

setup: $(READY) ## Make the environment

# The file is written last, so that an interrupted install is taken up again.
$(VENV)/.installed: pyproject.toml constraints.txt
	@$(BASE_PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "Python 3.10 or newer is needed; name one: make setup BASE_PYTHON=python3.12"; exit 1; }
	@$(VENV)/bin/python -m pip --version >/dev/null 2>&1 || $(BASE_PYTHON) -m venv --clear $(VENV)
	@# The pinned versions need Python 3.11; on 3.10 pip chooses within pyproject.toml's ranges.
	$(VENV)/bin/python -m pip install --disable-pip-version-check -e '.[dev]' \
		$$($(VENV)/bin/python -c 'import sys; print("-c constraints.txt" if sys.version_info >= (3, 11) else "")')
	@touch $@

# An interpreter used as it is has no installed package that maps kernels/ into lightning_int8, and mypy does not read
# that mapping: both find it through this link.
lightning_int8/kernels:
	@ln -sfn ../kernels $@

# Threads that wait by spinning make a step ten times as slow when anything else uses a core; sleeping costs nothing.
train: $(READY) ## Train twice and compare
	OMP_WAIT_POLICY=PASSIVE $(RUN) -m examples.compare $(TRAIN_ARGS)

# One thread a worker: on two cores the workers would otherwise compete for them.
test: $(READY) ## Test with coverage
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(RUN) -m pytest -n $(WORKERS) --dist worksteal -m "not gpu" \
		--cov --cov-report=term --cov-report=xml:build/coverage.xml --durations=10 $(ARGS)

gpu-test: $(READY) ## Test on a GPU
	$(RUN) -m pytest -m gpu -n $(GPU_WORKERS) --dist loadgroup --durations=10 $(ARGS)

bench: $(READY) ## Measure on a GPU
	$(RUN) -m lightning_int8.bench --config $(or $(CONFIG),$(BENCH_MODELS)) --seconds 180 --output docs/results $(ARGS)
	$(if $(CONFIG),,$(RUN) -m benchmarks.readme $$(ls -t docs/results/*-bench.json | head -1))

lint: $(READY) lightning_int8/kernels ## Lint, check formatting and types
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy lightning_int8 examples

format: $(READY) ## Fix and format
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

clean: ## Remove caches and build products
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis .coverage* lightning_int8/kernels
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +
