"""Mathematics: word problems with a number as the result (built in, GSM8K, SVAMP), and MATH, whose answers are
expressions in a box.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from spd_dist.data import spans
from spd_dist.data.scoring.expressions import expression_answers, same_expression
from spd_dist.data.scoring.extract import boxed, without_calculator
from spd_dist.data.scoring.numbers import MARKER, same_number
from spd_dist.data.scoring.statements import number_answers
from spd_dist.data.scoring.thoughts import until_next_question, without_thoughts
from spd_dist.data.spans import Span
from spd_dist.data.tasks.protocol import Metric, Row, Score, Split, scored

INSTRUCTION = f"Give the final answer after '{MARKER} '."
BOXED_INSTRUCTION = r"Put the final answer in \boxed{}."
SUBJECTS = (
    "algebra", "counting_and_probability", "geometry", "intermediate_algebra", "number_theory", "prealgebra",
    "precalculus",
)  # fmt: skip


@dataclass(frozen=True)
class WordProblems:
    """A data set of `question`, worked `solution` and numeric `answer`."""

    name: str
    sources: Mapping[Split, str]
    test_size: int | None = None
    metric: Metric = "accuracy"
    fields: Mapping[str, type] = field(default_factory=lambda: {"question": str, "solution": str, "answer": str})

    def normalise(self, raw: Mapping[str, Any], subset: str) -> Row | None:
        """GSM8K's published form has the `#### n` line in its answer; SVAMP's has capitals and a body."""
        if "Body" in raw:
            question = f"{raw['Body'].strip()} {raw['Question'].strip()}"
            return {
                "id": raw.get("ID", raw["id"]),
                "question": question,
                "solution": raw["Equation"],
                "answer": str(raw["Answer"]),
            }
        if "solution" in raw:
            return dict(raw)
        solution, _, answer = str(raw["answer"]).rpartition(MARKER)
        return {**raw, "solution": solution.strip(), "answer": answer.strip().replace(",", "")}

    def problem(self, row: Row) -> str:
        """The question."""
        return row["question"]

    def prompt(self, row: Row) -> str:
        """The question, and the form that the final answer must have."""
        return f"{row['question']}\n{INSTRUCTION}"

    def answer(self, row: Row) -> str:
        """The worked solution and the line `#### n`."""
        solution = without_calculator(row["solution"]).strip()
        if equation := re.fullmatch(r"\(\s*(.+?)\s*\)", solution):  # SVAMP's: ( 8.0 - 7.0 )
            solution = re.sub(r"\.0\b", "", equation[1]) + f" = {row['answer']}"
        return f"\n{solution}\n{MARKER} {row['answer']}"

    def target_spans(self, row: Row) -> Sequence[Span]:
        """What follows the last `#### `."""
        return spans.final(self.prompt(row), self.answer(row), row)

    def score(self, row: Row, output: str) -> Score:
        """Strict: the number after `####`. Lenient: the number that is said to be the answer, else the last one."""
        spoken = without_thoughts(output)
        strict, lenient = number_answers(until_next_question(spoken.text, row["question"]))
        return scored(row["answer"], strict, lenient, same=same_number, is_unfinished=spoken.is_unfinished)


ARITHMETIC = WordProblems(
    "arithmetic", {split: f"builtin:arithmetic:{split}" for split in ("train", "calibration", "test")}
)
GSM8K = WordProblems("gsm8k", {"train": "openai/gsm8k:main:train", "test": "openai/gsm8k:main:test"}, 1319)
SVAMP = WordProblems("svamp", {"train": "ChilleD/SVAMP::train", "test": "ChilleD/SVAMP::test"}, 300)


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
        return f"{row['problem'].strip()}\n{BOXED_INSTRUCTION}"

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
