"""MBPP: short Python programs, judged by running their tests."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from spd_dist.data import spans
from spd_dist.data.scoring.programs import program_in, python_blocks, unfenced, with_imports
from spd_dist.data.scoring.thoughts import without_thoughts
from spd_dist.data.spans import Span
from spd_dist.data.tasks.protocol import Metric, Row, Score, Split
from spd_dist.errors import ConfigError, DataError

Execute = Callable[[str, Sequence[str], str], bool]
"""The seam for the sandbox: whether `code` passes all `tests` after `setup`. It must be safe to call from threads."""

HUB = "google-research-datasets/mbpp"


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
        setup = raw["test_setup_code"] if "test_setup_code" in raw else "\n".join(raw.get("test_imports", ()))
        prompt = raw["text"] if "text" in raw else raw["prompt"]
        tests = list(raw["test_list"])
        if any("def check(" in test for test in tests):
            raise DataError(
                f"mbpp row {raw['task_id']!r}: its test_list defines check(candidate) and calls nothing, as "
                "HumanEval's rows do, so that every program would fail; give MBPP's own rows, whose tests are asserts"
            )
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
        spoken = without_thoughts(output)
        blocks = python_blocks(spoken.text)
        strict = program_in(blocks, row["tests"])
        lenient = strict or program_in(unfenced(spoken.text), row["tests"]) or next(filter(str.strip, blocks), None)
        correct = lenient is not None and self.execute(with_imports(lenient), row["tests"], row["setup"])
        if correct:
            reason = "right"
        elif spoken.is_unfinished:
            reason = "unfinished"
        else:
            reason = "no answer" if lenient is None else "failed"
        in_form = correct and strict is not None
        return Score(correct, lenient, row["code"], strict, lenient, in_form, correct, reason)


def refusal(name: str) -> ConfigError:
    """What there is to say where a task must run programs and nobody allowed it."""
    return ConfigError(
        f"evaluate.allow_code_execution: false, but {name} is scored by running model-written programs; "
        "set evaluate.allow_code_execution=true to run them in the sandbox, or evaluate another task"
    )


_TRAIN = f"{HUB}:full:train,{HUB}:full:validation"
MBPP = Mbpp("mbpp", {"train": _TRAIN, "test": f"{HUB}:full:test"}, 500)
MBPP_SANITIZED = Mbpp("mbpp_sanitized", {"train": _TRAIN, "test": f"{HUB}:sanitized:test"}, 257)
