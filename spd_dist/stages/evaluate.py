"""Greedy answers of one arm to the held-out examples, judged by the task."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from spd_dist.config import Evaluate, Generate
from spd_dist.data.tasks.protocol import Row, Task
from spd_dist.distributed.collectives import broadcast_object, together
from spd_dist.distributed.world import World
from spd_dist.errors import DataError
from spd_dist.models.decoding import Decoded, Request
from spd_dist.models.engines.in_process import opened
from spd_dist.models.engines.placement import choose_placement
from spd_dist.models.policy import Policy
from spd_dist.models.sampling import Sampling
from spd_dist.runtime.answers import (
    answers_path,
    answers_summary,
    as_row,
    part_path,
    read_parts,
    write_merged,
)
from spd_dist.runtime.completions import is_repetitive
from spd_dist.runtime.jsonl import JsonlWriter
from spd_dist.types import Answer, Completion, Projection, Prompt

log = logging.getLogger(__name__)


class Progress(Protocol):
    """What shows how far a stage has come."""

    def begin(self, total: int, skipped: int) -> None:
        """Learn how much there is, and how much of it was done before."""

    def advance(self, units: int, tokens: int = 0) -> None:
        """Count `units` more as done."""


@dataclass(frozen=True)
class TestSet:
    """The held-out examples, the same for every arm."""

    __test__ = False  # not for pytest to collect

    task: Task
    rows: Sequence[Row]
    prompts: Sequence[Prompt]
    """One a row, in the same order."""


def is_answered(folder: Path, arm: str, test_set: TestSet, world: World) -> bool:
    """Whether an earlier attempt finished this arm, so that its policy need not be loaded. A collective."""
    return _on_main(world, "looking for answers", answers_path(folder, arm, test_set.task.name).exists)


def evaluate_arm(
    policy: Policy,
    test_set: TestSet,
    config: Evaluate,
    *,
    arm: str,
    folder: Path,
    world: World,
    projection: Projection | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write `folder/ARM/TASK.jsonl`, one line an example in the order of the test set; give the arm's summary.

    A collective. The file is the same at every world size, and lines that an earlier attempt left are kept.

    Args:
        policy: The arm's policy.
        test_set: The whole of it, on every rank.
        config: Its section.
        arm: The arm's name.
        folder: The stage's.
        world: This process among all.
        projection: What the policy is held to while it answers, if the arm is the projected policy itself.
        progress: Told of each answer.

    Raises:
        DataError: no examples, a prompt that is too long, logits that are NaN, memory or disk is full.
        ConfigError: a task that runs code without leave.
    """
    if not test_set.rows:
        raise DataError(f"{test_set.task.name}: the test set is empty; set data.test, or raise data.num_test")
    merged = answers_path(folder, arm, test_set.task.name)
    todo = _todo(test_set, merged, world, progress)
    if todo is not None:
        _answer(policy, test_set, config, todo, merged, world, projection, progress)
    return _on_main(world, "merging the answers", lambda: _merge(test_set, merged))


def summary_of(folder: Path, arm: str, test_set: TestSet, world: World) -> dict[str, Any]:
    """The summary of an arm that `is_answered`. A collective."""
    merged = answers_path(folder, arm, test_set.task.name)
    return _on_main(world, "reading the answers", lambda: _merge(test_set, merged))


def _todo(test_set: TestSet, merged: Path, world: World, progress: Progress | None) -> list[Request] | None:
    """This rank's share of what is not answered yet, longest first; None if nothing is left to do on any rank."""

    def missing() -> list[int]:
        done = read_parts(merged)
        return [index for index, prompt in enumerate(test_set.prompts) if prompt.id not in done]

    indices = _on_main(world, "reading what was answered before", missing)
    if not indices:
        return None
    ordered = sorted(indices, key=lambda index: (-len(test_set.prompts[index].tokens), index))
    own = ordered[world.rank :: world.size]
    if progress is not None:
        skipped = len(test_set.prompts) - len(indices)
        progress.begin(len(own) + skipped // world.size, skipped // world.size)
    return [Request(prompt.id, 0, prompt.tokens, 0) for prompt in (test_set.prompts[index] for index in own)]


def _answer(
    policy: Policy,
    test_set: TestSet,
    config: Evaluate,
    todo: Sequence[Request],
    merged: Path,
    world: World,
    projection: Projection | None,
    progress: Progress | None,
) -> None:
    """Append this rank's answers to its part as they finish."""
    settings = Generate(placement=config.placement, batch_size=config.batch_size)
    longest = max(len(prompt.tokens) for prompt in test_set.prompts) + config.max_new_tokens
    placement = choose_placement(policy, settings, world, longest)
    sampling = Sampling(temperature=0.0, top_p=1.0, max_new_tokens=config.max_new_tokens)
    rows = {row["id"]: row for row in test_set.rows}
    with opened(policy, projection, settings, world, placement) as engine:
        if not todo:
            return
        decoded = engine.complete(todo, sampling)
        with JsonlWriter(part_path(merged, world.rank, world.size)) as part:
            for answer in _judged(decoded, lambda one: _judge(one, policy, test_set.task, rows[one.request.id])):
                part.write(as_row(answer))
                if progress is not None:
                    progress.advance(1, answer.num_tokens)


def _judged(decoded: Iterator[Decoded], judge: Callable[[Decoded], Answer]) -> Iterator[Answer]:
    """Answers in the order of `decoded`. They are judged beside the decoding: running a program takes seconds."""
    with ThreadPoolExecutor(max(1, torch.get_num_threads())) as pool:
        waiting: deque[Future[Answer]] = deque()
        for one in decoded:
            waiting.append(pool.submit(judge, one))
            while waiting and waiting[0].done():
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _judge(decoded: Decoded, policy: Policy, task: Task, row: Row) -> Answer:
    output = policy.tokenizer.decode(decoded.tokens, skip_special_tokens=True)
    request, score = decoded.request, task.score(row, output)
    completion = Completion(request.id, 0, 0, request.tokens, decoded.tokens, output, decoded.finish_reason)
    return Answer(
        id=request.id,
        output=output,
        extracted=score.extracted,
        gold=score.gold,
        correct=score.correct,
        finish_reason=decoded.finish_reason,
        num_tokens=len(decoded.tokens),
        strict=score.strict,
        lenient=score.lenient,
        strict_correct=score.strict_correct,
        lenient_correct=score.lenient_correct,
        is_repetitive=is_repetitive(completion),
    )


def _merge(test_set: TestSet, merged: Path) -> dict[str, Any]:
    """Write the merged file, unless it is there; give the arm's summary."""
    by_id = read_parts(merged)
    ids = [prompt.id for prompt in test_set.prompts]
    if by_id.keys() != set(ids):
        wrong = sorted(by_id.keys() ^ set(ids))
        raise DataError(
            f"{merged} has {len(by_id)} answers and the test set {len(ids)} examples ({wrong[0]!r} is in one only); "
            f"delete {merged.parent} and start the same command again"
        )
    answers = [by_id[key] for key in ids]
    if not merged.exists():
        write_merged(merged, answers)
    return answers_summary(answers, test_set.task.metric)


def _on_main(world: World, doing: str, action: Callable[[], Any]) -> Any:
    """Rank 0's result on every rank, or its error on every rank."""
    if world.size == 1:
        return action()
    result = None
    with together(doing):
        if world.is_main:
            result = action()
    return broadcast_object(result)
