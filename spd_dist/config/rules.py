"""Rules that tie fields together beyond pairs of values, which `combinations.py` has; each error names the keys."""

from __future__ import annotations

import datetime

from spd_dist.config.combinations import check_combinations
from spd_dist.config.whole import Config
from spd_dist.errors import ConfigError


def check_across_fields(config: Config) -> None:
    """Refuse what does not go together.

    Raises:
        ConfigError: two fields that are each valid, and not together.
    """
    check_combinations(config)
    if (config.finetune.keep_every or 0) % config.finetune.checkpoint_every:
        raise ConfigError(
            f"finetune.keep_every: {config.finetune.keep_every} is not valid; it must be a multiple of "
            f"finetune.checkpoint_every={config.finetune.checkpoint_every}"
        )
    tasks = [config.data.task, *(word.partition("=")[0] for word in config.evaluate.also)]
    twice = next((task for task in tasks if tasks.count(task) > 1), None)
    if twice is not None:
        raise ConfigError(
            f"evaluate.also: {list(config.evaluate.also)} is not valid; {twice!r} is answered already, name each once"
        )
    if len(config.data.thinking_marks) not in (0, 2) or "" in config.data.thinking_marks:
        raise ConfigError(
            f"data.thinking_marks: {list(config.data.thinking_marks)} is not valid; give the two marks of a thought, "
            "as in ['<think>','</think>']"
        )
    if not _is_date(config.data.date):
        raise ConfigError(f"data.date: {config.data.date!r} is not valid; write a day as YYYY-MM-DD")
    if not config.calibrate.layers:
        raise ConfigError("calibrate.layers: an empty list is not valid; name at least one layer, as in [middle,last]")
    if config.generate.task_index >= config.generate.num_tasks:
        raise ConfigError(
            f"generate.task_index: {config.generate.task_index} is out of bounds; "
            f"it must be below generate.num_tasks={config.generate.num_tasks}"
        )


def _is_date(text: str) -> bool:
    try:
        return datetime.date.fromisoformat(text).isoformat() == text
    except ValueError:
        return False
