"""Rows under many projections: each batch's base pass once, then a pass a projection; written as they come."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch

from spd_dist.config import Config
from spd_dist.data.held_out import HeldOutExample
from spd_dist.distributed.collectives import gather_objects
from spd_dist.distributed.uneven_work import on_main
from spd_dist.inference.packed_weights import packed_weights
from spd_dist.inference.placement import Placement, choose_placement, placed
from spd_dist.models.policy import Policy
from spd_dist.projection.hooks import projected
from spd_dist.stages.context import StageContext
from spd_dist.stages.distortion.scoring import (
    RowValues,
    ScoredBatch,
    SharedPrefix,
    log_probabilities,
    row_values,
    scored_logits,
)
from spd_dist.storage.artifacts import JsonlWriter, read_jsonl
from spd_dist.types import KVSite, Projection, record_of

log = logging.getLogger(__name__)

PARTS = "rows.part-*.jsonl"
VERSION = "2"
"""Another one where the same settings and files come to give other values: nothing of the old ones is kept then."""
SAME = 1e-4
"""Largest difference of a logit between a pass that begins at the shared prefix and a whole one."""

Values = Mapping[str, RowValues]
"""Of one variant, by row id."""


@dataclass(frozen=True, eq=False)
class Variant:
    """One policy that rows are scored under."""

    prompt: str
    """The form in which rows are asked."""
    name: str
    """Unique among the variants of this form; the base has none."""
    projection: Projection | None = None

    @property
    def key(self) -> str:
        """What its values are filed under."""
        return f"{self.prompt}|{self.name}"

    @property
    def first_layer(self) -> int:
        """The lowest that the projection touches."""
        return 0 if self.projection is None else min(site.layer for site in self.projection.operators)


def base(prompt: str) -> Variant:
    """The untouched policy."""
    return Variant(prompt, "base")


class Passes(NamedTuple):
    """A variant, and the batches that it is wanted for."""

    variant: Variant
    batches: Sequence[int]


class Measurement:
    """Values by variant and row, on every rank the same; what an earlier attempt has left is not computed again."""

    def __init__(
        self,
        policy: Policy,
        rows: Mapping[str, Sequence[HeldOutExample]],
        sites: Sequence[KVSite],
        config: Config,
        context: StageContext,
    ) -> None:
        """Divide the rows into batches, the same at every world size, and read what is there. A collective.

        `rows` are the same in each form of the prompt, in one order; `sites`, any of the policy's, tell where its
        layers are.
        """
        self.policy, self.context, self.config = policy, context, config.mechanism
        pad_token_id, device = policy.pad_token_id, context.world.device
        self.batches = {
            prompt: [ScoredBatch.of(part, pad_token_id, device) for part in self._divided(each)]
            for prompt, each in rows.items()
        }
        longest = max(len(row.example.tokens) for each in rows.values() for row in each)
        decoding = config.evaluate.decoding()
        decoding = dataclasses.replace(decoding, batch_size=self.config.batch_size, max_new_tokens=1)
        self.placement: Placement = choose_placement(policy, decoding, context.world, longest, section="evaluate")
        shares = self.config.share_prefix and self.placement == "replica"
        self.prefix = SharedPrefix(policy.model, sites) if shares else None
        self.checked: set[int] = set()
        self.values: dict[str, dict[str, RowValues]] = {}
        self._num_planned = self._num_done = 0
        for line in on_main("reading what was measured before", self._read_parts):
            self._file(line)

    def _divided(self, rows: Sequence[HeldOutExample]) -> Iterator[Sequence[HeldOutExample]]:
        """The rows of each batch, of like lengths; none reaches over the end of the primary or of the explored rows."""
        ends = {self.config.num_rows, self.config.num_explored_rows, len(rows)}
        for start, stop in pairwise([0, *sorted(end for end in ends if end <= len(rows))]):
            by_length = sorted(rows[start:stop], key=lambda row: len(row.example.tokens))
            for first in range(0, len(by_length), self.config.batch_size):
                yield by_length[first : first + self.config.batch_size]

    def batches_of(self, prompt: str, num_rows: int) -> range:
        """The batches of the first rows: of `mechanism.num_rows` or `num_explored_rows`, or of all that there are."""
        sizes = accumulate(len(batch.rows) for batch in self.batches[prompt])
        return range(sum(size <= num_rows for size in sizes))

    def expect(self, wanted: Sequence[Passes], num_later: int) -> None:
        """Tell the progress what is to come: passes of a row that `wanted` lacks, and about so many more."""
        done = sum(map(len, self.values.values()))
        size = self.context.world.size
        self._num_done = done // size
        self._num_planned = self._num_done + math.ceil((self._num_rows(self._missing(wanted)) + num_later) / size)
        self.context.begin(self._num_planned, self._num_done)

    def take(self, wanted: Sequence[Passes]) -> None:
        """Compute what is missing of these, and of the base on the same batches. A collective.

        Raises:
            StopRequested: after a pass, on the ranks that were asked; what is written stays.
        """
        todo = self._missing(wanted)
        if not todo:
            return
        world = self.context.world
        own, lines = todo[world.rank :: world.size], []
        if self._num_done + self._num_rows(own) > self._num_planned:
            self._num_planned = self._num_done + self._num_rows(own)
            self.context.begin(self._num_planned, 0)
        name = f"rows.part-{world.rank:05d}-of-{world.size:05d}.jsonl"
        with (
            placed(self.policy, self.placement, world, "scoring"),
            packed_weights(self.policy.model) if self.placement == "replica" else nullcontext(),
            JsonlWriter(self.context.folder / name) as part,
        ):
            for (prompt, index), variants in own:
                lines += self._take_batch(self.batches[prompt][index], variants, part)
        for rank_lines in gather_objects(lines):
            for line in rank_lines:
                self._file(line)

    def values_of(self, variant: Variant, batches: Sequence[int]) -> dict[str, RowValues]:
        """What was computed, by row id, in the order of the rows."""
        found = self.values[variant.key]
        ids = [row.example.id for index in batches for row in self.batches[variant.prompt][index].rows]
        return {key: found[key] for key in ids}

    def mean_kl(self, variant: Variant, batches: Sequence[int]) -> float:
        """The mean divergence of a variant over the rows of these batches."""
        values = self.values_of(variant, batches).values()
        return sum(one.kl for one in values) / len(values)

    def _missing(self, wanted: Sequence[Passes]) -> list[tuple[tuple[str, int], list[Variant]]]:
        """What is still to be computed of each batch."""
        by_batch: dict[tuple[str, int], dict[str, Variant]] = {}
        for variant, batches in wanted:
            for index in batches:
                variants = by_batch.setdefault((variant.prompt, index), {"": base(variant.prompt)})
                variants.setdefault(variant.key, variant)
        missing = {
            place: [one for one in variants.values() if not self._has(one, self.batches[place[0]][place[1]])]
            for place, variants in by_batch.items()
        }
        return [(place, variants) for place, variants in sorted(missing.items()) if variants]

    def _num_rows(self, todo: Iterable[tuple[tuple[str, int], Sequence[Variant]]]) -> int:
        return sum(len(self.batches[prompt][index].rows) * len(variants) for (prompt, index), variants in todo)

    def _has(self, variant: Variant, batch: ScoredBatch) -> bool:
        found = self.values.get(variant.key, {})
        return all(row.example.id in found for row in batch.rows)

    def _file(self, line: Mapping[str, Any]) -> None:
        self.values.setdefault(line["variant"], {})[line["id"]] = record_of(RowValues, line["values"])

    def _read_parts(self) -> list[dict[str, Any]]:
        return [line for file in sorted(self.context.folder.glob(PARTS)) for line in read_jsonl(file)]

    def _take_batch(self, batch: ScoredBatch, variants: Sequence[Variant], part: JsonlWriter) -> list[dict[str, Any]]:
        """The base pass, then each variant's; the lines that were written."""
        lines: list[dict[str, Any]] = []

        def write(
            variant: Variant, logit_SV: torch.Tensor, base_KV: torch.Tensor | None, leakage: float | None
        ) -> None:
            for row_id, values in row_values(logit_SV, batch, base_KV, leakage):
                line = {"variant": variant.key, "id": row_id, "values": dataclasses.asdict(values)}
                part.write(line)
                lines.append(line)
            self._num_done += len(batch.rows)
            self.context.advance(len(batch.rows), batch.num_tokens)
            self.context.stop_alone()

        firsts = {one.first_layer for one in variants}
        logit_SV = self._base_pass(batch, firsts)
        base_KV = log_probabilities(logit_SV, batch)
        for variant in variants:
            if variant.projection is None:
                write(variant, logit_SV, None, None)
        del logit_SV
        for variant in variants:
            if variant.projection is not None:
                with projected(self.policy.model, variant.projection) as monitor:
                    logit_SV = self._pass_from(variant.first_layer, batch)
                write(variant, logit_SV, base_KV, monitor.leakage())
        return lines

    def _base_pass(self, batch: ScoredBatch, firsts: set[int]) -> torch.Tensor:
        if self.prefix is None:
            return scored_logits(self.policy, batch)
        with self.prefix.recording(firsts):
            logit_SV = scored_logits(self.policy, batch)
        for first in sorted(firsts - self.checked - {0}):
            with self.prefix.replaying(first):
                gap = (scored_logits(self.policy, batch) - logit_SV).abs().max().item()
            self.checked.add(first)
            if not gap <= SAME:
                log.warning("mechanism: a pass from layer %d differs by %.1e, so each pass is a whole one", first, gap)
                self.prefix = None
                break
        return logit_SV

    def _pass_from(self, first: int, batch: ScoredBatch) -> torch.Tensor:
        if self.prefix is None:
            return scored_logits(self.policy, batch)
        with self.prefix.replaying(first):
            return scored_logits(self.policy, batch)
