"""Tasks by name: built in, installed as plug-ins, or described in a YAML file."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from importlib.metadata import entry_points

from spd_dist.data.tasks.protocol import Row, Score, Split, Task
from spd_dist.data.tasks.word_problems import ARITHMETIC, GSM8K, SVAMP
from spd_dist.errors import ConfigError

__all__ = ["TASKS", "Row", "Score", "Split", "Task", "find_task"]

ENTRY_POINTS = "spd_dist.tasks"
TASKS: Mapping[str, Task] = {task.name: task for task in (ARITHMETIC, GSM8K, SVAMP)}
"""Built-in tasks; a package adds its own as entry points of group `spd_dist.tasks`."""


def find_task(name: str) -> Task:
    """The task that `data.task` names.

    Raises:
        ConfigError: no built-in task and no entry point has that name.
    """
    if name in TASKS:
        return TASKS[name]
    for point in entry_points(group=ENTRY_POINTS, name=name):
        return point.load()
    known = [*TASKS, *(point.name for point in entry_points(group=ENTRY_POINTS))]
    nearest = difflib.get_close_matches(name, known, 1, 0)[0]
    raise ConfigError(f"data.task: {name!r} is not a task; the nearest is {nearest}; known are {', '.join(known)}")
