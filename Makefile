# `make train` and `make test` each set up what they need in .venv and run.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TORCH := torch==2.13.0
CONFIG ?= configs/laptop.yaml
PROCESSES ?= 2
# Tests run side by side, a file in one of these; in the folders' order, which has the long ones first.
WORKERS ?= 2
# One thread a process: two processes share two cores, and sums come out the same every time.
export OMP_NUM_THREADS ?= 1

.PHONY: train test lint clean

train: $(VENV)/.ready
	$(BIN)/torchrun --nproc-per-node $(PROCESSES) -m pretrain train $(CONFIG) $(ARGS)

test: $(VENV)/.ready lint
	$(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder $(ARGS)

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# torch comes first and by its exact version: a range may pull gigabytes of another build.
$(VENV)/.ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet $(TORCH)
	$(BIN)/pip install --quiet --editable ".[pretrain,test]"
	touch $@

clean:
	rm -rf $(VENV) .cache runs
