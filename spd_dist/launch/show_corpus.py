"""Look at generated corpora: `python launchers/corpus.py stats|diff|show|export RUN_DIR [RUN_DIR/arms/psr]`.

stats: counts, rates and a histogram of lengths, for each corpus. diff: what two corpora share. show: completions, of
two corpora side by side. export: a corpus as JSON Lines, which a large one (`completions.arrow`) is not.
A corpus is a run's folder, an arm's (RUN_DIR/arms/psr), or a .jsonl file.
Exit codes: 0 done, 3 a corpus is missing or corrupt, 1 anything else.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from spd_dist.analysis.corpus import corpus_diff, corpus_stats, length_histogram, load_corpus, pairs
from spd_dist.launch import at_least, launcher
from spd_dist.storage.completions import to_text
from spd_dist.types import Completion

BAR_WIDTH = 40


@launcher
def main(words: Sequence[str] | None = None) -> int:
    """Parse and print."""
    arguments = parse_arguments(words)
    corpora = [load_corpus(path) for path in arguments.corpora]
    Console().print(arguments.shown(arguments, corpora))
    return 0


def parse_arguments(words: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(required=True, metavar="stats|diff|show|export")
    for name, shown, count in (("stats", stats, "+"), ("diff", diff, 2), ("show", show, "+"), ("export", export, 1)):
        verb = verbs.add_parser(name, help=shown.__doc__)
        verb.add_argument(
            "corpora", nargs=count, type=Path, metavar="CORPUS", help="a run's or arm's folder, or a file"
        )
        verb.set_defaults(shown=shown)
        if name == "export":
            verb.add_argument("file", type=Path, metavar="FILE.jsonl", help="where to write it")
        if name == "show":
            verb.add_argument("--id", action="append", dest="ids", help="only this prompt; may be repeated")
            verb.add_argument("--num", type=at_least(1), default=5, help="at most so many completions")
            verb.add_argument("--differing", action="store_true", help="only prompts whose two completions differ")
    return parser.parse_args(words)


def stats(arguments: argparse.Namespace, corpora: Sequence[Sequence[Completion]]) -> Group:
    """Counts, rates and lengths."""
    found = [dataclasses.asdict(corpus_stats(corpus)) for corpus in corpora]
    numbers = Table("", *map(str, arguments.corpora))
    for name in found[0]:
        numbers.add_row(name, *(readable(one[name]) for one in found))
    histograms = [histogram(str(path), corpus) for path, corpus in zip(arguments.corpora, corpora, strict=True)]
    return Group(numbers, *histograms)


def histogram(name: str, corpus: Sequence[Completion]) -> Table:
    """Bars of lengths."""
    bars = length_histogram(corpus)
    largest = max(bar.num_completions for bar in bars)
    table = Table("tokens", "completions", "", title=f"lengths of {name}", title_justify="left")
    for bar in bars:
        drawn = "#" * round(BAR_WIDTH * bar.num_completions / largest)
        table.add_row(f"{bar.start} to {bar.stop - 1}", str(bar.num_completions), drawn)
    return table


def diff(arguments: argparse.Namespace, corpora: Sequence[Sequence[Completion]]) -> Table:
    """What two corpora share, and how they differ."""
    table = Table("", f"left: {arguments.corpora[0]}, right: {arguments.corpora[1]}")
    for name, value in dataclasses.asdict(corpus_diff(*corpora)).items():
        table.add_row(name, readable(value))
    return table


def show(arguments: argparse.Namespace, corpora: Sequence[Sequence[Completion]]) -> Table:
    """Completions, of two corpora side by side."""
    table = Table("prompt", *map(str, arguments.corpora), show_lines=True)
    rows: Iterable[tuple[Completion, ...]] = pairs(*corpora) if len(corpora) == 2 else [(one,) for one in corpora[0]]
    if arguments.ids:
        rows = [row for row in rows if row[0].id in arguments.ids]
    if arguments.differing and len(corpora) == 2:
        rows = [row for row in rows if len({one.tokens for one in row}) > 1]
    for row in islice(rows, arguments.num):
        table.add_row(f"{row[0].id}\nsample {row[0].sample}", *(cell(one) for one in row))
    return table


def export(arguments: argparse.Namespace, corpora: Sequence[Sequence[Completion]]) -> str:
    """A corpus as JSON Lines, a completion a line."""
    to_text(corpora[0], arguments.file)
    return f"{len(corpora[0])} completions are in {arguments.file}"


def cell(completion: Completion) -> Text:
    """A completion as it is, and how it ended."""
    return Text(f"{completion.text}\n[{len(completion.tokens)} tokens, {completion.finish_reason}]")


def readable(value: float) -> str:
    """A number as a person reads it."""
    return f"{value:.3f}" if isinstance(value, float) else f"{value:,}"
