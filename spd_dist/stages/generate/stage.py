"""Generate a corpus: deal the prompts, decode under the projection, write each completion as it finishes, merge."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from spd_dist.config import Generate
from spd_dist.distributed.collectives import all_equal, broadcast_object, gather_objects, on_main
from spd_dist.distributed.world import World
from spd_dist.errors import DataError
from spd_dist.models.decoding import Decoded, Request
from spd_dist.models.engines.in_process import HFEngine, opened
from spd_dist.models.engines.placement import choose_placement
from spd_dist.models.operators import projection_hash
from spd_dist.models.policy import Policy
from spd_dist.runtime.artifacts import write_json
from spd_dist.runtime.completions import as_row, gather_parts, part_name, without_repeats, write_merged
from spd_dist.runtime.jsonl import JsonlWriter
from spd_dist.stages.generate.checks import canonical, check_rates, corpus_summary
from spd_dist.stages.generate.work import check_tasks, remaining, requests_for, sampling_of, share_of
from spd_dist.types import Completion, Projection, Prompt

log = logging.getLogger(__name__)
LARGEST_LEAKAGE = {"float64": 1e-5, "float32": 1e-5, "bfloat16": 3e-2, "float16": 4e-3}


class Advance(Protocol):
    """What shows how far a stage has come."""

    def advance(self, units: int, tokens: int = 0) -> None:
        """Count `units` more as done."""


def generate(
    policy: Policy,
    prompts: Sequence[Prompt],
    projection: Projection | None,
    config: Generate,
    *,
    seed: int,
    folder: Path,
    world: World,
    progress: Advance | None = None,
) -> dict[str, Any]:
    """Write `folder/completions/completions.jsonl` and `folder/summary.json`; the summary is given on every rank.

    A collective. Every rank is given all prompts; rank 0's projection is used on all. Lines that an earlier attempt
    left are kept, whatever its world size. As one task of an array (`num_tasks` > 1) it makes its share, and the task
    that finds the corpus complete merges it; before that the summary says `is_complete: False`.

    Args:
        policy: The untouched policy; so it is left.
        prompts: In the corpus's order.
        projection: None for plain self-training (PSR), or for SSD with its sampling.
        config: Its section.
        seed: The run's; with prompt id and sample index it makes a completion.
        folder: The stage's.
        world: This process among all.
        progress: Told of each completion.

    Raises:
        DataError: the folder holds another corpus, a prompt is too long, the projection does not act, the corpus fails
            a check, memory or disk is full.
        ConfigError: settings that can't be met.
    """
    check_tasks(config)
    projection = same_on_all_ranks(projection, world)
    requests = requests_for(prompts, config.num_samples, seed)
    own = _own_work(requests, config, folder / "completions", world)
    longest = max((len(request.tokens) for request in requests), default=0) + config.max_new_tokens
    placement = choose_placement(policy, config, world, longest)
    started = time.monotonic()
    with opened(policy, projection, config, world, placement) as engine:
        num_tokens = _write(engine, own, policy, config, folder / "completions", world, progress)
        checks = {"num_tokens": num_tokens, "seconds": time.monotonic() - started, **_projection_checks(engine, policy)}
    everyones = [checks] if world.size == 1 else gather_objects(checks)
    return on_main("merging the completions", lambda: _merge(requests, config, folder, everyones, placement))


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


def _own_work(requests: Sequence[Request], config: Generate, completions: Path, world: World) -> list[Request]:
    """This rank's part of what the array's task has not done yet: the same division on all ranks."""

    def keys() -> list[tuple[str, int]]:
        completions.mkdir(parents=True, exist_ok=True)
        done = without_repeats(gather_parts(completions))
        return [(request.id, request.sample) for request in remaining(requests, done)]

    todo = set(on_main("reading what was generated before", keys))
    share = share_of(requests, config.task_index, config.num_tasks)
    todays = [request for request in share if (request.id, request.sample) in todo]
    if world.is_main and len(todays) < len(share):
        log.info("generate: %d of %d completions were made before", len(share) - len(todays), len(share))
    return share_of(todays, world.rank, world.size)


def _write(
    engine: HFEngine,
    requests: Sequence[Request],
    policy: Policy,
    config: Generate,
    completions: Path,
    world: World,
    progress: Advance | None,
) -> int:
    """Append each completion as it finishes; give the number of tokens."""
    name = part_name(world.rank, world.size, task=config.task_index, num_tasks=config.num_tasks)
    num_tokens = 0
    if not requests:
        return 0
    with JsonlWriter(completions / name) as part:
        for decoded in engine.complete(requests, sampling_of(config)):
            part.write(as_row(_completion(decoded, policy)))
            num_tokens += len(decoded.tokens)
            if progress is not None:
                progress.advance(1, len(decoded.tokens))
    return num_tokens


def _completion(decoded: Decoded, policy: Policy) -> Completion:
    request = decoded.request
    text = policy.tokenizer.decode(decoded.tokens, skip_special_tokens=True)
    return Completion(
        request.id, request.sample, request.seed, request.tokens, decoded.tokens, text, decoded.finish_reason
    )


def _projection_checks(engine: HFEngine, policy: Policy) -> dict[str, Any]:
    """Calls and leakage of this rank.

    Raises:
        DataError: the projected outputs leave the subspace.
    """
    if engine.applied is None:
        return {"hook_calls": {}, "leakage": None}
    leakage = engine.applied.leakage()
    limit = LARGEST_LEAKAGE[str(policy.model.dtype).removeprefix("torch.")]
    if leakage is not None and not leakage <= limit:
        raise DataError(
            f"generate: leakage ||z(I-P)|| / ||z|| is {leakage:.2e}, above {limit:.0e}: the projection does not hold; "
            "set generate.apply_as=hook"
        )
    return {"hook_calls": {str(site): calls for site, calls in engine.applied.calls.items()}, "leakage": leakage}


def _merge(
    requests: Sequence[Request], config: Generate, folder: Path, everyones: Sequence[dict[str, Any]], placement: str
) -> dict[str, Any]:
    by_key = without_repeats(gather_parts(folder / "completions"))
    seconds = max(checks["seconds"] for checks in everyones)
    num_tokens = sum(checks["num_tokens"] for checks in everyones)
    calls = [checks["hook_calls"] for checks in everyones]
    leakages = [checks["leakage"] for checks in everyones if checks["leakage"] is not None]
    attempt = {
        "seconds": round(seconds, 3),
        "tokens_per_second": round(num_tokens / max(seconds, 1e-9), 1),
        "num_new_tokens": num_tokens,
        "engine": "hf",
        "placement": placement,
        "hook_calls": {site: sum(count[site] for count in calls) for site in calls[0]},
        "leakage": max(leakages, default=None),
    }
    if config.num_tasks > 1 and len(by_key) < len(requests):
        log.info("generate: %d of %d completions are there; other tasks make the rest", len(by_key), len(requests))
        return {"is_complete": False, "num_completions": len(by_key), **attempt}
    completions = canonical(requests, by_key)
    summary = corpus_summary(completions)
    check_rates(summary, config)
    write_merged(folder / "completions", completions)
    summary = {"is_complete": True, **summary, **attempt}
    write_json(folder / "summary.json", summary)
    return summary
