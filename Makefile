# make quickstart    sets up this machine, then runs the method on a real small model: 2 CPU ranks, or every GPU
# make doctor        says what is wrong with this machine
# make test          sets up, then passes the tests; make test-fast those without ranks, make test-slow those of minutes
# make qwen          fetches a second real model (0.5 GB), for the tests that are marked data
# make test-cluster  passes those on two emulated hosts with a real SLURM: needs root, installs SLURM and pdsh by apt-get;
#                    make test-cluster-slow those of them that take minutes
PYTHON ?= python3
VENV ?= .venv
RUN_DIR ?= runs/quickstart
NUM_TEST_WORKERS ?= 2
CLUSTER_SECONDS ?= 1200

# Without a GPU: two gloo ranks of one thread each, and nothing to look for.
HAS_GPU := $(shell nvidia-smi -L 2>/dev/null | grep -c GPU)
ifeq ($(HAS_GPU),0)
  ON_CPU := DS_ACCELERATOR=cpu OMP_NUM_THREADS=1
  RANKS := --num_accelerators 2
endif
IN_VENV := PATH="$$(cd "$(VENV)" && pwd)/bin:$$PATH" TOKENIZERS_PARALLELISM=false
PYTEST := $(IN_VENV) DS_ACCELERATOR=cpu OMP_NUM_THREADS=1 python -m pytest

.PHONY: install doctor quickstart test test-fast test-slow qwen test-cluster test-cluster-slow lint

install:
	@$(PYTHON) launchers/install.py --venv "$(VENV)"

# Looks for what is wrong with this machine; also where the set-up failed.
doctor:
	@$(PYTHON) launchers/install.py --venv "$(VENV)" --check; code=$$?; \
	if [ ! -f "$(VENV)/.installed" ]; then echo "the packages are not installed yet: make install"; exit $$code; fi; \
	$(IN_VENV) $(ON_CPU) python launchers/doctor.py --config configs/quickstart.yaml && exit $$code

quickstart: install
	@$(IN_VENV) $(ON_CPU) deepspeed --quiet $(RANKS) launchers/spd.py --config configs/quickstart.yaml run_dir="$(RUN_DIR)"

test: install
	@$(PYTEST) -n $(NUM_TEST_WORKERS) --dist worksteal --durations=15 -m "not slow and not cluster and not gpu"

test-fast: install
	@$(PYTEST) -n $(NUM_TEST_WORKERS) --dist worksteal -m "not slow and not cluster and not gpu" tests/unit tests/test_architecture.py

test-slow: install
	@$(PYTEST) -m "slow and not cluster and not gpu"

qwen: install
	@$(IN_VENV) python tests/fetch_qwen.py

# After CLUSTER_SECONDS, three times what it takes on a quiet machine, it is interrupted, and takes the hosts down.
test-cluster: CASES := cluster and not slow
test-cluster-slow: CASES := cluster and slow
test-cluster test-cluster-slow: install
	tests/cluster/install.sh
	$(IN_VENV) DS_ACCELERATOR=cpu OMP_NUM_THREADS=1 timeout --signal=INT --kill-after=60 $(CLUSTER_SECONDS) \
	  python -m pytest -m "$(CASES)" --durations=20 --durations-min=5 tests/cluster

lint: install
	$(IN_VENV) ruff check .
	$(IN_VENV) ruff format --check .
