r"""MATH: competition problems whose answers are expressions in `\boxed{}`."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from spd_dist.data import spans
from spd_dist.data.extract import boxed, last_number, parse_number
from spd_dist.data.spans import Span
from spd_dist.data.tasks.protocol import Metric, Row, Score, Split, scored

INSTRUCTION = r"Put the final answer in \boxed{}."
SUBJECTS = (
    "algebra", "counting_and_probability", "geometry", "intermediate_algebra", "number_theory", "prealgebra",
    "precalculus",
)  # fmt: skip
_DROPPED = re.compile(r"\\left|\\right|\\[!,;: ]|\\\$|\$|\\%|%|\^\\circ|\^{\\circ}|\s")


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
        """Strict: the last box. Lenient: the last box, else the last number."""
        strict = boxed(output)
        lenient = strict if strict is not None else last_number(output)
        return scored(row["answer"], strict, lenient, same=same_expression)


def same_expression(left: str, right: str) -> bool:
    """Equality of LaTeX up to spacing, units of degree, percent and dollar, and ways to write fractions and numbers."""
    return _plain(left) == _plain(right)


def _plain(expression: str) -> str:
    plain = re.sub(r"\\(?:text|mathrm|textbf|mbox)\s*\{([^{}]*)\}", r"\1", expression)
    plain = _DROPPED.sub("", plain).rstrip(".")
    plain = re.sub(r"\\[dt]frac", r"\\frac", plain)
    plain = re.sub(r"\\frac(\d)(\d)", r"\\frac{\1}{\2}", plain)
    plain = re.sub(r"^[a-zA-Z]=", "", plain)
    plain = re.sub(r"^(-?)\\frac\{(\d+)\}\{(\d+)\}$", r"\1\2/\3", plain)
    number = parse_number(plain)
    return plain if number is None else str(number.normalize())


MATH = CompetitionMath()
