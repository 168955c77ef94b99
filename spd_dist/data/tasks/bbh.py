"""BIG-Bench Hard: 27 tasks, answered without examples and compared after normalising."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from spd_dist.data import spans
from spd_dist.data.extract import last_number
from spd_dist.data.spans import Span
from spd_dist.data.tasks.protocol import Metric, Row, Score, Split, scored

INSTRUCTION = "Give only the answer, without an explanation."
SUBTASKS = (
    "boolean_expressions", "causal_judgement", "date_understanding", "disambiguation_qa", "dyck_languages",
    "formal_fallacies", "geometric_shapes", "hyperbaton", "logical_deduction_five_objects",
    "logical_deduction_seven_objects", "logical_deduction_three_objects", "movie_recommendation",
    "multistep_arithmetic_two", "navigate", "object_counting", "penguins_in_a_table",
    "reasoning_about_colored_objects", "ruin_names", "salient_translation_error_detection", "snarks",
    "sports_understanding", "temporal_sequences", "tracking_shuffled_objects_five_objects",
    "tracking_shuffled_objects_seven_objects", "tracking_shuffled_objects_three_objects", "web_of_lies",
    "word_sorting",
)  # fmt: skip
WORDS = ("true", "false", "yes", "no", "valid", "invalid")
"""Answers that are one of two words."""


@dataclass(frozen=True)
class Bbh:
    """Rows have `task` (one of the 27), `input` and `target`; there is no training split."""

    name: str = "bbh"
    metric: Metric = "accuracy"
    test_size: int | None = 6511
    fields: Mapping[str, type] = field(default_factory=lambda: {"task": str, "input": str, "target": str})
    sources: Mapping[Split, str] = field(
        default_factory=lambda: {"test": ",".join(f"lukaemon/bbh:{name}:test" for name in SUBTASKS)}
    )

    def normalise(self, raw: Mapping[str, Any], subset: str) -> Row | None:
        """The hub has a config a task."""
        return {"task": subset, **raw}

    def problem(self, row: Row) -> str:
        """The input."""
        return row["input"]

    def prompt(self, row: Row) -> str:
        """The input, as it is."""
        return f"{INSTRUCTION}\n{row['input'].strip()}\nAnswer:"

    def answer(self, row: Row) -> str:
        """The target, after a space."""
        return f" {row['target']}"

    def target_spans(self, row: Row) -> Sequence[Span]:
        """The whole target."""
        return spans.whole_answer(self.prompt(row), self.answer(row), row)

    def score(self, row: Row, output: str) -> Score:
        """Strict: the first line is the answer. Lenient: the last thing in the output that has the target's form."""
        gold = row["target"]
        first_line = re.sub(r"^(the )?answer( is|:)\s*", "", output.strip().partition("\n")[0], flags=re.IGNORECASE)
        strict = _option_at_start(first_line) if _is_option(gold) else first_line.strip() or None
        return scored(gold, strict, _last_of_form(gold, output), same=same_text)


def same_text(left: str, right: str) -> bool:
    """Equality up to case, white space, commas, quotes and a full stop."""
    return _plain(left) == _plain(right)


def _plain(text: str) -> str:
    plain = re.sub(r"[\s,]+", " ", text.casefold()).strip(" .*\"'`")
    return plain if re.search(r"\w", plain) else plain.replace(" ", "")


def _is_option(target: str) -> bool:
    return re.fullmatch(r"\([A-Z]\)", target) is not None


def _option_at_start(line: str) -> str | None:
    match = re.match(r"[\s*]*(?:\(([A-Z])\)|([A-Z])(?:[).:*]|\s*\Z))", line)
    return f"({match[1] or match[2]})" if match else None


def _last_of_form(target: str, output: str) -> str | None:
    """The last option, word or number of `output`, whichever the target is; else its last line."""
    if _is_option(target):
        options = re.findall(r"\([A-Z]\)", output)
        return options[-1] if options else _option_at_start(output)
    if target.casefold() in WORDS:
        words = re.findall(rf"\b({'|'.join(WORDS)})\b", output, re.IGNORECASE)
        return words[-1] if words else None
    if re.fullmatch(r"-?\d+", target):
        return last_number(output)
    lines = [line for line in output.splitlines() if line.strip()]
    return lines[-1].strip() if lines else None


BBH = Bbh()
