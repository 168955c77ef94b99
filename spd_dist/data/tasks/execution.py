"""Scores of tasks whose answers are programs: the tests decide, in the sandbox, if the user opted in."""

from __future__ import annotations

from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass
from typing import Protocol

from spd_dist.data.scoring.programs import (
    parses,
    program_in,
    python_blocks,
    unfenced,
    until_done,
    until_needed,
    with_imports,
)  # fmt: skip
from spd_dist.data.scoring.thoughts import Spoken
from spd_dist.data.tasks.protocol import Score, Task
from spd_dist.errors import ConfigError


class Ran(Protocol):
    """What the sandbox says of a program."""

    @property
    def passed(self) -> bool:
        """Whether it passed all tests."""
        ...

    @property
    def kind(self) -> str:
        """Why not, in a word: `failed`, or the limit that it exceeded: `time`, `memory`, `processes`."""
        ...


Execute = Callable[[str, Sequence[str], str], Ran]
"""The seam for the sandbox: runs a program, its tests and their setup. It must be safe to call from threads."""


def runs_code(task: Task) -> bool:
    """Whether the task is scored by running programs that a model wrote."""
    return getattr(task, "execute", runs_code) is not runs_code


@dataclass(frozen=True)
class ProgramForm:
    """What an output may leave out of a program, since the prompt has it."""

    complete: Callable[[str], str] = with_imports
    """What makes a block a whole program."""
    is_whole: Callable[[str], bool] = lambda program: True
    """Whether a block needs nothing before it that the prompt has."""
    otherwise: Callable[[str], str | None] = lambda text: None
    """The program in a text that holds none of its own."""


WHOLE_PROGRAM = ProgramForm()


def judged_by_tests(
    spoken: Spoken,
    gold: str,
    execute: Callable[[str], Ran],
    *,
    called: Set[str],
    form: ProgramForm = WHOLE_PROGRAM,
) -> Score:
    """The score of an output by its tests. Strict: a fenced block is the program. Lenient: what reads as Python.

    Args:
        spoken: The output without its thoughts.
        gold: The reference program.
        execute: Runs a whole program against the tests.
        called: The names that the tests call.
        form: What the output may leave out.
    """
    text = until_done(spoken.text)
    blocks = python_blocks(text)
    strict, bare = (_if_whole(program_in(found, called), form.is_whole) for found in (blocks, unfenced(text)))
    lenient = strict or bare or form.otherwise(text) or next(filter(str.strip, blocks), None)
    ran = None if lenient is None else _ran(form.complete(lenient), called, execute)
    correct = ran is not None and ran.passed
    if correct:
        reason = "right"
    elif spoken.is_unfinished:
        reason = "unfinished"
    else:
        reason = "no answer" if ran is None else ran.kind
    in_form = correct and strict is not None
    return Score(correct, lenient, gold, strict, lenient, in_form, correct, reason)


def _if_whole(program: str | None, is_whole: Callable[[str], bool]) -> str | None:
    return program if program is not None and is_whole(program) else None


def _ran(program: str, called: Set[str], execute: Callable[[str], Ran]) -> Ran:
    """How the program fares as it is; if it fails, without what it does behind its definitions."""
    ran = execute(program)
    if ran.passed or not parses(program):
        return ran
    alone = until_needed(program, called)
    if alone.strip() != program.strip() and (again := execute(alone)).passed:
        return again
    return ran


def allowed(name: str, execute: Execute | None) -> Execute:
    """`execute`, if there is one.

    Raises:
        ConfigError: nothing was given to run programs with.
    """
    if execute is None:
        raise refusal(name)
    return execute


def refusal(name: str) -> ConfigError:
    """What there is to say where a task must run programs and nobody allowed it."""
    return ConfigError(
        f"evaluate.allow_code_execution: false, but {name} is scored by running model-written programs; "
        "set evaluate.allow_code_execution=true to run them in the sandbox, or evaluate another task"
    )
