"""Completions for a tiny policy, and one call that fine-tunes it: shared by the tests of the stage."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from tiny import tiny_tokenizer

from spd_dist.config import Distributed, Finetune, Model
from spd_dist.distributed.world import join_world
from spd_dist.models.policy import Policy, load_policy
from spd_dist.runtime.jsonl import read_jsonl
from spd_dist.runtime.metrics import MetricLogger
from spd_dist.stages.finetune import Job, finetune
from spd_dist.types import Completion

TINY = Finetune(
    learning_rate=5e-3, num_epochs=2, global_batch_size=8, micro_batch_size=4, max_tokens=64, warmup_epochs=0.5
)


def completions(count: int = 22) -> list[Completion]:
    """Sums of different lengths; every fourth was cut before its end-of-sequence token."""
    tokenizer, made = tiny_tokenizer(), []
    for index in range(count):
        prompt = tokenizer.encode(f"{index} + {index * index} ", add_special_tokens=False)
        answer = tokenizer.encode("= " + "x" * (index % 7) + str(index + index * index), add_special_tokens=False)
        ends = index % 4 != 0
        tokens = (*answer, tokenizer.eos_token_id) if ends else tuple(answer)
        made.append(Completion(f"sum-{index}", 0, index, tuple(prompt), tokens, "", "stop" if ends else "length"))
    return made


def train(
    model: Path,
    folder: Path,
    *,
    zero_stage: int = 3,
    deepspeed: dict[str, Any] | None = None,
    count: int = 22,
    dtype: str = "auto",
    job: dict[str, Any] | None = None,
    **changes: Any,
) -> tuple[list[dict[str, float]], dict[str, Any], Policy]:
    """Fine-tune the model of a folder; returns the metrics of every step, the summary and the policy."""
    distributed = Distributed(zero_stage=zero_stage, deepspeed=deepspeed or {}, timeout_seconds=60)
    world = join_world(distributed)
    policy = load_policy(Model(name=str(model), dtype=dtype), distributed, world)
    log = folder / "metrics"
    with MetricLogger(log, world.rank) as metrics:
        work = Job(folder=folder, seed=3, world=world, distributed=distributed, metrics=metrics, **(job or {}))
        summary = finetune(policy, completions(count), dataclasses.replace(TINY, **changes), work)
    return [row for row in read_jsonl(metrics.path) if "finetune/loss" in row], summary, policy


def losses(rows: list[dict[str, float]]) -> torch.Tensor:
    """The loss of every step."""
    return torch.tensor([row["finetune/loss"] for row in rows], dtype=torch.float64)
