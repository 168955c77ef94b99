"""What the projection changes, token by token: completions as they were sampled, read under both policies.

Shapes: B completions, T positions, S of their tokens in a batch.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from spd_dist.config import Evaluate
from spd_dist.data.batches import PaddedBatch, pad
from spd_dist.data.templates import Tokenizer
from spd_dist.distributed.uneven_work import on_main
from spd_dist.inference.placement import choose_placement, placed
from spd_dist.models.loss import token_losses
from spd_dist.models.policy import Policy
from spd_dist.projection.hooks import projected
from spd_dist.stages.context import StageContext
from spd_dist.storage.answers import effects_path
from spd_dist.storage.artifacts import JsonlWriter
from spd_dist.storage.keyed_parts import Key, merge_parts, part_path, read_parts
from spd_dist.types import Completion, Projection, SupervisedExample, TokenEffects

MOST_POSITIONS = 2048
"""Of a batch, padding included; a longer completion is a batch by itself."""
NUM_DIGITS = 3
"""What lies below differs between ways to hold the weights: sharded ones lie elsewhere in memory."""


@dataclass(frozen=True)
class EffectsSummary:
    """What the projection changes at the tokens of one arm's completions, on average."""

    num_completions: int
    num_tokens: int
    mean_base_nll: float
    """Nats a token."""
    mean_projected_nll: float


def score_tokens(
    policy: Policy,
    completions: Sequence[Completion],
    projection: Projection,
    config: Evaluate,
    context: StageContext,
) -> EffectsSummary:
    """Write `ARM.jsonl` in the stage's folder, a line a completion in their order, and give its summary.

    A collective. The batches are the same at every world size, and so is the file; what an earlier attempt left is not
    computed again. The policy is the untouched one, and so it is left; there is at least one completion, and the same
    ones on every rank.

    Raises:
        StopRequested: after a batch, on the ranks that were asked; what is written stays.
        DataError: a part is corrupt, or the disk is full.
    """
    world, merged = context.world, effects_path(context.folder, context.arm)
    done = on_main("reading what was scored before", lambda: set(read_parts(merged, TokenEffects)))
    batches = list(divided(completions))
    todo = [batch for batch in batches if any((one.id, one.sample) not in done for one in batch)]
    own = todo[world.rank :: world.size]
    context.begin(sum(map(len, own)), 0)
    if todo:
        longest = max(len(one.prompt_tokens) + len(one.tokens) for one in completions)
        decoding = dataclasses.replace(config.decoding(), batch_size=len(batches[-1]), max_new_tokens=1)
        placement = choose_placement(policy, decoding, world, longest, section="evaluate")
        part = part_path(merged, world.rank, world.size)
        with placed(policy, placement, world, "scoring completions"), JsonlWriter(part) as lines:
            for batch in own:
                for effects in _scored(policy, batch, projection):
                    if (effects.id, effects.sample) not in done:
                        lines.write(vars(effects))
                context.advance(len(batch), sum(len(one.tokens) for one in batch))
                context.stop_alone()
    keys = [(one.id, one.sample) for one in completions]
    return on_main("merging the token effects", lambda: _merge(context, keys))


def rows_of_length(width: int) -> int:
    """Completions of a batch whose longest has so many tokens with its prompt."""
    return max(1, MOST_POSITIONS // width)


def divided(completions: Sequence[Completion]) -> Iterator[list[Completion]]:
    """Batches of at most `MOST_POSITIONS`, longest first: the same whoever runs them."""
    batch: list[Completion] = []
    width = 0
    for one in sorted(completions, key=lambda one: -len(one.prompt_tokens) - len(one.tokens)):
        if batch and len(batch) == rows_of_length(width):
            yield batch
            batch = []
        width = width if batch else len(one.prompt_tokens) + len(one.tokens)
        batch.append(one)
    if batch:
        yield batch


def _scored(policy: Policy, batch: Sequence[Completion], projection: Projection) -> Iterator[TokenEffects]:
    padded = pad([_example(one) for one in batch], policy.pad_token_id, next(policy.model.parameters()).device)
    base = _losses(policy, padded)
    with projected(policy.model, projection):
        changed = _losses(policy, padded)
    start = 0
    for one in batch:
        stop = start + len(one.tokens)
        pieces = tuple(pieces_of(policy.tokenizer, one.tokens))
        yield TokenEffects(one.id, one.sample, pieces, base[start:stop], changed[start:stop])
        start = stop


def _example(completion: Completion) -> SupervisedExample:
    tokens, first = (*completion.prompt_tokens, *completion.tokens), len(completion.prompt_tokens)
    return SupervisedExample(completion.id, tokens, tuple(range(first, len(tokens))))


def _losses(policy: Policy, padded: PaddedBatch) -> tuple[float, ...]:
    loss_S = token_losses(policy.model, padded.tokens_BT, padded.attention_BT, padded.target_BT)
    return tuple(round(loss, NUM_DIGITS) for loss in loss_S.tolist())


def pieces_of(tokenizer: Tokenizer, tokens: Sequence[int]) -> Iterator[str]:
    """The text of each token, which together are the text of all.

    A letter that several tokens make up, as bytes, is the last one's piece. Each is read behind the piece before it,
    since some tokenizers write a space only between words.
    """
    before, start = 0, 0

    def text(first: int, last: int) -> str:
        return str(tokenizer.decode(list(tokens[first:last]), skip_special_tokens=False))

    for stop in range(1, len(tokens) + 1):
        context, whole = text(before, start), text(before, stop)
        if whole.endswith("\ufffd") and stop < len(tokens):
            yield ""
            continue
        yield whole[len(context) :]
        before, start = start, stop


def _merge(context: StageContext, keys: Sequence[Key]) -> EffectsSummary:
    """Write the merged file, unless it is there; give its summary."""
    merged = effects_path(context.folder, context.arm)
    found = merge_parts(merged, TokenEffects, keys, f"{len(keys)} completions")
    base = [loss for one in found for loss in one.base_nll]
    changed = [loss for one in found for loss in one.projected_nll]
    return EffectsSummary(len(found), len(base), statistics.fmean(base), statistics.fmean(changed))
