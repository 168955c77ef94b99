"""Rows as token ids: prompts to generate from, supervised examples to calibrate on, and the held-out ones."""

from __future__ import annotations

import dataclasses
import logging
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

from spd_dist.config import Calibrate, Config, Data
from spd_dist.data.conversations import Conversation, conversation_of
from spd_dist.data.masking import RULE, MaskAudit, MaskedText, ShownExample, mask_row
from spd_dist.data.scoring.thoughts import is_thinking_mark, with_known_marks
from spd_dist.data.tasks.protocol import Row, ScoredByChoices, Task
from spd_dist.data.templates import (
    Tokenizer,
    adds_special_tokens,
    check_begins,
    check_thinking,
    render_example,
    render_prompt,
    render_turns,
)
from spd_dist.errors import ConfigError, DataError
from spd_dist.types import Completion, Prompt, SupervisedExample

ENDS = (".", "!", "?", "\n")
PROMPT_TAIL = 16
"""Last tokens of a prompt that may open a thought."""
NUM_SHOWN = 5
"""Examples whose kept text the audit holds."""

_log = logging.getLogger(__name__)


def make_prompts(rows: Sequence[Row], task: Task, tokenizer: Tokenizer, config: Data) -> list[Prompt]:
    """What the policy is asked, row by row, as text and as tokens.

    Raises:
        ConfigError: data.template=chat, and the tokenizer has no chat template.
        DataError: a prompt is longer than data.max_prompt_tokens.
    """
    check_thinking(tokenizer, config)
    texts = [render_prompt(asked_of(row, task, config), tokenizer, config) for row in rows]
    encoded = tokenizer(texts, add_special_tokens=adds_special_tokens(config))["input_ids"] if texts else []
    prompts = [Prompt(row["id"], text, tuple(ids)) for row, text, ids in zip(rows, texts, encoded, strict=True)]
    too_long = [prompt for prompt in prompts if len(prompt.tokens) > config.max_prompt_tokens]
    if too_long:
        longest = max(too_long, key=lambda prompt: len(prompt.tokens))
        raise DataError(
            f"data.max_prompt_tokens: {len(too_long)} of {len(prompts)} prompts are longer than "
            f"{config.max_prompt_tokens} tokens, row {longest.id!r} has {len(longest.tokens)}; "
            "raise data.max_prompt_tokens, or drop the rows"
        )
    return prompts


def make_references(
    rows: Sequence[Row], task: Task, tokenizer: Tokenizer, config: Data, *, eos_token_ids: Collection[int]
) -> list[Completion]:
    """The reference answers as if the policy had given them: what the supervised control is trained on.

    Each ends with an end-of-sequence token, the one of the chat template or else the smallest id.
    """
    completions = []
    for row, prompt in zip(rows, make_prompts(rows, task, tokenizer, config), strict=True):
        text = _example_text(row, task, tokenizer, config)
        check_begins(text, prompt.text, f"row {row['id']!r}")
        answer = text.removeprefix(prompt.text)
        tokens = list(tokenizer(answer, add_special_tokens=False)["input_ids"])
        ends = [position for position, token in enumerate(tokens) if token in eos_token_ids]
        tokens = tokens[: ends[0] + 1] if ends else [*tokens, min(eos_token_ids)]
        completions.append(Completion(row["id"], 0, 0, prompt.tokens, tuple(tokens), task.answer(row).strip(), "stop"))
    return completions


def asked_of(row: Row, task: Task, config: Data) -> str | Conversation:
    """The prompt of a row, or its messages up to the turn that is asked for."""
    conversation = conversation_of(row, task)
    return task.prompt(row) if conversation is None else conversation.until(conversation.place_of(config.turn))


def _example_text(row: Row, task: Task, tokenizer: Tokenizer, config: Data) -> str:
    conversation = conversation_of(row, task)
    if conversation is None:
        return render_example(task.prompt(row), task.answer(row), tokenizer, config).text
    return render_turns(conversation, tokenizer, config).text


def make_examples(
    rows: Sequence[Row], task: Task, tokenizer: Tokenizer, config: Data, calibrate: Calibrate
) -> tuple[list[SupervisedExample], MaskAudit]:
    """The first `calibrate.num_examples` rows with their reference answers, the supervised tokens found.

    Raises:
        ConfigError: an unknown mask, or no chat template.
        DataError: an example without a supervised token, or with one behind calibrate.max_tokens, unless
            calibrate.allow_empty; and no example at all.
    """
    masked = [mask_row(row, task, tokenizer, config, calibrate) for row in rows[: calibrate.num_examples]]
    if not calibrate.allow_empty:
        for text in masked:
            _require_targets(text, calibrate)
    examples = [_example(text, calibrate.max_tokens) for text in masked if _targets(text, calibrate.max_tokens)]
    if not examples:
        raise DataError(
            f"calibrate.mask: {calibrate.mask!r} keeps no token in any of {len(masked)} examples; look at them with "
            "--preview-masks 5, and choose another mask or raise calibrate.max_tokens"
        )
    audit = _audit(masked, examples, calibrate)
    _log.info("mask %s keeps %d tokens of %d examples", audit.mask, audit.num_targets, audit.num_examples)
    return examples, audit


def _targets(text: MaskedText, max_tokens: int) -> tuple[int, ...]:
    return tuple(target for target in text.targets if target < max_tokens)


def _example(text: MaskedText, max_tokens: int) -> SupervisedExample:
    targets = _targets(text, max_tokens)
    stop = targets[-1] + 1
    return SupervisedExample(text.id, text.tokens[:stop], targets, min(len(text.tokens), max_tokens) - stop)


def _require_targets(text: MaskedText, calibrate: Calibrate) -> None:
    where = f"row {text.id!r}: the mask {calibrate.mask!r}"
    skip = "or set calibrate.allow_empty=true to skip and count such rows"
    if not text.spans:
        raise DataError(f"{where} finds no target span in it; correct the row, choose another calibrate.mask, {skip}")
    if not text.targets:
        kept = [text.text[start:stop] for start, stop in text.spans]
        raise DataError(f"{where} marks {kept}, but no token lies inside; set calibrate.span_policy=overlap, {skip}")
    lost = len(text.targets) - len(_targets(text, calibrate.max_tokens))
    if lost:
        raise DataError(
            f"{where} has {lost} of {len(text.targets)} tokens behind calibrate.max_tokens={calibrate.max_tokens}; "
            f"raise calibrate.max_tokens to {text.targets[-1] + 1}, {skip}"
        )


def _audit(masked: Sequence[MaskedText], examples: Sequence[SupervisedExample], calibrate: Calibrate) -> MaskAudit:
    counts = [len(example.targets) for example in examples]
    cut = [(len(text.targets), len(_targets(text, calibrate.max_tokens))) for text in masked]
    return MaskAudit(
        mask=calibrate.mask,
        rule=RULE.format(policy="inside" if calibrate.span_policy == "inside" else "partly inside"),
        num_examples=len(examples),
        num_skipped_empty=sum(found == 0 for found, _ in cut),
        num_skipped_truncated=sum(found > 0 and left == 0 for found, left in cut),
        num_truncated=sum(found > left > 0 for found, left in cut),
        num_tokens=sum(len(example.tokens) + example.num_tokens_after for example in examples),
        num_targets=sum(counts),
        min_targets=min(counts),
        mean_targets=sum(counts) / len(counts),
        max_targets=max(counts),
        shown=tuple(
            ShownExample(text.id, tuple(text.text[start:stop] for start, stop in text.kept()))
            for text in masked[:NUM_SHOWN]
        ),
    )


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
    thinking_marks: Sequence[str] = ()
    """As `data.thinking_marks`."""
    choices: Mapping[str, Sequence[SupervisedExample]] = dataclasses.field(default_factory=dict)
    """By row, its choices as answers, where the likeliest counts; the first is the right one."""
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
    prompts, marks = make_prompts(rows, task, tokenizer, config.data), config.data.thinking_marks
    if chooses(task, config):
        choices = _choices(rows, task, tokenizer, config)
        return TestSet(task, rows, prompts, thinking_marks=marks, choices=choices, seed=config.seed)
    if task.metric != "nll":
        return TestSet(task, rows, prompts, thinking_marks=marks, seed=config.seed)
    answers = dataclasses.replace(config.calibrate, num_examples=max(1, len(rows)), mask="answer", allow_empty=False)
    examples, _ = make_examples(rows, task, tokenizer, config.data, answers)
    return TestSet(task, rows, prompts, examples, marks, seed=config.seed)


def chooses(task: Task, config: Config) -> bool:
    """Whether an arm answers by its likeliest choice and writes nothing: so the config or a described task wants it."""
    return config.choices.scoring == "likelihood" or getattr(task, "is_by_likelihood", False)


def _choices(
    rows: Sequence[Row], task: Task, tokenizer: Tokenizer, config: Config
) -> dict[str, list[SupervisedExample]]:
    """Each row's choices as answers, the right one first.

    Raises:
        ConfigError: the task has no choices.
        DataError: a choice is cut off at `calibrate.max_tokens`.
    """
    if not isinstance(task, ScoredByChoices):
        raise ConfigError(
            f"choices.scoring: likelihood is not valid with the task {task.name!r}, whose answers are no choices; set "
            "choices.scoring=generated, or take mmlu or a described task with metric: choice"
        )
    found: dict[str, list[SupervisedExample]] = {}
    for row in rows:
        others = [one for one in task.alternatives(row) if task.answer(one) != task.answer(row)]
        each = [{**one, "id": f"{row['id']}#{number}"} for number, one in enumerate([row, *others])]
        whole = dataclasses.replace(config.calibrate, num_examples=len(each), mask="answer", allow_empty=False)
        found[str(row["id"])] = make_examples(each, task, tokenizer, config.data, whole)[0]
    return found


def choice_texts(task: Task, row: Row) -> list[str]:
    """The choices of a row as text, in the order of `TestSet.choices`: the right one first."""
    right = task.answer(row).strip()
    rows = task.alternatives(row) if isinstance(task, ScoredByChoices) else []
    return [right, *(text for one in rows if (text := task.answer(one).strip()) != right)]


def judged_text(tokenizer: Tokenizer, prompt: Sequence[int], tokens: Sequence[int], marks: Sequence[str]) -> str:
    """What was said, as it is judged: without special tokens, but with every mark of thinking, the prompt's own too."""
    special = {
        number: text for text, number in zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True)
    }
    kept = [one for one in tokens if one not in special or is_thinking_mark(special[one], marks)]
    begun = tokenizer.decode(list(prompt[-PROMPT_TAIL:]), skip_special_tokens=False)
    return with_known_marks(tokenizer.decode(kept, skip_special_tokens=False), marks, begun)


def with_eos(
    completions: Sequence[Completion], decode: Callable[[list[int]], str], *, eos_token_ids: Collection[int]
) -> list[Completion]:
    """Every completion with an end: one that was cut at the limit ends behind its last whole sentence or line.

    Without one it ends in place of its last token. The end is the token by which the others end, else the smallest id.
    A student of these learns to stop, and nothing else that a student of `completions` does not.
    """
    last = Counter(one.tokens[-1] for one in completions if one.finish_reason == "stop" and one.tokens)
    (end, _), *_ = last.most_common(1) or [(min(eos_token_ids), 0)]
    return [one if one.finish_reason == "stop" else _ended(one, decode, end) for one in completions]


def _ended(completion: Completion, decode: Callable[[list[int]], str], end: int) -> Completion:
    stops = [number for number, token in enumerate(completion.tokens, 1) if decode([token]).endswith(ENDS)]
    kept = completion.tokens[: stops[-1] if stops else len(completion.tokens) - 1]
    return dataclasses.replace(completion, tokens=(*kept, end), text=decode(list(kept)), finish_reason="stop")
