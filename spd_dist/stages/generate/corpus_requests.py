"""What a corpus is made of: its prompts, rendered by all ranks together, and a request for each prompt and sample."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import overload

import numpy as np

from spd_dist.config import Generate
from spd_dist.data.tasks.protocol import Row
from spd_dist.distributed.collectives import gather_objects, together
from spd_dist.distributed.uneven_work import on_main, wait_for_all_ranks
from spd_dist.distributed.world import World
from spd_dist.errors import DataError
from spd_dist.inference.requests import Request
from spd_dist.seeding import row_seed
from spd_dist.storage.completions import MOST_AS_TEXT
from spd_dist.storage.tables import Table, column_of, num_tokens_of, write_table
from spd_dist.types import Completion, Prompt, ThoughtBudget

ROWS_A_CALL = 4096
"""Rendered at a time where there are many."""


@contextmanager
def rendered_together(
    rows: Sequence[Row], render: Callable[[Sequence[Row]], list[Prompt]], folder: Path, world: World
) -> Generator[Sequence[Prompt]]:
    """The prompts of all rows, each rendered and tokenised by one rank. A collective.

    Up to `MOST_AS_TEXT` every rank holds them; more are written to `folder`, which all ranks map and which is removed
    at the end.

    Raises:
        UserError: of `render`, on all ranks.
    """
    start, stop = (len(rows) * part // world.size for part in (world.rank, world.rank + 1))
    if len(rows) <= MOST_AS_TEXT:
        with together("rendering the training prompts"):
            own = render(rows[start:stop])
        yield [prompt for part in gather_objects(own) for prompt in part]
        return
    paths = [folder / f"rank-{rank:05d}-of-{world.size:05d}.arrow" for rank in range(world.size)]
    calls = (rows[first : min(first + ROWS_A_CALL, stop)] for first in range(start, stop, ROWS_A_CALL))
    with wait_for_all_ranks("rendering the training prompts"):
        write_table(paths[world.rank], Prompt, (prompt for call in calls for prompt in render(call)))
    with together("opening the rendered prompts"):
        prompts = Table(Prompt, paths)
    yield prompts
    on_main("removing the rendered prompts", lambda: shutil.rmtree(folder, ignore_errors=True))


class Requests(Sequence[Request]):
    """Every completion of the corpus, in its order: prompts as they come, then samples; each made when asked for."""

    def __init__(
        self, prompts: Sequence[Prompt], num_samples: int, seed: int, budget: ThoughtBudget | None = None
    ) -> None:
        """Number the prompts; `budget` is every request's.

        Raises:
            DataError: two prompts of one id, or a prompt without tokens.
        """
        self.prompts, self.num_samples, self.seed, self.budget = prompts, num_samples, seed, budget
        self.length_N = num_tokens_of(prompts, "tokens")
        self.ids: list[str] = list(column_of(prompts, "id"))
        self.numbers = {name: number for number, name in enumerate(self.ids)}
        if len(self.numbers) < len(self.ids):
            twice = next(name for number, name in enumerate(self.ids) if self.numbers[name] != number)
            raise DataError(f"two prompts have the id {twice!r}; ids name completions, so each needs its own")
        if len(prompts) and not self.length_N.all():
            empty = self.ids[int(self.length_N.argmin())]
            raise DataError(f"prompt {empty!r} has no tokens; drop it, or use data.template=chat")

    def __len__(self) -> int:
        return len(self.ids) * self.num_samples

    @overload
    def __getitem__(self, index: int) -> Request: ...
    @overload
    def __getitem__(self, index: slice) -> list[Request]: ...
    def __getitem__(self, index: int | slice) -> Request | list[Request]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        if not 0 <= index < len(self):
            raise IndexError(index)
        number, sample = divmod(index, self.num_samples)
        prompt = self.prompts[number]
        return Request(prompt.id, sample, prompt.tokens, row_seed(self.seed, prompt.id, sample), self.budget)

    def number_of(self, prompt: str, sample: int) -> int:
        """The place of a completion in the corpus.

        Raises:
            DataError: it has none.
        """
        number = self.numbers.get(prompt)
        if number is None or not 0 <= sample < self.num_samples:
            raise _of_another_corpus(prompt, sample)
        return number * self.num_samples + sample

    def check(self, completion: Completion, number: int) -> None:
        """See that a completion answers the request at its place.

        Raises:
            DataError: its seed or prompt is another.
        """
        request = self[number]
        if (request.seed, request.tokens) != (completion.seed, completion.prompt_tokens):
            raise _of_another_corpus(completion.id, completion.sample)

    def longest_first(self) -> np.ndarray:
        """The places of all requests in the order in which they are decoded."""
        order = sorted(range(len(self.ids)), key=lambda number: (-self.length_N[number], self.ids[number]))
        samples = np.arange(self.num_samples)
        return (np.array(order, np.int64)[:, None] * self.num_samples + samples).reshape(-1)


def _of_another_corpus(prompt: str, sample: int) -> DataError:
    return DataError(
        f"generate/completions holds prompt {prompt!r}, sample {sample}, of another seed, prompt or data set; delete "
        "generate/, or give this run a run_dir of its own"
    )


def share_of(places_N: np.ndarray, index: int, count: int) -> np.ndarray:
    """Every `count`-th place of all in the order of length: shares are alike in work, and no two overlap."""
    return places_N[index::count]


def prompts_folder(folder: Path, config: Generate) -> Path:
    """Where the prompts of a large corpus are while a task of an array is at work."""
    return folder / f"prompts-{config.task_index:05d}-of-{config.num_tasks:05d}"
