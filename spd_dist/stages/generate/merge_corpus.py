"""All parts become one corpus, in one order, after it was checked."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch

from spd_dist.config import Generate
from spd_dist.distributed.lock import alone_in
from spd_dist.errors import DataError
from spd_dist.inference.engine_table import ENGINES, Opened
from spd_dist.inference.sampling import suggested_decoding
from spd_dist.models.policy import Policy
from spd_dist.stages.generate.corpus_requests import Requests
from spd_dist.storage.completions import corpus_name, finished_corpus, is_empty, is_repetitive, open_corpus, parts
from spd_dist.storage.corpus_merge import LocatedLines, remove_parts, write_merged
from spd_dist.storage.records import read_record, write_record
from spd_dist.types import Completion, record_of

log = logging.getLogger(__name__)

MANY_CUT = 0.5
"""Share of completions without an end that is worth a warning."""


@dataclass(frozen=True)
class CorpusCounts:
    """Counts, lengths, finish reasons and rates of a corpus; zero where it is not merged yet."""

    num_completions: int
    num_prompts: int = 0
    num_tokens: int = 0
    mean_tokens: float = 0.0
    finish_reasons: dict[str, int] = field(default_factory=dict)
    empty_rate: float = 0.0
    repetition_rate: float = 0.0
    length_rate: float = 0.0


@dataclass(frozen=True, kw_only=True)
class CorpusSummary(CorpusCounts):
    """What `generate/summary.json` holds: the corpus, and what all ranks did in the attempt that merged it."""

    is_complete: bool
    """If not, other tasks of the array make the rest; then of the corpus `num_completions` alone is known."""
    engine: str
    placement: str
    seconds: float
    num_new_tokens: int
    tokens_per_second: float
    hook_calls: dict[str, int]
    leakage: float | None
    engine_starts: int = 0
    """Processes of an engine of its own that were started, over all ranks."""
    batch_size: int = 0
    """Rows that rank 0 decoded together at most; 0 of an engine that decides by itself."""
    samples: str = ""
    """Which of the engine's samples a second run repeats."""
    suggested_decoding: dict[str, float] = field(default_factory=dict)
    """What the model's generation_config asks for; never taken: the sampling is the section's."""


class Counting:
    """Adds up a corpus, completion by completion."""

    def __init__(self) -> None:
        self.prompts: set[str] = set()
        self.reasons: Counter[str] = Counter()
        self.num_tokens = self.num_empty = self.num_repetitive = 0

    def add(self, completion: Completion) -> None:
        """Count one more."""
        self.prompts.add(completion.id)
        self.reasons[completion.finish_reason] += 1
        self.num_tokens += len(completion.tokens)
        self.num_empty += is_empty(completion)
        self.num_repetitive += is_repetitive(completion.tokens)

    def counts(self) -> CorpusCounts:
        """Of a corpus that may be empty."""
        num = self.reasons.total()
        return CorpusCounts(
            num_prompts=len(self.prompts),
            num_completions=num,
            num_tokens=self.num_tokens,
            mean_tokens=self.num_tokens / max(1, num),
            finish_reasons=dict(sorted(self.reasons.items())),
            empty_rate=self.num_empty / max(1, num),
            repetition_rate=self.num_repetitive / max(1, num),
            length_rate=self.reasons["length"] / max(1, num),
        )


def check_rates(counts: CorpusCounts, config: Generate) -> None:
    """Fail loudly on a corpus that is not worth training on, and warn of one that teaches no end.

    Raises:
        DataError: too many completions are empty, repeat themselves, or were cut.
    """
    limits = {
        "empty": (counts.empty_rate, config.max_empty_rate, "data.template or generate.temperature"),
        "repetition": (
            counts.repetition_rate, config.max_repetition_rate, "generate.temperature or generate.repetition_penalty"
        ),
        "length": (counts.length_rate, config.max_length_rate, "generate.max_new_tokens"),
    }  # fmt: skip
    for name, (rate, limit, cause) in limits.items():
        if rate > limit:
            raise DataError(
                f"generate: the {name} rate of the completions is {rate:.3f}, above generate.max_{name}_rate={limit}; "
                "look at them with launchers/corpus.py; then raise that limit and start again in this run_dir, where "
                f"they are kept, or change {cause} in another one"
            )
    if counts.length_rate > MANY_CUT:
        log.warning(
            "generate: %.0f %% of the completions were cut at generate.max_new_tokens=%d: a student learns from them "
            "to go on without an end; generate.max_length_rate makes this an error",
            100 * counts.length_rate, config.max_new_tokens,
        )  # fmt: skip


LARGEST_LEAKAGE = {torch.float64: 1e-5, torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}


@dataclass(frozen=True)
class Attempt:
    """What one rank did in this attempt."""

    engine: str
    placement: str
    num_tokens: int
    seconds: float
    hook_calls: dict[str, int]
    leakage: float | None
    engine_starts: int
    batch_size: int = 0
    suggested_decoding: dict[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, opened: Opened, policy: Policy, *, num_tokens: int, seconds: float) -> Attempt:
        """As the engine and its projection report it."""
        calls, leakage = opened.projection_seen()
        return cls(
            engine=opened.engine.name,
            placement=opened.placement,
            num_tokens=num_tokens,
            seconds=seconds,
            hook_calls=calls,
            leakage=leakage,
            engine_starts=opened.num_starts,
            batch_size=opened.batch_size,
            suggested_decoding=suggested_decoding(policy.model),
        )


def check_leakage(attempt: Attempt, dtype: torch.dtype) -> None:
    """Refuse keys or values that leave the subspace.

    Raises:
        DataError: beyond what rounding in `dtype` explains.
    """
    limit = LARGEST_LEAKAGE[dtype]
    if attempt.leakage is not None and not attempt.leakage <= limit:
        raise DataError(
            f"generate: leakage ||z(I-P)|| / ||z|| is {attempt.leakage:.2e}, above {limit:.0e}: the projection does "
            "not hold; set generate.engine=hf generate.apply_as=hook"
        )


def merge(requests: Requests, config: Generate, folder: Path, attempts: Sequence[Attempt]) -> CorpusSummary:
    """Write the corpus and its summary, if it is complete; only an array's task may find that it is not.

    What another task has merged stays as it is, and so does its summary.

    Raises:
        DataError: completions are missing, differ, or fail a check.
    """
    completions, described = folder / "completions", _described(attempts)
    with alone_in(folder):
        merged = finished_corpus(completions)
        if merged is not None and (folder / "summary.json").exists():
            remove_parts(completions)
            return read_record(folder / "summary.json", CorpusSummary)
        if merged is None:
            with LocatedLines(parts(completions), requests.number_of, len(requests)) as lines:
                if config.num_tasks > 1 and lines.num_found < len(requests):
                    return _unfinished(lines.num_found, len(requests), described)
                counts = _write(requests, lines, config, folder)
        else:  # killed before the summary
            counting = Counting()
            for completion in open_corpus(merged):
                counting.add(completion)
            counts = counting.counts()
            check_rates(counts, config)
        remove_parts(completions)
        summary = record_of(CorpusSummary, {"is_complete": True, **asdict(counts), **described})
        write_record(folder / "summary.json", summary)
        return summary


def _unfinished(num_found: int, total: int, described: dict[str, object]) -> CorpusSummary:
    log.info("generate: %d of %d completions are there; other tasks make the rest", num_found, total)
    return record_of(CorpusSummary, described | {"is_complete": False, "num_completions": num_found})


def _write(requests: Requests, lines: LocatedLines, config: Generate, folder: Path) -> CorpusCounts:
    """Write the corpus in one pass, checked before it gets its name.

    Raises:
        DataError: completions are missing, or fail a check.
    """
    missing_M = np.flatnonzero(lines.file_N < 0)
    if len(missing_M):
        some = [requests[int(number)] for number in missing_M[:3]]
        first = ", ".join(f"{request.id!r} sample {request.sample}" for request in some)
        raise DataError(
            f"{len(missing_M)} of {len(requests)} completions are missing ({first}, ...); start the same command again"
        )
    counting = Counting()

    def see(number: int, completion: Completion) -> None:
        requests.check(completion, number)
        counting.add(completion)

    path = folder / corpus_name(len(requests))
    write_merged(lines, path, see=see, check=lambda: check_rates(counting.counts(), config))
    return counting.counts()


def _described(attempts: Sequence[Attempt]) -> dict[str, object]:
    """The fields of a summary that are of the attempt."""
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
        "engine_starts": sum(attempt.engine_starts for attempt in attempts),
        "batch_size": attempts[0].batch_size,
        "suggested_decoding": attempts[0].suggested_decoding,
        "samples": ENGINES[attempts[0].engine].repeats,
    }
