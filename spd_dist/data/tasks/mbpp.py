"""MBPP: short Python programs, judged by running their tests."""

from __future__ import annotations

import ast
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from spd_dist.data import spans
from spd_dist.data.extract import fenced
from spd_dist.data.spans import Span
from spd_dist.data.tasks.protocol import Metric, Row, Score, Split
from spd_dist.errors import ConfigError

Execute = Callable[[str, Sequence[str], str], bool]
"""The seam for the sandbox: whether `code` passes all `tests` after `setup`. It must be safe to call from threads."""

HUB = "google-research-datasets/mbpp"
_FIRST_LINE_OF_CODE = re.compile(r"^(def |import |from |class |@|async def )", re.MULTILINE)


@dataclass(frozen=True)
class Mbpp:
    """MBPP in its full or its sanitized form; both train on all 464 training and validation rows."""

    name: str
    sources: Mapping[Split, str]
    test_size: int | None
    execute: Execute | None = None
    metric: Metric = "accuracy"
    fields: Mapping[str, type] = field(default_factory=lambda: {"prompt": str, "code": str, "tests": list})

    def normalise(self, raw: Mapping[str, Any], subset: str) -> Row | None:
        """The hub's forms: `text` and `test_list`, in the sanitized one `prompt` and `test_imports`."""
        if "test_list" not in raw:
            return {"setup": "", **raw}
        setup = raw["test_setup_code"] if "test_setup_code" in raw else "\n".join(raw["test_imports"])
        prompt = raw["text"] if "text" in raw else raw["prompt"]
        tests = list(raw["test_list"])
        return {"id": f"mbpp/{raw['task_id']}", "prompt": prompt, "code": raw["code"], "tests": tests, "setup": setup}

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
        if self.execute is None:
            raise refusal(self.name)
        strict = fenced(output)
        lenient = python_in(output)
        program = strict if strict is not None else lenient
        correct = program is not None and self.execute(program, row["tests"], row["setup"])
        in_form = correct and strict is not None
        return Score(
            correct, program, row["code"], strict, lenient, in_form, in_form or (correct and program == lenient)
        )


def refusal(name: str) -> ConfigError:
    """What there is to say where a task must run programs and nobody allowed it."""
    return ConfigError(
        f"evaluate.allow_code_execution: false, but {name} is scored by running model-written programs; "
        "set evaluate.allow_code_execution=true to run them in the sandbox, or evaluate another task"
    )


def python_in(text: str) -> str | None:
    """A fenced block, else the most lines that parse as Python, from the first that opens a definition or import."""
    block = fenced(text)
    if block is not None:
        return block
    start = _FIRST_LINE_OF_CODE.search(text)
    lines = text[start.start() :].splitlines() if start else []
    for stop in range(len(lines), 0, -1):
        if parses("\n".join(lines[:stop])):
            return "\n".join(lines[:stop]).rstrip()
    return None


def parses(program: str) -> bool:
    """Whether `program` is Python."""
    try:
        with warnings.catch_warnings(action="ignore"):  # of the model's program, as an invalid escape
            ast.parse(program)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return True


_TRAIN = f"{HUB}:full:train,{HUB}:full:validation"
MBPP = Mbpp("mbpp", {"train": _TRAIN, "test": f"{HUB}:full:test"}, 500)
MBPP_SANITIZED = Mbpp("mbpp_sanitized", {"train": _TRAIN, "test": f"{HUB}:sanitized:test"}, 257)
