"""MBPP and MBPP+: short Python programs, judged by running their tests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from spd_dist.data import spans
from spd_dist.data.scoring.programs import called_by
from spd_dist.data.scoring.thoughts import without_thoughts
from spd_dist.data.spans import Span
from spd_dist.data.tasks.execution import Execute, allowed, judged_by_tests
from spd_dist.data.tasks.protocol import Metric, Row, Score, Split
from spd_dist.errors import DataError

HUB = "google-research-datasets/mbpp"


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
        if "test_list" not in raw:
            return {"setup": "", **raw}
        imports = "\n".join(raw.get("test_imports") or ())
        prompt = raw["text"] if "text" in raw else raw["prompt"]
        tests = raw["test_list"]
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


_TRAIN = f"{HUB}:full:train,{HUB}:full:validation"
MBPP = Mbpp("mbpp", {"train": _TRAIN, "test": f"{HUB}:full:test"}, 500)
MBPP_SANITIZED = Mbpp("mbpp_sanitized", {"train": _TRAIN, "test": f"{HUB}:sanitized:test"}, 257)
MBPP_PLUS = Mbpp("mbpp_plus", {"train": _TRAIN, "test": "evalplus/mbppplus::test"}, 378, is_plus=True)
