# `make` prints what there is. Every target makes its own virtual environment first; nothing else has to be installed.
PYTHON ?= python3
RANKS  ?= 2
CONFIG ?= configs/mini.json
ARGS   ?=
SCALE  ?= 0.1
PY     := .venv/bin/python

# Small tensors are allocated and freed all the time on a CPU: keep the memory instead of handing it back.
export MALLOC_MMAP_THRESHOLD_ = 1073741824
export MALLOC_TRIM_THRESHOLD_ = 1073741824
export MALLOC_TOP_PAD_        = 67108864
export OMP_NUM_THREADS       ?= 1
export OMP_WAIT_POLICY        = passive
export TOKENIZERS_PARALLELISM = false

.PHONY: help setup data train report masa test test-all lint bench gpu-check engine-check sweep mini-model study rehearsal \
  clean clean-runs
help:            ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-12s %s\n", $$1, $$2}' Makefile
	@echo 'options: RANKS=4 (processes), CONFIG=configs/mini.json, ARGS="--lr 3e-4" (any flag of mralign.py --help)'

setup: .venv/ready  ## make .venv and install the pinned requirements
.venv/ready: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: $(PYTHON) is older than 3.11; say which to use with make PYTHON=python3.12"; exit 3; }
	$(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch .venv/ready
.venv/ready-test: .venv/ready requirements-test.txt
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements-test.txt
	@touch .venv/ready-test

.venv/ready-bench: .venv/ready requirements-bench.txt
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements-bench.txt
	@touch .venv/ready-bench

.venv/ready-data: .venv/ready requirements-data.txt
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements-data.txt
	@touch .venv/ready-data

data: .venv/ready-data  ## fetch the data sets that CONFIG names and that are not there yet
	$(PY) -m tools.fetch --for $(CONFIG)

train: .venv/ready  ## the whole pipeline: sample, label, fit, train, evaluate, report (the miniature by default)
	$(PY) -m tools.torchrun --standalone --local-addr=127.0.0.1 --nproc_per_node=$(RANKS) mralign.py --config $(CONFIG) --resume $(ARGS)

report: .venv/ready  ## every table and figure of the paper on the miniature, with its ablations over three seeds
	$(PY) -m tools.torchrun --standalone --local-addr=127.0.0.1 --nproc_per_node=$(RANKS) mralign.py --config configs/mini-report.json --resume $(ARGS)
	$(PY) -m tools.sweep configs/mini-ablations.json --jobs $(RANKS)

# A file's tests stay together (they share fixtures), large files first (tests/conftest.py). No plugin but xdist: pytest
# rewrites the asserts of all that comes with a plugin, a hundred modules of hypothesis, in every worker.
PYTEST := $(PY) -m pytest -q tests -n 2 --dist loadfile --no-loadscope-reorder --disable-plugin-autoload -p xdist.plugin

test: .venv/ready-test  ## the tests: every part, in a few minutes
	$(PYTEST) -m "not long"

test-all: .venv/ready-test  ## all tests: also what is long (soaks, whole pipelines on several processes, the rehearsal)
	$(PYTEST)

lint: .venv/ready-test  ## style, formatting, and types of the method and the kernels
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

bench: .venv/ready-bench  ## each part beside what one would run instead (six minutes; ARGS=--full: half an hour)
	$(PY) -m tools.bench $(ARGS)

gpu-check:       ## on one CUDA GPU: is the GPU path right, how fast is it (nine minutes, no network, no .venv needed)
	$(if $(wildcard $(PY)),$(PY),$(PYTHON)) -m tools.gpu_check $(ARGS)

engine-check: .venv/ready  ## against a real vLLM on the CPU, in an environment of its own (half an hour, not in CI)
	$(PY) -m tools.engine_check $(ARGS)

sweep: .venv/ready  ## the ablations of Tables 3 and 4 on GPUs (RANKS of them), into one table
	$(PY) -m tools.sweep configs/ablations.json --gpus $(RANKS) $(ARGS)

masa: .venv/ready  ## MASA on a miniature: GRPO and DAPO with and without metas, three seeds, a table and a figure
	$(PY) -m mini.masa_study

mini-model: .venv/ready  ## rebuild the miniature's base model from its facts (about ten minutes)
	$(PY) -m mini.build --world 0 --out mini/model

study: .venv/ready  ## the miniature over several worlds and seeds with controls (about two hours on two cores, resumable)
	$(PY) -m mini.study
	$(PY) -m mini.distance

rehearsal: .venv/ready  ## the paper's run without GPU or key, at a tenth of its size (SCALE=1: all of it)
	$(PY) -m mini.rehearsal --scale $(SCALE) --page docs/results/rehearsal.md

clean:           ## remove the virtual environment and what builds leave; runs stay
	rm -rf build .venv .pytest_cache .ruff_cache .mypy_cache .hypothesis

clean-runs:      ## remove runs/ after asking: adapters, samples and replies that were paid for are there
	@printf 'remove runs/ with all adapters, samples and paid replies? [y/N] '; read answer; [ "$$answer" = y ] && rm -rf runs
