"""Look at corpora: lengths, rates, and what differs between two answers to the same prompt."""

from __future__ import annotations

import hashlib
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from spd_dist.errors import DataError
from spd_dist.storage.completions import finished_corpus, gathered, is_empty, is_repetitive, open_corpus
from spd_dist.storage.tables import num_tokens_of
from spd_dist.types import Completion

NUM_BARS = 12
PLACES = ("generate/completions", "completions")
"""Where a run's, an arm's or a stage's folder has its completions."""


@dataclass(frozen=True)
class CorpusStats:
    """A corpus in numbers; rates are shares of all completions."""

    num_completions: int
    num_prompts: int
    num_tokens: int
    mean_tokens: float
    median_tokens: float
    max_tokens: int
    stop_rate: float
    empty_rate: float
    repetition_rate: float
    distinct_rate: float
    """Texts that no earlier completion has."""


class Bar(NamedTuple):
    """A part of a histogram of lengths: from `start` tokens up to, but without, `stop`."""

    start: int
    stop: int
    num_completions: int


@dataclass(frozen=True)
class CorpusDiff:
    """Two corpora, over the keys (prompt id, sample) that both hold."""

    num_both: int
    num_only_left: int
    num_only_right: int
    same_rate: float
    """Completions of the same tokens."""
    mean_shared_tokens: float
    """Tokens before the first that differs."""
    mean_left_tokens: float
    mean_right_tokens: float
    left_stop_rate: float
    right_stop_rate: float


def load_corpus(path: str | Path) -> Sequence[Completion]:
    """The completions under a run's, arm's, stage's or completions folder, or of a file.

    Raises:
        DataError: there are none.
    """
    path = Path(path)
    place = next((path / name for name in PLACES if (path / name).is_dir()), path)
    if place.is_dir() and finished_corpus(place) is None:
        completions: Sequence[Completion] = list(gathered(place).values())
    else:
        completions = open_corpus(place) if place.exists() else []
    if not len(completions):
        raise DataError(f"{path} holds no completions; give a run folder, RUN_DIR/arms/psr, or a .jsonl file")
    return completions


def corpus_stats(completions: Sequence[Completion]) -> CorpusStats:
    """The numbers of a corpus."""
    prompts, texts, num = set(), set(), len(completions)
    num_stopped = num_empty = num_repetitive = 0
    for one in completions:  # once: a table makes them anew each time
        prompts.add(one.id)
        texts.add(hashlib.blake2b(one.text.encode(), digest_size=12).digest())
        num_stopped += one.finish_reason == "stop"
        num_empty += is_empty(one)
        num_repetitive += is_repetitive(one.tokens)
    lengths = num_tokens_of(completions, "tokens")
    return CorpusStats(
        num_completions=num,
        num_prompts=len(prompts),
        num_tokens=int(lengths.sum()),
        mean_tokens=float(lengths.mean()),
        median_tokens=float(np.median(lengths)),
        max_tokens=int(lengths.max()),
        stop_rate=num_stopped / num,
        empty_rate=num_empty / num,
        repetition_rate=num_repetitive / num,
        distinct_rate=len(texts) / num,
    )


def length_histogram(completions: Sequence[Completion], num_bars: int = NUM_BARS) -> list[Bar]:
    """Counts of completions by length, in bars of one width from zero to the longest."""
    lengths = num_tokens_of(completions, "tokens").tolist()
    width = max(1, -(-(max(lengths) + 1) // num_bars))
    counts = Counter(length // width for length in lengths)
    return [Bar(index * width, (index + 1) * width, counts[index]) for index in range(max(counts) + 1)]


def pairs(left: Sequence[Completion], right: Sequence[Completion]) -> list[tuple[Completion, Completion]]:
    """Answers to the same prompt and sample, in the order of `left`.

    Raises:
        DataError: there is none.
    """
    others = {(one.id, one.sample): one for one in right}
    found = [(one, others[one.id, one.sample]) for one in left if (one.id, one.sample) in others]
    if not found:
        raise DataError("the two corpora have no prompt and sample in common; give two arms of one run")
    return found


def corpus_diff(left: Sequence[Completion], right: Sequence[Completion]) -> CorpusDiff:
    """What two corpora share and how they differ.

    Raises:
        DataError: they have nothing in common.
    """
    both = pairs(left, right)
    num = len(both)
    return CorpusDiff(
        num_both=num,
        num_only_left=len(left) - num,
        num_only_right=len(right) - num,
        same_rate=sum(one.tokens == other.tokens for one, other in both) / num,
        mean_shared_tokens=statistics.fmean(shared_tokens(one, other) for one, other in both),
        mean_left_tokens=statistics.fmean(len(one.tokens) for one, _ in both),
        mean_right_tokens=statistics.fmean(len(other.tokens) for _, other in both),
        left_stop_rate=sum(one.finish_reason == "stop" for one, _ in both) / num,
        right_stop_rate=sum(other.finish_reason == "stop" for _, other in both) / num,
    )


def shared_tokens(left: Completion, right: Completion) -> int:
    """The number of tokens before the first that differs."""
    same = [one == other for one, other in zip(left.tokens, right.tokens, strict=False)]
    return [*same, False].index(False)
