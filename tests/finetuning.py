"""Completions for a tiny policy, and one call that fine-tunes it: shared by the tests of the stage."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tiny import tiny_tokenizer

from spd_dist.config import Distributed, Finetune, Model
from spd_dist.distributed.world import join_world
from spd_dist.models.policy import Policy, load_policy
from spd_dist.stages.context import StageContext
from spd_dist.stages.finetune import StudentSummary, finetune
from spd_dist.storage.artifacts import read_jsonl
from spd_dist.tracking.metrics import MetricLogger
from spd_dist.types import Completion, Projection

TINY = Finetune(learning_rate=5e-3, num_epochs=2, global_batch_size=8, micro_batch_size=4, max_tokens=64)


class Trained(NamedTuple):
    """What a fine-tuning left."""

    rows: list[dict[str, float]]
    """The metrics of every step that this process took."""
    summary: StudentSummary
    policy: Policy

    @property
    def losses(self) -> torch.Tensor:
        return losses(self.rows)


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


def train(model: Path, folder: Path, *, distributed: dict[str, Any] | None = None, job: dict[str, Any] | None = None,
          dtype: str = "auto", quantization: str = "none", projection: Projection | None = None,
          **changes: Any) -> Trained:  # fmt: skip
    """Fine-tune the model of a folder on these ranks; `changes` are of the settings, or `start`."""
    start = changes.pop("start", None)
    settings = Distributed(timeout_seconds=60, **(distributed or {}))
    world = join_world(settings)
    policy = load_policy(Model(name=str(model), dtype=dtype, quantization=quantization), settings, world)
    with MetricLogger(folder / "metrics", world.rank) as metrics:
        done_before = len(read_jsonl(metrics.path))
        work = StageContext(folder=folder, seed=3, world=world, distributed=settings, metrics=metrics, **(job or {}))
        summary = finetune(policy, completions(), dataclasses.replace(TINY, **changes), work, projection, start=start)
    rows = [row for row in read_jsonl(metrics.path)[done_before:] if "finetune/loss" in row]
    return Trained(rows, summary, policy)


def losses(rows: list[dict[str, float]]) -> torch.Tensor:
    """The loss of every step."""
    return torch.tensor([row["finetune/loss"] for row in rows], dtype=torch.float64)
