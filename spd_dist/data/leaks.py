"""Problems that stand in two splits, word for word or nearly: found, reported, removed.

Two problems are as alike as their sets of word 5-grams A and B: |A & B| / |A | B| (Jaccard). The search is exact: sets
that are alike enough share one of their rarest n-grams (prefix filtering), so only those are looked up.
"""

from __future__ import annotations

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

    Problems of at least the given similarity count; exact duplicates always do.
    """
    texts = {name: [_ngrams(task.problem(row)) for row in rows] for name, rows in splits.items()}
    frequency = Counter(ngram for problems in texts.values() for ngrams in problems for ngram in ngrams)
    names = list(splits)
    return [
        _report(name, other, splits, texts, frequency, similarity)
        for position, name in enumerate(names)
        for other in names[position + 1 :]
    ]


def without_leaks(rows: Iterable[Row], reports: Iterable[LeakReport]) -> Iterator[Row]:
    """The rows that no report names as one whose problem stands in another split."""
    leaked = {leak.id for report in reports for leak in report.leaks}
    return (row for row in rows if row["id"] not in leaked)


def _ngrams(text: str) -> frozenset[Ngram]:
    words = re.findall(r"\w+|[^\w\s]", text.casefold())
    size = min(NGRAM_WORDS, len(words))
    return frozenset(tuple(words[start : start + size]) for start in range(len(words) - size + 1))


def _rarest(ngrams: frozenset[Ngram], frequency: Mapping[Ngram, int], similarity: float) -> list[Ngram]:
    """Any set as alike as `similarity` shares one of these, as it cannot miss more than the rest."""
    count = len(ngrams) - math.ceil(similarity * len(ngrams)) + 1
    return sorted(ngrams, key=lambda ngram: (frequency[ngram], ngram))[:count]


def _report(
    name: str,
    other: str,
    splits: Mapping[str, Sequence[Row]],
    texts: Mapping[str, Sequence[frozenset[Ngram]]],
    frequency: Mapping[Ngram, int],
    similarity: float,
) -> LeakReport:
    holders: dict[Ngram, list[int]] = defaultdict(list)
    for position, ngrams in enumerate(texts[other]):
        for ngram in _rarest(ngrams, frequency, similarity):
            holders[ngram].append(position)
    leaks = []
    for row, ngrams in zip(splits[name], texts[name], strict=True):
        rarest = _rarest(ngrams, frequency, similarity)
        candidates = sorted({position for ngram in rarest if ngram in holders for position in holders[ngram]})
        alike = [_jaccard(ngrams, texts[other][position]) for position in candidates]
        if alike and max(alike) >= similarity:
            best = candidates[alike.index(max(alike))]
            leaks.append(Leak(row["id"], splits[other][best]["id"], max(alike)))
    num_exact = sum(leak.similarity == 1.0 for leak in leaks)
    return LeakReport(name, other, len(splits[name]), num_exact, len(leaks) - num_exact, tuple(leaks))


def _jaccard(left: frozenset[Ngram], right: frozenset[Ngram]) -> float:
    shared = len(left & right)
    return shared / (len(left) + len(right) - shared)
