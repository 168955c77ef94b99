"""MMLU: multiple choice over 57 subjects."""

from __future__ import annotations

import re
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from spd_dist.data import spans
from spd_dist.data.spans import Span
from spd_dist.data.tasks.protocol import Metric, Row, Score, Split, scored

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
        """The hub numbers the answers from 0."""
        answer = raw["answer"]
        return {**raw, "answer": string.ascii_uppercase[answer] if isinstance(answer, int) else answer}

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

    def target_spans(self, row: Row) -> Sequence[Span]:
        """The letter after the last `Answer:`."""
        return spans.letter(self.prompt(row), self.answer(row), row)

    def score(self, row: Row, output: str) -> Score:
        """Strict: the output opens with a letter, or says what the answer is. Lenient: the first letter on its own."""
        letters = _letters(row)
        return scored(row["answer"], stated_letter(output, letters), lone_letter(output, letters), same=str.__eq__)


def stated_letter(text: str, letters: str) -> str | None:
    """The letter that `text` opens with, or the last one after `answer is` or `Answer:`."""
    if opening := re.match(rf"[\s*(\"']*([{letters}])(?=[\s*).:,\"']|\Z)(?! [a-z])", text):
        return opening[1]
    said = re.findall(rf"\b[Aa]nswer(?: is|:)[\s*(:]*(?:option |choice )?\(?([{letters}])\b(?! [a-z])", text)
    return said[-1] if said else None


def lone_letter(text: str, letters: str) -> str | None:
    """The first of `letters` that stands alone."""
    match = re.search(rf"(?<![A-Za-z'])([{letters}])(?![A-Za-z'])", text)
    return match[1] if match else None


def _letters(row: Row) -> str:
    return string.ascii_uppercase[: len(row["choices"])]


MMLU = Mmlu()
