"""Judge outputs that are there already, `--judge` of `launchers/evaluate.py`; and show how rows count."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from rich.text import Text

from spd_dist.config import Config, Data
from spd_dist.data.masking import HEAD, mask_row
from spd_dist.data.prompts import chooses, make_prompts
from spd_dist.data.readers import Located, read_rows
from spd_dist.data.scoring.thoughts import with_known_marks
from spd_dist.data.sources import load_rows, normalised_row
from spd_dist.data.tasks import Row, Score, Task, find_task, refusal, runs_code, with_execution
from spd_dist.data.templates import Tokenizer
from spd_dist.errors import DataError
from spd_dist.sandbox import open_sandbox
from spd_dist.storage.artifacts import as_json, write_text


@dataclass(frozen=True)
class Judgement:
    """A line of what `--judge` writes."""

    correct: bool
    """What the report counts."""
    strict: bool
    """Right, and in the form that the prompt asks for."""
    extracted: str | None
    reason: str
    """As in `Score`."""


def able_to_judge(task: Task, *, allowed: bool) -> Task:
    """The task, with a sandbox on this machine if it is scored by running programs.

    Raises:
        ConfigError: that isn't allowed, or no sandbox holds on this machine.
    """
    if not runs_code(task):
        return task
    if not allowed:
        raise refusal(task.name)
    return with_execution(task, open_sandbox().run)


def other_test(word: str, config: Config) -> tuple[Task, Sequence[Row]]:
    """A task of `evaluate.also` (TASK, or TASK=SOURCE) and its test rows, as many as `data.num_test`.

    Raises:
        UserError: no such task or source, or a task that runs programs without permission.
    """
    name, _, source = word.partition("=")
    task = able_to_judge(find_task(name, "evaluate.also"), allowed=config.evaluate.allow_code_execution)
    data = dataclasses.replace(
        config.data, task=name, train=None, calibration=None, test=source or None, leaks="report"
    )
    return task, load_rows(task, "test", data)


def judge_file(path: str, task: Task, data: Data | None = None) -> Iterator[Judgement]:
    """The judgement of every line of a file, in its order: `{"row": {...}, "output": "..."}`.

    The kept answers of a run (`evaluate/ARM/TASK.jsonl`) can be judged again: a line without a row, but with the id of
    one, is of the test rows of `data`.

    Raises:
        DataError: no such file, or a line without a row of the task or without an output.
    """
    data = data or Data(task=task.name)
    located = list(read_rows(path))
    rows = {} if all("row" in one.row for one in located) else {row["id"]: row for row in load_rows(task, "test", data)}
    lines = [_read_line(one, task, rows, data.thinking_marks) for one in located]
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        yield from pool.map(lambda line: _judgement(task.score(*line)), lines)


def write_judgements(judgements: Iterator[Judgement], out: Path | None) -> str:
    """Write one JSON object a line to `out`, and give a sentence; without `out`, give the lines."""
    found = list(judgements)
    lines = "\n".join(as_json(vars(one)) for one in found)
    if out is None:
        return lines
    write_text(out, lines + "\n")
    return f"{out}: {len(found)} judged, {sum(one.correct for one in found)} right"


def _read_line(located: Located, task: Task, rows: Mapping[str, Row], marks: Sequence[str]) -> tuple[Row, str]:
    row, output = located.row.get("row"), located.row.get("output")
    if row is None and isinstance(output, str) and (kept := rows.get(str(located.row["id"]))):
        return kept, with_known_marks(output, marks)
    if not isinstance(row, dict) or not isinstance(output, str):
        raise DataError(
            f'--judge: {located.where}: a line is {{"row": {{...}}, "output": "..."}}, the row an object as in the '
            "data file of the task, the output a text; without a row, the id of one of data.test"
        )
    numbered = Located(located.path, located.line, {"id": located.row["id"], **row})
    read = normalised_row(task, numbered, "--judge")
    if read is None:
        raise DataError(f"--judge: {located.where}: the task {task.name!r} drops such a row: it has no answer")
    return read, with_known_marks(output, marks)


def _judgement(score: Score) -> Judgement:
    return Judgement(score.correct, score.strict_correct, score.extracted, score.reason)


@dataclass(frozen=True)
class _NotRun:
    """What a preview says of a program: the sandbox was not allowed."""

    passed: bool = False
    kind: str = "not run, as evaluate.allow_code_execution=false"


def preview_scoring(rows: Sequence[Row], task: Task, tokenizer: Tokenizer, config: Config) -> Iterator[Text]:
    """What each row asks, what of it is supervised, and how its own reference is judged, as `rich` prints it.

    At the end stands how many references are right: all should be, or the task's gold, extraction or metric is wrong.
    """
    if runs_code(task):
        is_allowed = config.evaluate.allow_code_execution
        task = able_to_judge(task, allowed=True) if is_allowed else with_execution(task, lambda *_: _NotRun())
    num_right = 0
    for row, prompt in zip(rows, make_prompts(rows, task, tokenizer, config.data), strict=True):
        masked = mask_row(row, task, tokenizer, config.data, config.calibrate)
        kept = [masked.text[start:stop] for start, stop in masked.kept()]
        result = Text.assemble((f"{row['id']}: {len(prompt.tokens)} tokens are asked\n", HEAD), prompt.text)
        score = task.score(row, task.answer(row))
        num_right += score.correct
        facts = {"supervised": kept, "reference": task.answer(row)}
        if chooses(task, config):
            facts["measured"] = "the likelihood of the choices"
        elif task.metric == "nll":
            facts["measured"] = "the likelihood of what is supervised under the mask answer"
        else:
            facts |= {"extracted": score.extracted, "gold": score.gold, "counted": _counted(score)}
        for name, fact in facts.items():
            result.append(f"\n{name}: ", HEAD).append(fact if isinstance(fact, str) else repr(fact))
        yield result.append("\n")
    if task.metric != "nll":
        yield Text(f"{num_right} of {len(rows)} references are right by their own task", HEAD)


def _counted(score: Score) -> str:
    form = ", in the form that is asked for" if score.strict_correct else ""
    return f"right{form}" if score.correct else f"wrong ({score.reason})"
