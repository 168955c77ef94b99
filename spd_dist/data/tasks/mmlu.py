"""MMLU: multiple choice over 57 subjects."""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from spd_dist.data import spans
from spd_dist.data.scoring.choices import committed_letter, stated_letter
from spd_dist.data.scoring.thoughts import until_next_question, without_thoughts
from spd_dist.data.spans import Span
from spd_dist.data.tasks.protocol import Metric, Row, Score, Split, scored
from spd_dist.errors import DataError

HUB = "cais/mmlu:all"
INSTRUCTION = "Give the letter of the right answer."


@dataclass(frozen=True)
class Mmlu:
    """Rows have `subject`, `question`, `choices` and the letter of the `answer`."""

    name: str = "mmlu"
    metric: Metric = "accuracy"
    test_size: int | None = 14042
    fields: Mapping[str, type] = field(default_factory=lambda: {"question": str, "choices": list, "answer": str})
    sources: Mapping[Split, str] = field(
        default_factory=lambda: {"train": f"{HUB}:auxiliary_train", "test": f"{HUB}:test"}
    )

    def normalise(self, raw: Mapping[str, Any], subset: str) -> Row | None:
        """The hub numbers the answers from 0; a CSV file, too, as text."""
        answer, choices = raw["answer"], raw["choices"]
        if isinstance(choices, list) and not 0 < len(choices) <= len(string.ascii_uppercase):
            raise DataError(f"mmlu row {raw.get('id')!r}: {len(choices)} choices; give 1 to 26")
        is_number = isinstance(answer, int) or (isinstance(answer, str) and answer.isdigit())
        return {**raw, "answer": string.ascii_uppercase[int(answer)] if is_number else answer}

    def problem(self, row: Row) -> str:
        """Question and choices."""
        return "\n".join([row["question"], *map(str, row["choices"])])

    def prompt(self, row: Row) -> str:
        """The question and its lettered choices."""
        choices = "\n".join(f"{letter}. {choice}" for letter, choice in zip(_letters(row), row["choices"], strict=True))
        return f"{INSTRUCTION}\nQuestion: {row['question'].strip()}\n{choices}\nAnswer:"

    def answer(self, row: Row) -> str:
        """The letter, after a space."""
        return f" {row['answer']}"

    def alternatives(self, row: Row) -> Sequence[Row]:
        """The row with each of its letters as the answer."""
        return [{**row, "answer": letter} for letter in _letters(row)]

    def target_spans(self, row: Row) -> Sequence[Span]:
        """The letter after the last `Answer:`."""
        return spans.letter(self.prompt(row), self.answer(row), row)

    def score(self, row: Row, output: str) -> Score:
        """Strict: the output opens with a letter, or says what the answer is. Lenient: or is a choice's text alone."""
        letters, spoken = _letters(row), without_thoughts(output)
        text = until_next_question(spoken.text, row["question"])
        lenient = committed_letter(text, letters, row["choices"])
        strict = stated_letter(text, letters, row["choices"])
        return scored(row["answer"], strict, lenient, same=str.__eq__, is_unfinished=spoken.is_unfinished)


def _letters(row: Row) -> str:
    return string.ascii_uppercase[: len(row["choices"])]


MMLU = Mmlu()
