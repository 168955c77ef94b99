"""What of a policy's own completions a student learns, where they think: thought and answer are told apart by token.

No token is written anew: a part of a completion is a part of its sampled tokens.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

from spd_dist.config import Config, Data
from spd_dist.data.prompts import asked_of, judged_text, make_prompts
from spd_dist.data.scoring.thoughts import closings, without_thoughts
from spd_dist.data.tasks.protocol import Row, Task
from spd_dist.data.templates import Tokenizer, rendered_again
from spd_dist.errors import ConfigError, DataError
from spd_dist.types import Completion, ThoughtBudget

log = logging.getLogger(__name__)

NUM_ROUND_TRIPS = 32
"""Completions that are rendered again, to see whether the template writes them as they were sampled."""
SINGLE = (
    ("<think>", "</think>"), ("<thinking>", "</thinking>"), ("[THINK]", "[/THINK]"),
    ("<|begin_of_thought|>", "<|end_of_thought|>"),
)  # fmt: skip
"""Marks that tokenizers have as tokens."""
CHANNEL = "<|channel|>"
"""gpt-oss ends its thought by opening the channel of the answer, which belongs to the answer."""


@dataclass(frozen=True)
class Thought:
    """Where a completion stops thinking."""

    num_tokens: int
    """Of the thought, with the mark that ends it; 0 if there is none. What follows is the answer."""
    is_unfinished: bool
    """It was cut: there is no answer."""


def thought_budget(
    tokenizer: Tokenizer, num_tokens: int | None, marks: Sequence[str], key: str
) -> ThoughtBudget | None:
    """The budget of `num_tokens`; None if there is none.

    Args:
        tokenizer: The policy's.
        num_tokens: Of a completion; then its thought is closed.
        marks: As `data.thinking_marks`.
        key: The setting, for the error.

    Raises:
        ConfigError: the tokenizer has no pair of marks of which each is one token.
    """
    if num_tokens is None:
        return None
    for pair in ([tuple(marks)] if marks else []) + list(SINGLE):
        ids = [tokenizer(mark, add_special_tokens=False)["input_ids"] for mark in pair]
        if all(len(one) == 1 for one in ids):
            return ThoughtBudget(num_tokens, ids[0][0], ids[1][0])
    raise ConfigError(
        f"{key}: {num_tokens} is not valid with this tokenizer, which has no marks of thinking of one token each; "
        f"set {key}=null"
    )


def find_thought(completion: Completion, tokenizer: Tokenizer, marks: Sequence[str]) -> Thought:
    """The thought of a completion. A token that holds the end of the mark and more goes with the thought."""
    spoken = without_thoughts(judged_text(tokenizer, completion.prompt_tokens, completion.tokens, marks))
    num = len(completion.tokens)
    if spoken.is_unfinished:
        return Thought(num, is_unfinished=True)

    def text_of(start: int, stop: int) -> str:
        text = tokenizer.decode(list(completion.tokens[start:stop]), skip_special_tokens=False)
        return text.replace(marks[1], "</think>") if marks else text

    count = len(closings(text_of(0, num)))
    if not count:
        return Thought(0, is_unfinished=False)
    low, high = 0, num  # the first `high` tokens hold every mark, the first `low` do not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if len(closings(text_of(0, middle))) == count else (middle, high)
    whole = text_of(0, high)
    if whole[closings(whole)[-1][0] :].startswith(CHANNEL):
        while not closings(text_of(high, num)):  # back to where the mark begins
            high -= 1
    return Thought(high, is_unfinished=False)


def as_sampled(
    completions: Sequence[Completion], rows: Sequence[Row], task: Task, tokenizer: Tokenizer, config: Data
) -> Sequence[Completion]:
    """The completions as they are: a student learns prompt tokens + sampled tokens, and nothing is rendered again.

    By a round trip of the first ones: sampled turns that the chat template would write in another way are counted.

    Raises:
        DataError: the prompts are not those of the rows any more.
    """
    ids = {row["id"] for row in rows}
    looked_at = list(islice((one for one in completions if one.id in ids), NUM_ROUND_TRIPS))
    wanted = {one.id for one in looked_at}
    by_id = {row["id"]: row for row in rows if row["id"] in wanted}
    changed = retokenised = 0
    prompts = make_prompts([by_id[one.id] for one in looked_at], task, tokenizer, config)
    for one, prompt in zip(looked_at, prompts, strict=True):
        if one.prompt_tokens != prompt.tokens:
            raise DataError(
                f"generate/completions: {one.id!r} was sampled after another prompt than its row, the task and the "
                "chat template give now; go on from there with --restart-from generate"
            )
        if config.template == "chat":
            asked = asked_of(by_id[one.id], task, config)
            turn = tokenizer.decode([token for token in one.tokens if token not in tokenizer.all_special_ids])
            again = rendered_again(asked, turn, tokenizer, config)
            tokens = tokenizer(again, add_special_tokens=False)["input_ids"]
            is_changed = not again.startswith(prompt.text + turn)
            changed += is_changed
            retokenised += not is_changed and tuple(tokens[: len(prompt.tokens + one.tokens)]) != (
                prompt.tokens + one.tokens
            )
    if changed or retokenised:
        log.log(
            logging.WARNING if changed else logging.INFO,  # other tokens of the same text are common, and do no harm
            "the chat template would write %d of %d sampled turns in another way than they were sampled, and %d with "
            "other tokens: what is learned are the prompts' and the sampled tokens",
            changed, len(looked_at), retokenised,
        )  # fmt: skip
    return completions


def learned_parts(completions: Sequence[Completion], tokenizer: Tokenizer, config: Config) -> Sequence[Completion]:
    """The completions as `data.thinking` and `finetune.loss_on` say; as they are, where these take all of them.

    A thought that is only read, and not learned, moves to the prompt. Completions of which nothing is left are left
    out. Unfinished thoughts are counted, always.

    Raises:
        DataError: more thoughts are unfinished than `generate.max_unfinished_rate` allows; nothing is left.
    """
    marks, how = config.data.thinking_marks, config.data.thinking
    if how != "drop" and config.finetune.loss_on not in (
        "after_thought",
        "thought",
    ):  # of a corpus on disk, one at a time
        num_unfinished = sum(find_thought(one, tokenizer, marks).is_unfinished for one in completions)
        check_unfinished(num_unfinished, len(completions), config)
        return completions
    thoughts = [find_thought(one, tokenizer, marks) for one in completions]
    check_unfinished(sum(one.is_unfinished for one in thoughts), len(completions), config)
    pairs = list(zip(completions, thoughts, strict=True))
    if how == "drop":
        parts = [_cut(one, thought.num_tokens, into_prompt=False) for one, thought in pairs]
    elif config.finetune.loss_on == "after_thought":
        parts = [_cut(one, thought.num_tokens, into_prompt=True) for one, thought in pairs]
    else:
        parts = [dataclasses.replace(one, tokens=one.tokens[: thought.num_tokens]) for one, thought in pairs]
    kept = [part for part in parts if part.tokens]
    if not kept:
        raise DataError(
            f"data.thinking={how}, finetune.loss_on={config.finetune.loss_on}: of {len(completions)} completions "
            "nothing is left to learn; raise generate.max_new_tokens, or name the marks by data.thinking_marks"
        )
    if len(kept) < len(parts):
        log.info(
            "finetune: %d of %d completions have no such part, and are left out", len(parts) - len(kept), len(parts)
        )
    return kept


def check_unfinished(num_unfinished: int, num: int, config: Config) -> None:
    """Warn of thoughts that were cut at `generate.max_new_tokens`.

    Raises:
        DataError: more than `generate.max_unfinished_rate`.
    """
    rate, limit = num_unfinished / max(1, num), config.generate.max_unfinished_rate
    if rate > limit:
        raise DataError(
            f"generate: the rate of unfinished thoughts is {rate:.3f}, above generate.max_unfinished_rate={limit}; "
            "raise that limit and start again in this run_dir, or raise generate.max_new_tokens in another one"
        )
    if num_unfinished:
        log.warning(
            "generate: %d of %d completions were cut at generate.max_new_tokens=%d while they thought; "
            "generate.max_unfinished_rate makes this an error", num_unfinished, num, config.generate.max_new_tokens,
        )  # fmt: skip


def _cut(completion: Completion, num_tokens: int, *, into_prompt: bool) -> Completion:
    """Without its first tokens, or with them as a part of its prompt."""
    moved = completion.tokens[:num_tokens] if into_prompt else ()
    prompt_tokens = completion.prompt_tokens + moved
    return dataclasses.replace(completion, prompt_tokens=prompt_tokens, tokens=completion.tokens[num_tokens:])
