"""Problems that stand in two splits, word for word or nearly: found, reported, removed.

Two problems are as alike as their sets of word 5-grams A and B: |A & B| / |A | B| (Jaccard). The search is exact: sets
that are alike enough share one of their rarest n-grams (prefix filtering), so only those are looked up.
"""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence

from spd_dist.data.tasks.protocol import Row, Task
from spd_dist.types import Leak, LeakReport

NGRAM_WORDS = 5
Ngram = tuple[str, ...]


def find_leaks(splits: Mapping[str, Sequence[Row]], task: Task, *, similarity: float) -> list[LeakReport]:
    """A report for every pair of splits, each against those that follow it in the mapping.

    Problems of at least the given similarity count; exact duplicates always do. Of a pair, the n-grams of the smaller
    split are held, and the rows of the other are read one by one.
    """
    indices: dict[str, _Index] = {}

    def matches(held: str, read: str) -> Iterator[tuple[int, int, float]]:
        if held not in indices:
            indices[held] = _Index([_ngrams(task.problem(row)) for row in splits[held]], similarity)
        for position, row in enumerate(splits[read]):
            for other, alike in indices[held].alike(_ngrams(task.problem(row))):
                yield position, other, alike

    reports = []
    for name, other in itertools.combinations(splits, 2):
        if len(splits[name]) < len(splits[other]):
            pairs = ((own, position, alike) for position, own, alike in matches(name, other))
        else:
            pairs = matches(other, name)
        reports.append(_report(name, other, splits, pairs))
    return reports


def without_leaks(rows: Iterable[Row], reports: Iterable[LeakReport]) -> Iterator[Row]:
    """The rows that no report names as one whose problem stands in another split."""
    leaked = {leak.id for report in reports for leak in report.leaks}
    return (row for row in rows if row["id"] not in leaked)


def _ngrams(text: str) -> frozenset[Ngram]:
    words = re.findall(r"\w+|[^\w\s]", text.casefold())
    size = min(NGRAM_WORDS, len(words))
    return frozenset(tuple(words[start : start + size]) for start in range(len(words) - size + 1))


class _Index:
    """The problems of one split, found by their rarest n-grams."""

    def __init__(self, problems: Sequence[frozenset[Ngram]], similarity: float) -> None:
        self.problems, self.similarity = problems, similarity
        self.frequency = Counter(ngram for ngrams in problems for ngram in ngrams)
        self.holders: dict[Ngram, list[int]] = defaultdict(list)
        for position, ngrams in enumerate(problems):
            for ngram in self._rarest(ngrams):
                self.holders[ngram].append(position)

    def alike(self, ngrams: frozenset[Ngram]) -> Iterator[tuple[int, float]]:
        """Positions of the problems that are alike enough, in order, with how alike they are."""
        found = {position for ngram in self._rarest(ngrams) for position in self.holders.get(ngram, ())}
        for position in sorted(found):
            alike = _jaccard(ngrams, self.problems[position])
            if alike >= self.similarity:
                yield position, alike

    def _rarest(self, ngrams: frozenset[Ngram]) -> list[Ngram]:
        """Any set as alike as `similarity` shares one of these, as it cannot miss more than the rest.

        It holds for any order that all sets share: here how often an n-gram stands in the index, then its words.
        """
        count = len(ngrams) - math.ceil(self.similarity * len(ngrams)) + 1
        return sorted(ngrams, key=lambda ngram: (self.frequency[ngram], ngram))[:count]


def _report(
    name: str, other: str, splits: Mapping[str, Sequence[Row]], pairs: Iterable[tuple[int, int, float]]
) -> LeakReport:
    """Of all pairs, the most alike of each row of `name`; of several the first."""
    best: dict[int, tuple[float, int]] = {}
    for own, position, alike in pairs:
        best[own] = max(best.get(own, (0.0, 0)), (alike, -position))
    leaks = [
        Leak(splits[name][own]["id"], splits[other][-position]["id"], alike)
        for own, (alike, position) in sorted(best.items())
    ]
    num_exact = sum(leak.similarity == 1.0 for leak in leaks)
    return LeakReport(name, other, len(splits[name]), num_exact, len(leaks) - num_exact, tuple(leaks))


def _jaccard(left: frozenset[Ngram], right: frozenset[Ngram]) -> float:
    shared = len(left & right)
    return shared / (len(left) + len(right) - shared)
