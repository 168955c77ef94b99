"""A corpus of a million prompts: its parts merged by one process, and read for training by eight.

Completions of 256 tokens to prompts of 200, drawn from a Zipf distribution over 49152 tokens, written as the parts of 8
workers. Merging is the stage's own, to the table on disk that more than 100,000 completions become; a reader opens it,
cuts sequences, holds some out, orders an epoch and makes its first micro-batch. Seconds are of the process (CPU), so
that others on the machine do not count; memory is what a process holds of its own, mapped pages of files left out.
`python benchmarks/corpus.py [--json FILE] [--sizes 10000 100000 1000000]`; 15 minutes on two CPU cores, 9 GB of disk.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import fork_server, parsed, parser, publish, received

from spd_dist.config import Finetune, Generate
from spd_dist.seeding import row_seed
from spd_dist.stages.finetune.batching import collate, global_batches
from spd_dist.stages.finetune.sequences import held_out, lengths_of, training_sequences
from spd_dist.stages.generate.corpus_requests import Requests
from spd_dist.stages.generate.merge_corpus import Attempt, merge
from spd_dist.storage import completions as corpora
from spd_dist.storage.tables import Table, write_table
from spd_dist.types import Completion, Prompt

NUM_WORKERS = 8
PROMPT_TOKENS, NEW_TOKENS, SEED = 200, 256, 0
TEXT = "Each egg costs 2 dollars, so she earns nine times two, or eighteen dollars a day. " * 13
"""About as many characters as 256 tokens have."""


def main() -> None:
    """Measure and publish."""
    options = parser(__doc__)
    options.add_argument("--sizes", type=int, nargs="+", default=[10_000, 100_000, 1_000_000], help="completions")
    options.add_argument("--folder", type=Path, help="where the corpus is made; a temporary folder otherwise")
    options = parsed(options, sizes=[200, 1600])
    context = fork_server("spd_dist.stages.finetune.batching", "spd_dist.stages.generate.merge_corpus")
    rows = [measured(size, options, context) for size in options.sizes]
    last = rows[-1]
    ratios = {
        "merge_seconds_per_million": last["merge_seconds"] / last["completions"] * 1e6,
        "merge_peak_gib": last["merge_peak_gib"],
        "reader_seconds_per_million": last["reader_seconds"] / last["completions"] * 1e6,
        "reader_peak_gib": last["reader_peak_gib"],
        "exponent": max(slope(rows, "merge_seconds"), slope(rows, "reader_seconds")),
    }
    publish("corpus, 200 + 256 tokens a completion", ratios=ratios, rows=rows, json_path=options.json)


def slope(rows: list[dict[str, Any]], name: str) -> float:
    """The exponent of a power of the corpus's size that fits best."""
    sizes = np.log([row["completions"] for row in rows])
    return float(np.polyfit(sizes, np.log([max(row[name], 1e-3) for row in rows]), 1)[0])


def measured(size: int, options: argparse.Namespace, context: ForkServerContext) -> dict[str, Any]:
    """A corpus of one size, made, merged and read."""
    folder = Path(tempfile.mkdtemp(prefix="spd-corpus-", dir=options.folder))
    try:
        together(context, [(make_part, folder, size, worker) for worker in range(NUM_WORKERS)])
        [(merge_seconds, merge_wall, merge_peak)] = together(context, [(merge_all, folder, size, 0)])
        readers = together(context, [(read_all, folder, size, rank) for rank in range(NUM_WORKERS)])
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return {
        "completions": size,
        "merge_seconds": merge_seconds,
        "merge_wall_seconds": merge_wall,
        "merge_peak_gib": merge_peak,
        "reader_seconds": max(seconds for seconds, *_ in readers),
        "reader_wall_seconds": max(wall for _, wall, _ in readers),
        "reader_peak_gib": max(peak for *_, peak in readers),
    }


def together(context: ForkServerContext, calls: list[tuple[Any, ...]]) -> list[Any]:
    """What each call gives, each in a process of its own, all at once."""
    started = []
    for call in calls:
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=in_child, args=(sender, *call))
        process.start()
        sender.close()
        started.append((receiver, process, call[0].__name__))
    found = [received(*one) for one in started]
    for _, process, _ in started:
        process.join()
    return found


def in_child(sender: Any, work: Callable[[Path, int, int], None], folder: Path, size: int, index: int) -> None:
    """CPU seconds, wall seconds, and the most GiB of its own that the process grew by."""
    torch.set_num_threads(1)
    before, is_over, peak = own_bytes(), threading.Event(), [0]

    def watch() -> None:
        while not is_over.wait(0.02):
            peak[0] = max(peak[0], own_bytes())

    watching = threading.Thread(target=watch, daemon=True)
    watching.start()
    cpu, wall = time.process_time(), time.perf_counter()
    work(folder, size, index)
    taken = time.process_time() - cpu, time.perf_counter() - wall
    is_over.set()
    watching.join()
    sender.send((*taken, max(0, max(peak[0], own_bytes()) - before) / 2**30))


def own_bytes() -> int:
    """Resident memory of this process that no file backs."""
    return int(Path("/proc/self/status").read_text().partition("RssAnon:")[2].split()[0]) * 1024


def drawn(size: int, worker: int) -> Iterator[tuple[int, tuple[int, ...], tuple[int, ...]]]:
    """Every eighth prompt with its completion, by number; the same at each call."""
    rng = np.random.default_rng(worker)
    weights = 1 / np.arange(3, 49155)
    steps = np.cumsum(weights / weights.sum())
    for number in range(worker, size, NUM_WORKERS):
        tokens = np.searchsorted(steps, rng.random(PROMPT_TOKENS + NEW_TOKENS)).tolist()
        yield number, tuple(tokens[:PROMPT_TOKENS]), tuple(tokens[PROMPT_TOKENS:])


def name_of(number: int) -> str:
    """As rows of the hub are called."""
    return f"openai/gsm8k:main:train/{number}"


def make_part(folder: Path, size: int, worker: int) -> None:
    """A worker's completions, and its prompts in a file of their own."""
    (folder / "completions").mkdir(exist_ok=True)
    with open(folder / "completions" / corpora.part_name(worker, NUM_WORKERS), "w", encoding="utf-8") as file:
        for number, prompt, tokens in drawn(size, worker):
            seed = row_seed(SEED, name_of(number), 0)
            one = Completion(name_of(number), 0, seed, prompt, tokens, TEXT, "stop" if number % 3 else "length")
            file.write(json.dumps(vars(one), ensure_ascii=False) + "\n")
    prompts = (Prompt(name_of(number), "", prompt) for number, prompt, _ in drawn(size, worker))
    write_table(folder / f"prompts-{worker}.arrow", Prompt, prompts)


def merge_all(folder: Path, size: int, _: int) -> None:
    """As rank 0 does it at the end of generation."""
    corpora.MOST_AS_TEXT = 0
    prompts = Table(Prompt, [folder / f"prompts-{worker}.arrow" for worker in range(NUM_WORKERS)])
    attempts = [Attempt("hf", "replica", 0, 1.0, {}, None, 0)] * NUM_WORKERS
    summary = merge(Requests(prompts, 1, SEED), Generate(max_length_rate=1.0), folder, attempts)
    assert (summary.num_completions, summary.num_tokens) == (size, size * NEW_TOKENS)


def read_all(folder: Path, size: int, rank: int) -> None:
    """As each rank does it before the first step of training."""
    config = Finetune(validation_fraction=0.01, max_tokens=512)
    completions = corpora.open_corpus(folder / "completions")
    sequences = training_sequences(completions, config, pad_token_id=0)
    train, _ = held_out(sequences, config.validation_fraction, torch.Generator().manual_seed(0))
    batches = global_batches(lengths_of(train), config, torch.Generator().manual_seed(1))
    batch = collate([[index] for index in batches[rank % len(batches)][:4]], train, lambda _: 0, pad_token_id=0)
    assert batch.token_BT.shape[1] == PROMPT_TOKENS + NEW_TOKENS
    assert math.isclose(len(train) + round(0.01 * size), size, abs_tol=1)


if __name__ == "__main__":
    main()
