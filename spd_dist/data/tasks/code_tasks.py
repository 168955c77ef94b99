"""Tasks whose answers are programs: HumanEval and MBPP, which tests judge, and CodeAlpaca, measured by likelihood."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from spd_dist.data import spans
from spd_dist.data.scoring.extract import fenced
from spd_dist.data.scoring.programs import (
    called_by,
    helpers,
    longest_program,
    parses,
    python_blocks,
    python_in,
    with_imports,
)
from spd_dist.data.scoring.thoughts import without_thoughts
from spd_dist.data.spans import Span
from spd_dist.data.tasks.execution import Execute, ProgramForm, allowed, judged_by_tests
from spd_dist.data.tasks.protocol import Metric, Row, Score, Split
from spd_dist.errors import DataError

HUMANEVAL_INSTRUCTION = "Complete this function. Answer with the whole program in one block of Python."
MBPP_HUB = "google-research-datasets/mbpp"
CODEALPACA_HUB = "sahil2801/CodeAlpaca-20k"


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
                f"{self.name} row {row['id']!r}: its prompt must define {row['entry_point'][:60]!r} and its test "
                "check(candidate), as HumanEval's rows do; correct the row, or take another task"
            )
        return row

    def problem(self, row: Row) -> str:
        """The signature and docstring."""
        return row["prompt"]

    def prompt(self, row: Row) -> str:
        """The program to complete, in a fence."""
        return f"{HUMANEVAL_INSTRUCTION}\n```python\n{row['prompt'].strip()}\n```\n"

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
        setup = helpers(row["prompt"], name, tests)

        def is_whole(block: str) -> bool:
            defined = rf"^(?:async )?def {re.escape(name)}\b|^{re.escape(name)} *="
            return re.search(defined, block, re.MULTILINE) is not None

        def complete(block: str) -> str:
            above = row["prompt"].rpartition(f"def {name}")[0]
            return with_imports(f"{above}\n{block}" if is_whole(block) else f"{row['prompt'].rstrip()}\n{block}")

        def continued(text: str) -> str | None:
            blocks = [block for block in python_blocks(text) if block.strip()]
            for block in [*reversed(blocks), text.partition("```")[0]]:  # a fence may only have been closed
                body = longest_program(_as_body(block.strip("\n").splitlines()), after=row["prompt"].rstrip())
                if body and body.strip():
                    return body
            return None

        return judged_by_tests(
            without_thoughts(output), row["solution"], lambda program: execute(program, tests, setup),
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


@dataclass(frozen=True)
class Mbpp:
    """MBPP in its full or its sanitized form; both train on all 464 training and validation rows."""

    name: str
    sources: Mapping[Split, str]
    test_size: int | None
    is_plus: bool = False
    """Whether EvalPlus's program `test` decides, which tries many more inputs, and not the tests that are shown."""
    execute: Execute | None = None
    metric: Metric = "accuracy"
    fields: Mapping[str, type] = field(default_factory=lambda: {"prompt": str, "code": str, "tests": list})

    def normalise(self, raw: Mapping[str, Any], subset: str) -> Row | None:
        """The hub's forms: `text` and `test_list`, in the sanitized one `prompt` and `test_imports`."""
        number = raw.get("task_id", raw.get("id"))
        if "test_list" not in raw and "entry_point" in raw:
            raise DataError(
                f"{self.name} row {number!r}: it has entry_point and no test_list: it is a row of HumanEval; take the "
                "task humaneval or humaneval_plus for it"
            )
        tests = raw.get("test_list", raw.get("tests"))
        if isinstance(tests, list) and not all(isinstance(test, str) for test in tests):
            raise DataError(f"{self.name} row {number!r}: a test is no text; write each as an assert")
        if "test_list" not in raw:
            return {"setup": "", **raw}
        imports = "\n".join(raw.get("test_imports") or ())
        prompt = raw["text"] if "text" in raw else raw["prompt"]
        if isinstance(tests, str):
            raise DataError(
                f"{self.name} row {number!r}: its test_list is one text; write it as a list of texts, each an assert"
            )
        if any("def check(" in test for test in tests):
            raise DataError(
                f"{self.name} row {number!r}: its test_list defines check(candidate) and calls nothing, as "
                "HumanEval's rows do, so that every program would fail; give MBPP's own rows, whose tests are asserts"
            )
        row = {"id": f"mbpp/{number}", "prompt": prompt, "code": raw["code"], "tests": tests}
        more = {"more_tests": raw["test"]} if self.is_plus else {}
        return {**row, "setup": raw.get("test_setup_code") or imports, **more}

    def problem(self, row: Row) -> str:
        """The instruction: the tests may differ."""
        return row["prompt"]

    def prompt(self, row: Row) -> str:
        """The instruction and the tests, as the paper's prototype words them."""
        tests = "\n".join(test.strip() for test in row["tests"])
        return f"Instruction: {row['prompt'].strip()}\nYour code should pass these tests:\n{tests}\nCode:"

    def answer(self, row: Row) -> str:
        """The reference program; it stands behind the supervised tokens, so calibration does not depend on it."""
        return f"\n{row['code'].replace(chr(13), '').strip()}"

    def target_spans(self, row: Row) -> Sequence[Span]:
        """Every occurrence of every assertion, which all lie in the prompt."""
        return spans.asserts(self.prompt(row), self.answer(row), row)

    def score(self, row: Row, output: str) -> Score:
        """Strict: a fenced block is the program. Lenient: what reads as Python. The tests decide.

        Raises:
            ConfigError: nothing was given to run programs with.
        """
        execute = allowed(self.name, self.execute)
        shown = row["tests"]
        tests = [row["more_tests"]] if self.is_plus else shown
        spoken = without_thoughts(output)
        return judged_by_tests(
            spoken, row["code"], lambda program: execute(program, tests, row["setup"]), called=called_by(shown)
        )


_MBPP_TRAIN = f"{MBPP_HUB}:full:train,{MBPP_HUB}:full:validation"
MBPP = Mbpp("mbpp", {"train": _MBPP_TRAIN, "test": f"{MBPP_HUB}:full:test"}, 500)
MBPP_SANITIZED = Mbpp("mbpp_sanitized", {"train": _MBPP_TRAIN, "test": f"{MBPP_HUB}:sanitized:test"}, 257)
MBPP_PLUS = Mbpp("mbpp_plus", {"train": _MBPP_TRAIN, "test": "evalplus/mbppplus::test"}, 378, is_plus=True)


@dataclass(frozen=True)
class CodeAlpaca:
    """The held-out part is the last 100 rows, as in the paper's prototype."""

    name: str = "codealpaca"
    metric: Metric = "nll"
    test_size: int | None = None
    fields: Mapping[str, type] = field(default_factory=lambda: {"instruction": str, "input": str, "output": str})
    sources: Mapping[Split, str] = field(
        default_factory=lambda: {"train": f"{CODEALPACA_HUB}::train[:-100]", "test": f"{CODEALPACA_HUB}::train[-100:]"}
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
