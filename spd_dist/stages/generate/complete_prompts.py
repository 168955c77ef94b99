"""What is to be generated, what is done already, and which worker does the rest."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing

from spd_dist.config import Generate
from spd_dist.data.thinking import thought_budget
from spd_dist.distributed.collectives import all_equal, broadcast_object, gather_objects, on_main
from spd_dist.distributed.world import World
from spd_dist.errors import ConfigError, DataError
from spd_dist.inference.decode import longest_first
from spd_dist.inference.external.vllm_engine import share_of_work
from spd_dist.inference.open_engine import EngineWork, choose_engine, open_engine
from spd_dist.inference.requests import Decoded, Request
from spd_dist.inference.sampling import Sampling
from spd_dist.models.policy import Policy
from spd_dist.projection.operators import projection_hash
from spd_dist.seeding import row_seed
from spd_dist.stages.context import StageContext
from spd_dist.stages.generate.merge_corpus import Attempt, CorpusSummary, check_leakage, merge
from spd_dist.storage.artifacts import JsonlWriter
from spd_dist.storage.completions import MERGED, Key, as_row, gathered, part_name
from spd_dist.types import Completion, Projection, Prompt, ThoughtBudget

log = logging.getLogger(__name__)


def sampling_of(config: Generate) -> Sampling:
    """How the tokens are drawn."""
    return Sampling(
        temperature=config.temperature,
        top_p=config.top_p,
        top_k=config.top_k,
        min_p=config.min_p,
        repetition_penalty=config.repetition_penalty,
        max_new_tokens=config.max_new_tokens,
    )


def requests_for(
    prompts: Sequence[Prompt], num_samples: int, seed: int, budget: ThoughtBudget | None = None
) -> list[Request]:
    """Every completion of the corpus, in its order: prompts as they come, then samples.

    Raises:
        DataError: two prompts of one id, or a prompt without tokens.
    """
    seen: set[str] = set()
    for prompt in prompts:
        if prompt.id in seen:
            raise DataError(f"two prompts have the id {prompt.id!r}; ids name completions, so each needs its own")
        if not prompt.tokens:
            raise DataError(f"prompt {prompt.id!r} has no tokens; drop it, or use data.template=chat")
        seen.add(prompt.id)
    return [
        Request(prompt.id, sample, prompt.tokens, row_seed(seed, prompt.id, sample), budget)
        for prompt in prompts
        for sample in range(num_samples)
    ]


def share_of(requests: Iterable[Request], index: int, count: int) -> list[Request]:
    """Every `count`-th request, of all sorted by length: shares are alike in work, and no two overlap."""
    return longest_first(requests)[index::count]


def check_tasks(config: Generate) -> None:
    """Refuse a task that is not one of the array.

    Raises:
        ConfigError: `task_index` is not below `num_tasks`.
    """
    if config.task_index >= config.num_tasks:
        raise ConfigError(
            f"generate.task_index: {config.task_index} is not valid; it must be below "
            f"generate.num_tasks={config.num_tasks}"
        )


def remaining(requests: Sequence[Request], done: Mapping[Key, Completion]) -> list[Request]:
    """The requests that no line answers yet.

    Raises:
        DataError: a line that answers no request, or one whose seed or prompt is another.
    """
    wanted = {(request.id, request.sample): request for request in requests}
    for key, completion in done.items():
        request = wanted.get(key)
        if request is None or (request.seed, request.tokens) != (completion.seed, completion.prompt_tokens):
            raise DataError(
                f"generate/completions holds prompt {completion.id!r}, sample {completion.sample}, of another seed, "
                "prompt or data set; delete generate/, or give this run a run_dir of its own"
            )
    return [request for key, request in wanted.items() if key not in done]


def generate(
    policy: Policy,
    prompts: Sequence[Prompt],
    projection: Projection | None,
    config: Generate,
    context: StageContext,
) -> CorpusSummary:
    """Write `completions/completions.jsonl` and `summary.json` in the stage's folder; the summary is on every rank.

    A collective. Every rank is given all prompts; rank 0's projection is used on all. Lines that an earlier attempt
    left are kept, whatever its world size. As one task of an array (`num_tasks` > 1) it makes its share, and the task
    that finds the corpus complete merges it; before that the summary says `is_complete: False`.

    Args:
        policy: The untouched policy; so it is left.
        prompts: In the corpus's order.
        projection: None for plain self-training, as of PSR and SSD.
        config: Its section.
        context: Of the run. Its seed makes a completion, with prompt id and sample index.

    Raises:
        StopRequested: after a completion, on the ranks that were asked; what is written stays.
        DataError: the folder holds another corpus, a prompt is too long, the engine does not run the projected policy,
            the corpus fails a check, memory or disk is full.
        ConfigError: settings that can't be met.
    """
    check_tasks(config)
    folder, world = context.folder, context.world
    projection = same_on_all_ranks(projection, world)
    budget = thought_budget(policy.tokenizer, config.max_thought_tokens, (), "generate.max_thought_tokens")
    requests = requests_for(prompts, config.num_samples, context.seed, budget)
    if not requests:
        raise DataError("generate: there is no prompt; set data.train, or raise data.num_train")
    own = _own_work(requests, config, context)
    work = EngineWork(
        own or (requests[:1] if world.is_main else []),
        longest_first(requests)[0],
        folder / f"engine-{config.task_index:05d}-of-{config.num_tasks:05d}",
        arm=context.arm,
        pool=context.engines,
    )
    with (
        open_engine(policy, projection, config, world, work) as opened,
        closing(opened.engine.complete(own, sampling_of(config))) as decoded,
    ):
        started = time.monotonic()
        num_tokens = _write(decoded, policy, config, context) if own else 0
        attempt = Attempt.of(opened, num_tokens=num_tokens, seconds=time.monotonic() - started)
        check_leakage(attempt, policy.model.dtype)
    attempts = [attempt] if world.size == 1 else gather_objects(attempt)
    return on_main("merging the completions", lambda: merge(requests, config, folder, attempts))


def same_on_all_ranks(projection: Projection | None, world: World) -> Projection | None:
    """Rank 0's projection on every rank, compared by hash.

    Raises:
        DataError: what arrived is not the same on every rank.
    """
    if world.size == 1:
        return projection
    projection = broadcast_object(projection)
    if not all_equal("none" if projection is None else projection_hash(projection)):
        raise DataError("the projection differs between ranks after its broadcast; check the network and start again")
    return projection


def _own_work(requests: Sequence[Request], config: Generate, context: StageContext) -> list[Request]:
    """This rank's part of what the array's task has not done yet: the same division on all ranks."""
    completions, world = context.folder / "completions", context.world

    def open_keys() -> set[tuple[str, int]]:
        completions.mkdir(parents=True, exist_ok=True)
        todo = {(request.id, request.sample) for request in remaining(requests, gathered(completions))}
        if todo and (completions / MERGED).exists():
            raise DataError(
                f"{completions / MERGED} lacks {len(todo)} of {len(requests)} completions; delete {completions.parent} "
                "and start the same command again"
            )
        return todo

    todo = on_main("reading what was generated before", open_keys)
    share = share_of(requests, config.task_index, config.num_tasks)
    left = [request for request in share if (request.id, request.sample) in todo]
    num_done = len(share) - len(left)
    if num_done and world.is_main:
        log.info("generate: %d of %d completions were made before", num_done, len(share))
    number, count = share_of_work(config, choose_engine(config).name, world)
    own = [] if number is None else share_of(left, number, count)
    skipped = num_done // count
    context.begin(len(own) + skipped, skipped)
    return own


def _write(decoded: Iterable[Decoded], policy: Policy, config: Generate, context: StageContext) -> int:
    """Append each completion to this rank's part as it finishes; give the number of their tokens.

    Nothing, if other tasks have finished the corpus while this one loaded its model: two arrays may overlap.
    """
    completions, world = context.folder / "completions", context.world
    if (completions / MERGED).exists():
        log.info("generate: other tasks have made the rest meanwhile")
        return 0
    name = part_name(world.rank, world.size, task=config.task_index, num_tasks=config.num_tasks)
    num_tokens = 0
    with JsonlWriter(completions / name) as lines:
        for one in decoded:
            lines.write(as_row(_completion(one, policy)))
            num_tokens += len(one.tokens)
            context.advance(1, len(one.tokens))
            context.stop_alone()
    return num_tokens


def _completion(decoded: Decoded, policy: Policy) -> Completion:
    request = decoded.request
    text = policy.tokenizer.decode(decoded.tokens, skip_special_tokens=True)
    return Completion(
        request.id, request.sample, request.seed, request.tokens, decoded.tokens, text, decoded.finish_reason
    )
