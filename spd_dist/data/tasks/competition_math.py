r"""MATH: competition problems whose answers are expressions in `\boxed{}`."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from spd_dist.data import spans
from spd_dist.data.scoring.extract import boxed, boxed_answers
from spd_dist.data.scoring.numbers import parse_number
from spd_dist.data.scoring.thoughts import without_thoughts
from spd_dist.data.spans import Span
from spd_dist.data.tasks.protocol import Metric, Row, Score, Split, scored

INSTRUCTION = r"Put the final answer in \boxed{}."
SUBJECTS = (
    "algebra", "counting_and_probability", "geometry", "intermediate_algebra", "number_theory", "prealgebra",
    "precalculus",
)  # fmt: skip
_UNITS = (
    r"(?:square |cubic )?(?:cm|mm|km|m|kg|g|feet|foot|ft|inch(?:es)?|in|miles?|mph|hours?|minutes?|seconds?|days?"
    r"|weeks?|years?|months?|dollars?|cents?|degrees?|units?|meters?|centimeters?|kilometers?|pounds?|people|students|ways"
    r"|points?)"
)
_TEXT = r"\\(?:text|mathrm|textbf|textit|mbox|mathbf)"
_REWRITTEN = tuple((re.compile(pattern), instead) for pattern, instead in (
    (r"\\(?:left|right|big|Big|displaystyle|limits)(?![a-z])", ""),
    (r"\\[dtc]frac", r"\\frac"),
    (r"\{,\}|\\[,;:!]|(?<!\\)\\ |~|\\quad|\\qquad", lambda match: "," if match[0] == "{,}" else " "),
    (_TEXT + r"\s*\{\s*(?:,\s*)?" + _UNITS + r"\s*\}(?:\s*\^\s*\{?\d\}?)?\s*\.?\s*$", ""),
    (r"(?<=[\d}])\s*" + _UNITS + r"(?:\^\{?\d\}?)?\s*\.?\s*$", ""),
    (_TEXT + r"\s*\{([^{}]*)\}", r"\1"),
    (r"\\%|%|\\\$|\$|\^\s*\\circ|\^\s*\{\s*\\circ\s*\}|\\degree", ""),
    (r"\\(?:leq|le)(?![a-z])", r"\\le "),
    (r"\\(?:geq|ge)(?![a-z])", r"\\ge "),
    (r"\\(?:neq|ne)(?![a-z])", r"\\ne "),
    (r"\\frac\s*(\d)\s*(\d)", r"\\frac{\1}{\2}"),
    (r"\\frac\s*(\d|\\[a-z]+)\s*(?=\{)", r"\\frac{\1}"),
    (r"\\frac\s*(\d|\\[a-z]+)\s*(\d)", r"\\frac{\1}{\2}"),
    (r"(\\frac\s*\{[^{}]*\})\s*(\d|[a-z])(?!\})", r"\1{\2}"),
    (r"\\sqrt\s*(\d|[a-z])", r"\\sqrt{\1}"),
    (r"\\frac\s*\{\s*-\s*([^{}]*)\}", r"-\\frac{\1}"),
    (r"([\^_])\s*\{\s*(\w)\s*\}", r"\1\2"),
    (r"^\s*[a-zA-Z](?:\([a-z]\))?\s*(?:=|\\in(?![a-z]))", ""),
    (r"\\(?:cdot|times)(?![a-z])", "*"),
    (r"\\pmatrix", "pmatrix"),
    (r"[bvp]matrix", "matrix"),
))  # fmt: skip
_BRACKETED = re.compile(r"[(\[{]|\\\{")


@dataclass(frozen=True)
class CompetitionMath:
    """Rows have `problem` and `solution`; trained on MATH, tested on MATH-500."""

    name: str = "math"
    metric: Metric = "accuracy"
    test_size: int | None = 500
    fields: Mapping[str, type] = field(default_factory=lambda: {"problem": str, "solution": str, "answer": str})
    sources: Mapping[Split, str] = field(
        default_factory=lambda: {
            "train": ",".join(f"EleutherAI/hendrycks_math:{subject}:train" for subject in SUBJECTS),
            "test": "HuggingFaceH4/MATH-500::test",
        }
    )

    def normalise(self, raw: Mapping[str, Any], subset: str) -> Row | None:
        """The answer is what the solution boxes; a solution that boxes nothing is dropped."""
        answer = boxed(raw["solution"])
        return None if answer is None else {**raw, "answer": answer}

    def problem(self, row: Row) -> str:
        """The problem."""
        return row["problem"]

    def prompt(self, row: Row) -> str:
        """The problem, and the form that the final answer must have."""
        return f"{row['problem'].strip()}\n{INSTRUCTION}"

    def answer(self, row: Row) -> str:
        """The worked solution."""
        return f"\n{row['solution'].strip()}"

    def target_spans(self, row: Row) -> Sequence[Span]:
        """The content of the last box."""
        return spans.boxed_content(self.prompt(row), self.answer(row), row)

    def score(self, row: Row, output: str) -> Score:
        """Strict: the last box, where several agree. Lenient: else the number that is said to be the answer."""
        spoken = without_thoughts(output)
        strict, lenient = boxed_answers(spoken.text, same_expression)
        return scored(row["answer"], strict, lenient, same=same_expression, is_unfinished=spoken.is_unfinished)


def same_expression(left: str, right: str) -> bool:
    """Equality of LaTeX up to spacing, units, degrees, percent, and ways to write fractions, roots and numbers.

    A comma parts thousands only between groups of three digits: `1,2,3` is a list and not 123.
    """
    return _plain(left) == _plain(right)


def _plain(expression: str) -> str:
    plain = expression.strip().rstrip(".")
    for pattern, instead in _REWRITTEN:
        plain = pattern.sub(instead, plain)
    number = None if _BRACKETED.match(plain.strip()) else _number(plain.strip())
    if number is not None:
        return number
    plain = re.sub(r"\s+", "", plain)
    parts = re.split(r",(?!\d{3}(?!\d))", plain) if not _BRACKETED.search(plain) else [plain]
    return ",".join(sorted(_number(part) or part for part in parts)) if len(parts) > 1 else plain


def _number(text: str) -> str | None:
    simple = re.sub(r"\\frac\s*\{\s*(\d+)\s*\}\s*\{\s*(\d+)\s*\}", r"\1/\2", text)
    value = parse_number(simple)
    return None if value is None else str(value)


MATH = CompetitionMath()
