r"""MATH: competition problems whose answers are expressions in `\boxed{}`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from spd_dist.data import spans
from spd_dist.data.scoring.expressions import expression_answers, same_expression
from spd_dist.data.scoring.extract import boxed
from spd_dist.data.scoring.thoughts import until_next_question, without_thoughts
from spd_dist.data.spans import Span
from spd_dist.data.tasks.protocol import Metric, Row, Score, Split, scored

INSTRUCTION = r"Put the final answer in \boxed{}."
SUBJECTS = (
    "algebra", "counting_and_probability", "geometry", "intermediate_algebra", "number_theory", "prealgebra",
    "precalculus",
)  # fmt: skip


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
        """Strict: the last box, where several agree. Lenient: else what is said to be the answer."""
        spoken = without_thoughts(output)
        strict, lenient = expression_answers(until_next_question(spoken.text, row["problem"]))
        return scored(row["answer"], strict, lenient, same=same_expression, is_unfinished=spoken.is_unfinished)


MATH = CompetitionMath()
