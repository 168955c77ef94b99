"""CodeAlpaca: instructions with reference programs, measured by the likelihood of those."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from spd_dist.data import spans
from spd_dist.data.scoring.extract import fenced
from spd_dist.data.scoring.programs import parses, python_in
from spd_dist.data.spans import Span
from spd_dist.data.tasks.protocol import Metric, Row, Score, Split

HUB = "sahil2801/CodeAlpaca-20k"


@dataclass(frozen=True)
class CodeAlpaca:
    """The held-out part is the last 100 rows, as in the paper's prototype."""

    name: str = "codealpaca"
    metric: Metric = "nll"
    test_size: int | None = None
    fields: Mapping[str, type] = field(default_factory=lambda: {"instruction": str, "input": str, "output": str})
    sources: Mapping[Split, str] = field(
        default_factory=lambda: {"train": f"{HUB}::train[:-100]", "test": f"{HUB}::train[-100:]"}
    )

    def normalise(self, raw: Mapping[str, Any], subset: str) -> Row | None:
        """Rows with an empty output are dropped: they have nothing to be measured on."""
        return {"input": "", **raw} if raw["output"].strip() else None

    def problem(self, row: Row) -> str:
        """Instruction and input."""
        return f"{row['instruction']}\n{row['input']}"

    def prompt(self, row: Row) -> str:
        """The instruction, with its input if it has one."""
        given = f"\nInput: {row['input'].strip()}" if row["input"].strip() else ""
        return f"Instruction: {row['instruction'].strip()}{given}\nCode:"

    def answer(self, row: Row) -> str:
        """The reference output, after a space."""
        return f" {row['output'].strip()}"

    def target_spans(self, row: Row) -> Sequence[Span]:
        """The whole reference: nothing shorter defines correctness here."""
        return spans.whole_answer(self.prompt(row), self.answer(row), row)

    def score(self, row: Row, output: str) -> Score:
        """Whether the output is Python that parses: a diagnostic beside the likelihood, which is the metric."""
        strict, lenient = fenced(output), python_in(output) or _whole(output)
        in_form, anywhere = strict is not None and parses(strict), lenient is not None and parses(lenient)
        extracted = strict if strict is not None else lenient
        correct = in_form if strict is not None else anywhere
        reason = "right" if correct else "no answer" if extracted is None else "failed"
        return Score(correct, extracted, row["output"], strict, lenient, in_form, anywhere, reason)


def _whole(output: str) -> str | None:
    program = output.strip()
    return program if program and parses(program) else None


CODEALPACA = CodeAlpaca()
