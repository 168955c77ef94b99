"""Tasks by name: built in, installed as plug-ins, or described in a YAML file."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import hashlib
from collections.abc import Mapping
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import spd_dist
from spd_dist.config import Config
from spd_dist.data.tasks.bbh import BBH
from spd_dist.data.tasks.code_tasks import CODEALPACA, HUMANEVAL, HUMANEVAL_PLUS, MBPP, MBPP_PLUS, MBPP_SANITIZED
from spd_dist.data.tasks.described import MESSAGES, DescribedTask, read_task
from spd_dist.data.tasks.execution import Execute, refusal, runs_code
from spd_dist.data.tasks.math_tasks import ARITHMETIC, GSM8K, MATH, SVAMP
from spd_dist.data.tasks.mmlu import MMLU
from spd_dist.data.tasks.protocol import Row, Score, Split, Task
from spd_dist.errors import ConfigError

__all__ = [
    "TASKS", "Execute", "Row", "Score", "Split", "Task", "check_tasks", "find_task", "judging_code", "refusal",
    "runs_code", "said_by_file", "with_execution",
]  # fmt: skip

ENTRY_POINTS = "spd_dist.tasks"
JUDGES = ("data/scoring", "data/tasks", "sandbox")
_BUILT_IN: tuple[Task, ...] = (
    ARITHMETIC, GSM8K, SVAMP, MATH, MBPP, MBPP_SANITIZED, MBPP_PLUS, HUMANEVAL, HUMANEVAL_PLUS, CODEALPACA, MESSAGES,
    MMLU, BBH,
)  # fmt: skip
TASKS: Mapping[str, Task] = {task.name: task for task in _BUILT_IN}
"""Built-in tasks; a package adds its own as entry points of group `spd_dist.tasks`."""


def find_task(name: str, key: str = "data.task") -> Task:
    """The task that the setting `key` names: built in, an entry point, or the path of a YAML file.

    Raises:
        ConfigError: no task has that name, or its file does not describe one.
    """
    if name in TASKS:
        return TASKS[name]
    if name.endswith((".yaml", ".yml")):
        return read_task(name)
    for point in entry_points(group=ENTRY_POINTS, name=name):
        return point.load()
    known = [*TASKS, *(point.name for point in entry_points(group=ENTRY_POINTS))]
    nearest = difflib.get_close_matches(name, known, 1, 0)[0]
    raise ConfigError(
        f"{key}: {name!r} is not a task; the nearest is {nearest}; "
        f"known are {', '.join(known)}, and paths of .yaml files"
    )


def check_tasks(config: Config) -> None:
    """See that the tasks of a run are there: it takes no torch, so a wrong word is said at once.

    Raises:
        ConfigError: as of `find_task`.
    """
    find_task(config.data.task)
    for word in config.evaluate.also:
        find_task(word.partition("=")[0], "evaluate.also")


def said_by_file(task: Task) -> Mapping[str, Mapping[str, Any]]:
    """What the file of a described task says, by the section of the config whose readers read it; else nothing."""
    return task.description.by_section if isinstance(task, DescribedTask) else {}


@functools.cache
def judging_code() -> str:
    """Which code judges here, as `spd_dist VERSION (DIGEST)`: the verdicts of another one may differ."""
    package, digest = Path(spd_dist.__file__).parent, hashlib.sha256()
    for file in sorted(file for room in JUDGES for file in (package / room).rglob("*.py")):
        digest.update(file.read_bytes())
    return f"spd_dist {spd_dist.__version__} ({digest.hexdigest()[:8]})"


def with_execution(task: Task, execute: Execute) -> Task:
    """The task, able to run the programs that it is scored by; other tasks as they are."""
    if runs_code(task) and dataclasses.is_dataclass(task) and not isinstance(task, type):
        return dataclasses.replace(task, execute=execute)
    return task
