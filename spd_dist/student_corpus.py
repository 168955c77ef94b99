"""What an arm's student learns from, and which completions it is not given.

The paper filters nothing. With `finetune.filter`, completions are left out by what they look like, never by a reference
answer: `ended` drops those that were cut, `loops` those that go in circles, and `agreed` those whose answer is not the
one that most samples of their prompt give, and at least two (self-consistency, arXiv 2203.11171, as arXiv 2210.11610
trains on it).
"""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from spd_dist.arms import Arm
from spd_dist.config import Config
from spd_dist.data.prompts import judged_text, make_references, with_eos
from spd_dist.data.scoring.programs import canonical
from spd_dist.data.tasks import Row, Task, runs_code
from spd_dist.data.templates import Tokenizer
from spd_dist.data.thinking import as_sampled, check_unfinished, find_thought, learned_parts
from spd_dist.distributed.collectives import together
from spd_dist.distributed.uneven_work import on_main
from spd_dist.errors import ConfigError, DataError
from spd_dist.models.policy import Policy
from spd_dist.run import Run
from spd_dist.storage.completions import is_repetitive, open_corpus
from spd_dist.storage.records import write_record
from spd_dist.types import Completion

log = logging.getLogger(__name__)

FILTERED = "filter.json"
"""In the folder of a stage `finetune` that was given a part of its completions."""


@dataclass(frozen=True)
class FilterSummary:
    """What `finetune/filter.json` holds."""

    num_completions: int
    num_kept: int
    num_rejected: Mapping[str, int]
    """By the first reason: `cut`, `loops`, `no answer`, `minority` (another has more samples), `tie`, or `alone`."""


def corpus_of(run: Run, arm: Arm, policy: Policy, folder: Path) -> Sequence[Completion]:
    """What an arm's student learns from: its own completions, or the reference answers of the calibration set.

    A collective. Where the config filters, `filter.json` in `folder` says how many were left out, and why.

    Raises:
        DataError: the completions are missing, corrupt, or of other prompts; nothing is left of them.
        ConfigError: the task's answers cannot be compared.
    """
    config = run.config_of(arm)
    rows = run.rows("calibration") if arm.learns_from == "references" else arm.part_of(run.rows("train"))
    with together("reading what the student learns from"):
        rest, ends = (run.task, policy.tokenizer, config.data), policy.eos_token_ids
        if arm.learns_from == "references":
            return make_references(rows[: config.calibrate.num_examples], *rest, eos_token_ids=ends)
        own = as_sampled(open_corpus(run.folder.folder(arm.stage("generate")) / "completions"), rows, *rest)
        vote = votes_by(rows, run.task, policy.tokenizer, config)
        if config.finetune.filter:  # which may leave out every thought that was cut
            thoughts = (find_thought(one, policy.tokenizer, config.data.thinking_marks) for one in own)
            check_unfinished(sum(thought.is_unfinished for thought in thoughts), len(own), config)
    own, summary = filtered(own, config, vote)
    with together("preparing what the student learns from"):
        if arm.learns_from == "itself, ended":
            own = with_eos(own, lambda tokens: str(policy.tokenizer.decode(tokens)), eos_token_ids=ends)
        own = learned_parts(own, policy.tokenizer, config)
    if summary is not None:
        on_main("writing what was filtered", lambda: write_record(folder / FILTERED, summary))
    return own


def filtered_files(run: Run, arm: Arm) -> list[str]:
    """What `corpus_of` writes."""
    return [FILTERED] if run.config_of(arm).finetune.filter and arm.writes else []


Vote = Callable[[Completion], str | None]
"""A completion's answer in one spelling; None if it has none."""


def votes_by(rows: Sequence[Row], task: Task, tokenizer: Tokenizer, config: Config) -> Vote:
    """How the answers of a task are read; their references are not looked at.

    Raises:
        ConfigError: answers are compared, and the task's are programs, which agree by what they do.
    """
    if "agreed" in config.finetune.filter and runs_code(task):
        raise ConfigError(
            f"finetune.filter: agreed is not valid with the task {task.name!r}, whose answers are programs; set "
            "finetune.filter=[ended,loops]"
        )
    by_id = {row["id"]: row for row in rows}

    def vote(one: Completion) -> str | None:
        text = judged_text(tokenizer, one.prompt_tokens, one.tokens, config.data.thinking_marks)
        extracted = task.score(by_id[one.id], text).extracted
        return None if extracted is None else canonical(extracted)

    return vote


def filtered(
    completions: Sequence[Completion], config: Config, vote: Vote
) -> tuple[Sequence[Completion], FilterSummary | None]:
    """The completions that `finetune.filter` keeps, in their order, and what became of the others. A collective.

    All of them, as they are, and no summary where nothing is filtered. Rank 0 decides: reading an answer has limits of
    time, which ranks may not meet alike.

    Raises:
        DataError: nothing is left.
    """
    filters = config.finetune.filter
    if not filters:
        return completions, None
    reasons = on_main("filtering completions", lambda: _reasons(completions, filters, vote))
    kept = [one for one, reason in zip(completions, reasons, strict=True) if reason is None]
    rejected = Counter(reason for reason in reasons if reason is not None)
    summary = FilterSummary(len(completions), len(kept), dict(sorted(rejected.items())))
    rejections = ", ".join(f"{count} {reason}" for reason, count in summary.num_rejected.items()) or "none"
    if not kept:
        raise DataError(
            f"finetune.filter: of {len(completions)} completions nothing is left ({rejections}); name fewer filters, "
            "or raise generate.max_new_tokens or generate.num_samples"
        )
    log.info("finetune: %d of %d completions are kept; left out: %s", len(kept), len(completions), rejections)
    return kept, summary


def _reasons(completions: Sequence[Completion], filters: Sequence[str], vote: Vote) -> list[str | None]:
    """Why each is left out; None for those that are kept."""
    reasons = [_reason(one, filters) for one in completions]
    if "agreed" in filters:
        _compare(completions, reasons, vote)
    return reasons


def _reason(one: Completion, filters: Sequence[str]) -> str | None:
    """Why a completion is left out by itself."""
    if "ended" in filters and one.finish_reason != "stop":
        return "cut"
    return "loops" if "loops" in filters and is_repetitive(one.tokens) else None


def _compare(completions: Sequence[Completion], reasons: list[str | None], vote: Vote) -> None:
    """Add the reasons of those that are not of the answer that most samples of their prompt give.

    Samples that are left out already have no vote. Where two answers lead, none is kept: nothing tells them apart. Nor
    is an answer that one sample alone gives: nothing agrees with it.
    """
    votes: dict[str, dict[int, str]] = defaultdict(dict)
    for place, one in enumerate(completions):
        if reasons[place] is None:
            answer = vote(one)
            if answer is None:
                reasons[place] = "no answer"
            else:
                votes[one.id][place] = answer
    for of_prompt in votes.values():
        (first, most), *others = Counter(of_prompt.values()).most_common(2)
        is_tied = bool(others) and others[0][1] == most
        of_first = "tie" if is_tied else "alone" if most == 1 else None
        for place, answer in of_prompt.items():
            reasons[place] = of_first if is_tied or answer == first else "minority"
