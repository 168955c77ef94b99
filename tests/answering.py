"""Answers made up for tests of what is said about them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from spd_dist.storage.answers import answers_path
from spd_dist.storage.artifacts import write_json
from spd_dist.storage.keyed_parts import write_merged
from spd_dist.storage.manifests import Manifest
from spd_dist.storage.records import SCHEMA, write_record
from spd_dist.types import Answer

ARMS = {"base": "the untouched model", "psr": "plain self-retraining", "spd": "self-policy distillation"}

PLAIN = Answer("", "#### 4", "4", "4", True, "stop", 10, "4", "4", True, True, False)


def answers(num_correct: int, num: int = 200, first: int = 0, **changes: object) -> list[Answer]:
    """`num_correct` right from `first` on, the others wrong, with another output."""
    right = range(first, first + num_correct)
    return [
        dataclasses.replace(PLAIN, id=f"p{i}", correct=i in right, output=f"#### {i in right}", **changes)
        for i in range(num)
    ]


def sampled(num_right: Sequence[int], num_samples: int = 4) -> list[Answer]:
    """One example for each number of right samples."""
    return [
        dataclasses.replace(PLAIN, id=f"p{i}", sample=sample, correct=sample < right, output=f"#### {sample < right}")
        for i, right in enumerate(num_right)
        for sample in range(num_samples)
    ]


def answered_run(folder: Path) -> Path:
    """A run folder as far as the report reads it: 60, 70 and 90 of 150 right."""
    for arm, num_correct in zip(ARMS, (60, 70, 90), strict=True):
        rows = [dataclasses.replace(row, num_tokens=20) for row in answers(num_correct, num=150)]
        write_merged(answers_path(folder / "evaluate", arm, "arithmetic"), rows)
    site = {"spectrum": [4.0, 2.0, 1.0, 0.0], "rank": 2, "energy_fraction": 6 / 7}
    put(folder / "project", {"sites": {"layers.1.key": site}})
    corpus = {"num_tokens": 1234, "mean_tokens": 12.34, "num_completions": 100, "finish_reasons": {"stop": 80}}
    put(folder / "arms/psr/generate", corpus | {"empty_rate": 0.0, "repetition_rate": 0.01})
    student = {"num_sequences": 100, "num_targets": 2000, "num_steps": 25, "epochs": [{"epoch": 1, "loss": 1.5}]}
    put(folder / "arms/psr/finetune", student)
    write_record(folder / "project" / "manifest.json", manifest("project", 9.0))
    write_record(folder / "arms" / "psr" / "generate" / "manifest.json", manifest("arms/psr/generate", 1800.0))
    (folder / "finetune" / "adapter").mkdir(parents=True)
    return folder


def put(folder: Path, summary: dict[str, object]) -> None:
    """A stage's summary, as far as the report reads it."""
    write_json(folder / "summary.json", {"schema": SCHEMA, **summary})


def manifest(stage: str, seconds: float) -> Manifest:
    """As a finished stage leaves it."""
    return Manifest(stage, {}, {}, seconds, 2 * seconds, 2, "2026-01-01T00:00:00+00:00", {})
