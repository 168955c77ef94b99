"""What a corpus must be like before anything is trained on it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from spd_dist.config import Generate
from spd_dist.errors import DataError
from spd_dist.models.decoding import Request
from spd_dist.runtime.completions import Key, is_empty, is_repetitive
from spd_dist.types import Completion


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
    }


def check_rates(summary: Mapping[str, Any], config: Generate) -> None:
    """Fail loudly on a corpus that is not worth training on.

    Raises:
        DataError: too many completions are empty or repeat themselves.
    """
    for name, limit in (("empty", config.max_empty_rate), ("repetition", config.max_repetition_rate)):
        rate = summary[f"{name}_rate"]
        if rate > limit:
            raise DataError(
                f"generate: the {name} rate of the completions is {rate:.3f}, above generate.max_{name}_rate={limit}; "
                "look at them with launchers/corpus.py, then change generate.temperature, data.template or the limit"
            )
