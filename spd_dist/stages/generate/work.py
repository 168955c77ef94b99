"""What is to be generated, what is done already, and which worker does the rest."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from spd_dist.config import Generate
from spd_dist.errors import ConfigError, DataError
from spd_dist.models.decoding import Request, longest_first
from spd_dist.models.sampling import Sampling
from spd_dist.runtime.completions import Key
from spd_dist.runtime.seeding import row_seed
from spd_dist.types import Completion, Prompt


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


def requests_for(prompts: Sequence[Prompt], num_samples: int, seed: int) -> list[Request]:
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
        Request(prompt.id, sample, prompt.tokens, row_seed(seed, prompt.id, sample))
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
