"""HumanEval and HumanEval+: functions to be written from signature and docstring, judged by `check(candidate)`."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from spd_dist.data import spans
from spd_dist.data.scoring.programs import longest_program, parses, python_blocks, with_imports
from spd_dist.data.scoring.thoughts import without_thoughts
from spd_dist.data.spans import Span
from spd_dist.data.tasks.execution import Execute, ProgramForm, allowed, judged_by_tests
from spd_dist.data.tasks.protocol import Metric, Row, Score, Split
from spd_dist.errors import DataError

INSTRUCTION = "Complete this function. Answer with the whole program in one block of Python."


@dataclass(frozen=True)
class HumanEval:
    """Rows have `prompt` (a program that ends in signature and docstring), `solution`, `test` and `entry_point`."""

    name: str
    sources: Mapping[Split, str]
    execute: Execute | None = None
    metric: Metric = "accuracy"
    test_size: int | None = 164
    fields: Mapping[str, type] = field(
        default_factory=lambda: dict.fromkeys(("prompt", "solution", "test", "entry_point"), str)
    )

    def normalise(self, raw: Mapping[str, Any], subset: str) -> Row | None:
        """The hub's `canonical_solution` and `task_id`."""
        if "entry_point" not in raw and "test_list" in raw:
            raise DataError(
                f"{self.name} row {raw.get('task_id')!r}: it has test_list and no entry_point: it is a row of MBPP; "
                "take the task mbpp or mbpp_plus for it"
            )
        row = {**raw, "id": str(raw.get("task_id", raw["id"])), "solution": raw.get("canonical_solution", "")}
        if f"def {row['entry_point']}" not in row["prompt"] or "def check(" not in row["test"]:
            raise DataError(
                f"{self.name} row {row['id']!r}: its prompt must define {row['entry_point']!r} and its test "
                "check(candidate), as HumanEval's rows do; correct the row, or take another task"
            )
        return row

    def problem(self, row: Row) -> str:
        """The signature and docstring."""
        return row["prompt"]

    def prompt(self, row: Row) -> str:
        """The program to complete, in a fence."""
        return f"{INSTRUCTION}\n```python\n{row['prompt'].strip()}\n```\n"

    def answer(self, row: Row) -> str:
        """The whole reference program, in a fence."""
        return f"```python\n{row['prompt'].strip()}\n{row['solution'].rstrip()}\n```"

    def target_spans(self, row: Row) -> Sequence[Span]:
        """The body of the reference: the tests are not shown."""
        prompt, answer = self.prompt(row), self.answer(row)
        return spans.occurrences(row["solution"].strip(), prompt + answer)

    def score(self, row: Row, output: str) -> Score:
        """Strict: the fenced block that defines the function. Lenient: or what goes on from the prompt.

        Raises:
            ConfigError: nothing was given to run programs with.
        """
        execute, name = allowed(self.name, self.execute), row["entry_point"]
        tests = [f"{row['test']}\n\ncheck({name})"]

        def is_whole(block: str) -> bool:
            defined = rf"^(?:async )?def {re.escape(name)}\b|^{re.escape(name)} *="
            return re.search(defined, block, re.MULTILINE) is not None

        def complete(block: str) -> str:
            above = row["prompt"].rpartition(f"def {name}")[0]
            return with_imports(f"{above}\n{block}" if is_whole(block) else f"{row['prompt'].rstrip()}\n{block}")

        def continued(text: str) -> str | None:
            blocks = [block for block in python_blocks(text) if block.strip()]
            lines = (blocks[-1] if blocks else text.partition("```")[0]).strip("\n").splitlines()
            return longest_program(_as_body(lines), after=row["prompt"].rstrip())

        return judged_by_tests(
            without_thoughts(output), row["solution"], lambda program: execute(program, tests, ""),
            called={name}, form=ProgramForm(complete, is_whole, continued),
        )  # fmt: skip


def _as_body(lines: list[str]) -> list[str]:
    """Lines that go on from a signature, indented as its body also where their first or every indentation is lost."""
    if not lines or lines[0][:1].isspace():
        return lines
    is_lost_everywhere = parses("\n".join(["def f():", *(f"    {line}" for line in lines)]))
    return [f"    {line}" for line in lines] if is_lost_everywhere else [f"    {lines[0]}", *lines[1:]]


HUMANEVAL = HumanEval("humaneval", {"test": "openai/openai_humaneval::test"})
HUMANEVAL_PLUS = HumanEval("humaneval_plus", {"test": "evalplus/humanevalplus::test"})
