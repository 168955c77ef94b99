"""All parts become one corpus, in one order, after it was checked."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from spd_dist.config import Generate
from spd_dist.distributed.lock import alone_in
from spd_dist.errors import DataError
from spd_dist.models.decoding import Request
from spd_dist.models.engines.choice import Opened
from spd_dist.runtime.artifacts import read_json, write_json
from spd_dist.runtime.completions import MERGED, gathered, write_merged
from spd_dist.stages.generate.checks import canonical, check_rates, corpus_summary

LARGEST_LEAKAGE = {torch.float64: 1e-5, torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Attempt:
    """What one rank did in this attempt."""

    engine: str
    placement: str
    num_tokens: int
    seconds: float
    hook_calls: dict[str, int]
    leakage: float | None

    @classmethod
    def of(cls, opened: Opened, *, num_tokens: int, seconds: float) -> Attempt:
        """As the engine and its projection report it."""
        applied = opened.applied
        calls = {} if applied is None else {str(site): count for site, count in applied.calls.items()}
        leakage = None if applied is None else applied.leakage()
        return cls(opened.engine.name, opened.placement, num_tokens, seconds, calls, leakage)


def check_leakage(attempt: Attempt, dtype: torch.dtype) -> None:
    """Refuse keys or values that leave the subspace.

    Raises:
        DataError: beyond what rounding in `dtype` explains.
    """
    limit = LARGEST_LEAKAGE[dtype]
    if attempt.leakage is not None and not attempt.leakage <= limit:
        raise DataError(
            f"generate: leakage ||z(I-P)|| / ||z|| is {attempt.leakage:.2e}, above {limit:.0e}: the projection does "
            "not hold; set generate.apply_as=hook"
        )


def merge(requests: Sequence[Request], config: Generate, folder: Path, attempts: Sequence[Attempt]) -> dict[str, Any]:
    """Write the corpus and its summary, if it is complete; only an array's task may find that it is not.

    What another task has merged stays as it is, and so does its summary.

    Raises:
        DataError: completions are missing, differ, or fail a check.
    """
    with alone_in(folder):
        by_key = gathered(folder / "completions")
        described = _described(attempts)
        if config.num_tasks > 1 and len(by_key) < len(requests):
            log.info("generate: %d of %d completions are there; other tasks make the rest", len(by_key), len(requests))
            return {"is_complete": False, "num_completions": len(by_key), **described}
        completions = canonical(requests, by_key)
        summary = {"is_complete": True, **corpus_summary(completions), **described}
        check_rates(summary, config)
        is_merged = (folder / "completions" / MERGED).exists() and (folder / "summary.json").exists()
        write_merged(folder / "completions", completions)
        if is_merged:
            return read_json(folder / "summary.json")
        write_json(folder / "summary.json", summary)
        return summary


def _described(attempts: Sequence[Attempt]) -> dict[str, Any]:
    seconds = max(attempt.seconds for attempt in attempts)
    num_tokens = sum(attempt.num_tokens for attempt in attempts)
    leakages = [attempt.leakage for attempt in attempts if attempt.leakage is not None]
    return {
        "engine": attempts[0].engine,
        "placement": attempts[0].placement,
        "seconds": round(seconds, 3),
        "num_new_tokens": num_tokens,
        "tokens_per_second": round(num_tokens / max(seconds, 1e-9), 1),
        "hook_calls": {site: sum(one.hook_calls[site] for one in attempts) for site in attempts[0].hook_calls},
        "leakage": max(leakages, default=None),
    }
