"""What a corpus must be like before anything is trained on it."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from spd_dist.config import Generate
from spd_dist.errors import DataError
from spd_dist.models.decoding import Request
from spd_dist.runtime.completions import Key, is_empty, is_repetitive
from spd_dist.types import Completion

MANY_CUT = 0.5
"""Share of completions without an end that is worth a warning."""
log = logging.getLogger(__name__)


def canonical(requests: Sequence[Request], by_key: Mapping[Key, Completion]) -> list[Completion]:
    """All completions in the corpus's order.

    Raises:
        DataError: some are missing.
    """
    missing = [request for request in requests if (request.id, request.sample) not in by_key]
    if missing:
        first = ", ".join(f"{request.id!r} sample {request.sample}" for request in missing[:3])
        raise DataError(
            f"{len(missing)} of {len(requests)} completions are missing ({first}, ...); start the same command again"
        )
    return [by_key[request.id, request.sample] for request in requests]


def corpus_summary(completions: Sequence[Completion]) -> dict[str, Any]:
    """Counts, lengths, finish reasons and rates of a corpus."""
    num = len(completions)
    num_tokens = [len(completion.tokens) for completion in completions]
    return {
        "num_prompts": len({completion.id for completion in completions}),
        "num_completions": num,
        "num_tokens": sum(num_tokens),
        "mean_tokens": sum(num_tokens) / num if num else 0.0,
        "finish_reasons": dict(sorted(Counter(completion.finish_reason for completion in completions).items())),
        "empty_rate": sum(map(is_empty, completions)) / num if num else 0.0,
        "repetition_rate": sum(map(is_repetitive, completions)) / num if num else 0.0,
        "length_rate": sum(one.finish_reason == "length" for one in completions) / num if num else 0.0,
    }


def check_rates(summary: Mapping[str, Any], config: Generate) -> None:
    """Fail loudly on a corpus that is not worth training on, and warn of one that teaches no end.

    Raises:
        DataError: too many completions are empty, repeat themselves, or were cut.
    """
    limits = {
        "empty": (config.max_empty_rate, "data.template or generate.temperature"),
        "repetition": (config.max_repetition_rate, "generate.temperature or generate.repetition_penalty"),
        "length": (config.max_length_rate, "generate.max_new_tokens"),
    }
    for name, (limit, cause) in limits.items():
        rate = summary[f"{name}_rate"]
        if rate > limit:
            raise DataError(
                f"generate: the {name} rate of the completions is {rate:.3f}, above generate.max_{name}_rate={limit}; "
                "look at them with launchers/corpus.py; then raise that limit and start again in this run_dir, where "
                f"they are kept, or change {cause} in another one"
            )
    if summary["length_rate"] > MANY_CUT:
        log.warning(
            "generate: %.0f %% of the completions were cut at generate.max_new_tokens=%d: a student learns from them "
            "to go on without an end; generate.max_length_rate makes this an error",
            100 * summary["length_rate"], config.max_new_tokens,
        )  # fmt: skip
