"""Word problems with a number as the result: built-in arithmetic, GSM8K, SVAMP."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from spd_dist.data import spans
from spd_dist.data.scoring.extract import without_calculator
from spd_dist.data.scoring.numbers import MARKER, same_number
from spd_dist.data.scoring.statements import number_answers
from spd_dist.data.scoring.thoughts import until_next_question, without_thoughts
from spd_dist.data.spans import Span
from spd_dist.data.tasks.protocol import Metric, Row, Score, Split, scored

INSTRUCTION = f"Give the final answer after '{MARKER} '."


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
