"""The held-out examples that every arm answers."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from spd_dist.config import Config
from spd_dist.data.prompts import make_examples, make_prompts
from spd_dist.data.tasks.protocol import Row, Task
from spd_dist.data.templates import Tokenizer
from spd_dist.types import Prompt, SupervisedExample


@dataclass(frozen=True)
class TestSet:
    """The held-out examples, the same for every arm."""

    __test__ = False  # not for pytest to collect

    task: Task
    rows: Sequence[Row]
    prompts: Sequence[Prompt]
    """One a row, in the same order."""
    examples: Sequence[SupervisedExample] = ()
    """One a row, in the same order, for a task that is measured by the likelihood of its reference answers."""
    seed: int = 0
    """With an example's id and the sample's index it makes an answer, if answers are sampled."""

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt."""
        return max((len(prompt.tokens) for prompt in self.prompts), default=0)


def make_test_set(rows: Sequence[Row], task: Task, tokenizer: Tokenizer, config: Config) -> TestSet:
    """The rows as every arm is asked them, and the seed of what is sampled.

    Raises:
        ConfigError: no chat template.
        DataError: a prompt is too long; a reference answer is empty or cut off at `calibrate.max_tokens`.
    """
    prompts = make_prompts(rows, task, tokenizer, config.data)
    if task.metric != "nll":
        return TestSet(task, rows, prompts, seed=config.seed)
    answers = dataclasses.replace(config.calibrate, num_examples=max(1, len(rows)), mask="answer", allow_empty=False)
    examples, _ = make_examples(rows, task, tokenizer, config.data, answers)
    return TestSet(task, rows, prompts, examples, config.seed)
