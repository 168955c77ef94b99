"""What is to be generated, what is done already, and which worker does the rest."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Sequence
from contextlib import closing
from pathlib import Path

import numpy as np
import torch

from spd_dist.config import Generate
from spd_dist.data.thinking import thought_budget
from spd_dist.distributed.collectives import all_equal, broadcast_object, gather_objects, max_over_ranks_, together
from spd_dist.distributed.uneven_work import on_main, wait_for_all_ranks
from spd_dist.distributed.world import World
from spd_dist.errors import DataError
from spd_dist.inference.engine_table import EngineWork
from spd_dist.inference.external.vllm_engine import share_of_work
from spd_dist.inference.open_engine import choose_engine, open_engine
from spd_dist.inference.requests import Decoded, Request
from spd_dist.inference.sampling import Sampling
from spd_dist.models.policy import Policy
from spd_dist.projection.operators import projection_hash
from spd_dist.stages.context import StageContext
from spd_dist.stages.generate.corpus_requests import Requests, share_of
from spd_dist.stages.generate.merge_corpus import Attempt, CorpusSummary, check_leakage, merge
from spd_dist.storage.artifacts import JsonlWriter
from spd_dist.storage.completions import MERGED, TABLE, finished_corpus, part_name, parts, read_if_there
from spd_dist.types import Completion, Projection, Prompt

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


def generate(
    policy: Policy,
    prompts: Sequence[Prompt],
    projection: Projection | None,
    config: Generate,
    context: StageContext,
) -> CorpusSummary:
    """Write the corpus and `summary.json` in the stage's folder; the summary is on every rank.

    A collective. Every rank is given all prompts; rank 0's projection is used on all. Lines that an earlier attempt
    left are kept, whatever its world size. As one task of an array (`num_tasks` > 1) it makes its share, and the task
    that finds the corpus complete merges it; before that the summary says `is_complete: False`. The policy is left
    untouched. A completion is made by the context's seed, its prompt's id and its sample's index.

    Raises:
        StopRequested: after a completion, on the ranks that were asked; what is written stays.
        DataError: the folder holds another corpus, a prompt is too long, the engine does not run the projected policy,
            the corpus fails a check, memory or disk is full.
        ConfigError: settings that can't be met.
    """
    folder, world = context.folder, context.world
    projection = same_on_all_ranks(projection, world)
    budget = thought_budget(policy.tokenizer, config.max_thought_tokens, (), "generate.max_thought_tokens")
    requests = Requests(prompts, config.num_samples, context.seed, budget)
    if not requests:
        raise DataError("generate: there is no prompt; set data.train, or raise data.num_train")
    places_N = requests.longest_first()
    own = _own_work(requests, places_N, config, context)
    work = EngineWork(
        own or (requests[:1] if world.is_main else []),
        requests[int(places_N[0])],
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
        attempt = Attempt.of(opened, policy, num_tokens=num_tokens, seconds=time.monotonic() - started)
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


def _own_work(requests: Requests, places_N: np.ndarray, config: Generate, context: StageContext) -> list[Request]:
    """This rank's part of what the array's task has not done yet: the same division on all ranks."""
    world = context.world
    is_done_N = _done_before(requests, context.folder / "completions", world)
    share_N = share_of(places_N, config.task_index, config.num_tasks)
    left_N = share_N[~is_done_N[share_N]]
    num_done = len(share_N) - len(left_N)
    if num_done and world.is_main:
        log.info("generate: %d of %d completions were made before", num_done, len(share_N))
    number, count = share_of_work(config, choose_engine(config).name, world)
    own = [] if number is None else [requests[place] for place in share_of(left_N, number, count).tolist()]
    skipped = num_done // count
    context.begin(len(own) + skipped, skipped)
    return own


def _done_before(requests: Requests, completions: Path, world: World) -> np.ndarray:
    """Which places earlier attempts have filled: each rank reads some of the parts; a finished corpus rank 0 alone.

    Raises:
        DataError: a line of another corpus, or a finished one that lacks some.
    """

    def look() -> list[Path]:
        completions.mkdir(parents=True, exist_ok=True)
        merged = finished_corpus(completions)
        return parts(completions) if merged is None else [merged]

    files = on_main("looking for what was generated before", look)
    is_done_N = torch.zeros(len(requests), dtype=torch.uint8)
    with wait_for_all_ranks("reading what was generated before"):
        for file in files[world.rank :: world.size]:
            for completion in read_if_there(file):
                number = requests.number_of(completion.id, completion.sample)
                requests.check(completion, number)
                is_done_N[number] = 1
    max_over_ranks_(is_done_N)
    is_merged = bool(files) and files[0].name in (MERGED, TABLE)
    if not is_merged and on_main("looking for a finished corpus", lambda: finished_corpus(completions) is not None):
        return _done_before(requests, completions, world)  # another task merged the parts meanwhile
    num_missing = len(requests) - int(is_done_N.sum())
    with together("reading the finished corpus"):
        if is_merged and num_missing:
            raise DataError(
                f"{files[0]} lacks {num_missing} of {len(requests)} completions; delete {completions.parent} "
                "and start the same command again"
            )
    return is_done_N.numpy().astype(bool)


def _write(decoded: Iterable[Decoded], policy: Policy, config: Generate, context: StageContext) -> int:
    """Append each completion to this rank's part as it finishes; give the number of their tokens.

    Nothing, if other tasks have finished the corpus while this one loaded its model: two arrays may overlap.
    """
    completions, world = context.folder / "completions", context.world
    if finished_corpus(completions) is not None:
        log.info("generate: other tasks have made the rest meanwhile")
        return 0
    name = part_name(world.rank, world.size, task=config.task_index, num_tasks=config.num_tasks)
    num_tokens = 0
    with JsonlWriter(completions / name) as lines:
        for one in decoded:
            lines.write(vars(_completion(one, policy)))
            num_tokens += len(one.tokens)
            context.advance(1, len(one.tokens))
            context.stop_alone()
    return num_tokens


def _completion(decoded: Decoded, policy: Policy) -> Completion:
    request = decoded.request
    text = str(policy.tokenizer.decode(list(decoded.tokens), skip_special_tokens=True))
    return Completion(
        request.id, request.sample, request.seed, request.tokens, decoded.tokens, text, decoded.finish_reason
    )
