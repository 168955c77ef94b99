"""Steps and epochs on a DeepSpeed engine, and what must hold of a model for its loss to be exact."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import math
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from spd_dist.config import Finetune
from spd_dist.distributed.collectives import all_ranks, gather_objects, sum_over_ranks, together
from spd_dist.distributed.training_engine import DeepSpeedEngine, accumulate, optimizer_step, set_learning_rate
from spd_dist.distributed.world import World
from spd_dist.errors import ConfigError, DataError
from spd_dist.models.lora import TokenKeys, token_key
from spd_dist.models.loss import Student, check_tail_
from spd_dist.seeding import seed_of
from spd_dist.stages.finetune.batching import Batch, collate, global_batches, micro_batches
from spd_dist.stages.finetune.sequences import TrainingSequence, TrainingSequences, lengths_of

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step did."""

    loss: float
    """Mean over the supervised tokens of the global batch."""
    gradient_norm: float
    learning_rate: float
    num_targets: int
    num_tokens: int
    seconds: float


@dataclass(frozen=True)
class TrainStep:
    """An engine with what its steps need to know."""

    engine: DeepSpeedEngine
    keys: TokenKeys
    sequences: Sequence[TrainingSequence]
    config: Finetune
    seed: int
    world: World
    pad_token_id: int
    varlen: bool = False
    """All rows of a packed micro-batch in one, as flash-attention wants it."""

    @functools.cached_property
    def lengths(self) -> list[int]:
        """Tokens of each sequence."""
        return lengths_of(self.sequences)

    def step(self, batch: Sequence[int], step: int, learning_rate_fraction: float) -> StepResult:
        """One optimizer step on the sequences of `batch`, at zero-based `step`.

        Raises:
            DataError: a loss or gradient is not finite, on all ranks; the message names the step and the sequences.
        """
        started = time.perf_counter()
        num_targets = sum(self.sequences[index].num_targets for index in batch)
        learning_rate = set_learning_rate(self.engine, learning_rate_fraction)
        self.engine.train()
        torch.manual_seed(seed_of(self.seed, "finetune", "module", step, self.world.rank))  # of dropout in the model
        losses: list[tuple[Tensor, Tensor]] = []
        rounds = self._rounds(batch, f"step {step}")
        for number, (micro_batch, weight) in enumerate(rounds):
            total, loss_N = self._forward(micro_batch)
            # DeepSpeed takes the mean over ranks: times their number, it is the sum.
            scale = weight * self.world.size / max(1, num_targets)
            accumulate(self.engine, total * scale, is_last=number == len(rounds) - 1)
            losses += [(micro_batch.owner_N, loss_N)] if weight else []
        loss = sum_over_ranks(_sum(losses)) / max(1, num_targets)
        self._check_finite(loss, "the loss", step, lambda: _owners_of_broken(losses))
        norm = optimizer_step(self.engine)
        if not self.engine.fp16_enabled():  # there an overflow only lowers the loss scale
            self._check_finite(norm, "the gradient", step, lambda: set(batch))
        num_tokens = sum(self.lengths[index] for index in batch)
        return StepResult(loss, norm, learning_rate, num_targets, num_tokens, time.perf_counter() - started)

    @torch.no_grad()
    def mean_loss(self, sequences: TrainingSequences) -> float:
        """The mean loss of other `sequences` over their supervised tokens, without dropout."""
        self.engine.eval()
        held_out = dataclasses.replace(self, sequences=sequences)
        losses = []
        for batch in global_batches(held_out.lengths, self.config, torch.Generator()):
            for micro_batch, weight in held_out._rounds(batch, "validation"):
                _, loss_N = held_out._forward(micro_batch)
                losses += [(micro_batch.owner_N, loss_N)] if weight else []
        self.engine.train()
        return sum_over_ranks(_sum(losses)) / max(1, int(sequences.num_targets_N.sum()))

    def _rounds(self, batch: Sequence[int], purpose: str) -> list[tuple[Batch, float]]:
        """This rank's micro-batches and weights; a stand-in of weight 0, where it has none, joins the collectives."""
        stand_in = [[min(batch, key=self.lengths.__getitem__)]]
        rounds = []
        for slots in micro_batches(batch, self.lengths, self.config, self.world.size):
            mine = slots[self.world.rank]
            tensors = collate(
                mine or stand_in,
                self.sequences,
                lambda index: seed_of(self.seed, "finetune", "dropout", purpose, self.sequences[index].id),
                pad_token_id=self.pad_token_id,
                varlen=self.varlen,
            )
            rounds.append((tensors, float(bool(mine))))
        return rounds

    def _forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        on_device = batch.to(self.world.device)
        self.keys.key_BT = token_key(on_device.seed_BT, on_device.position_BT)
        on_host = self.config.offload_activations
        pinned = self.world.device.type != "cpu"
        with torch.autograd.graph.save_on_cpu(pin_memory=pinned) if on_host else contextlib.nullcontext():
            label_N = None if self.config.loss == "distil" else on_device.label_N
            return self.engine(on_device.token_BT, on_device.source_N, label_N, on_device.context)

    def _check_finite(self, value: float, what: str, step: int, find: Callable[[], set[int]]) -> None:
        """`value` is the same on all ranks; `find` gives the sequences of this rank that may have caused it."""
        if math.isfinite(value):
            return
        names = sorted({self.sequences[index].id for part in gather_objects(find()) for index in part})
        with together(f"checking {what}"):
            raise DataError(
                f"finetune: {what} of step {step + 1} is {value}, with the completions {', '.join(names[:8])}"
                f"{' and others' if len(names) > 8 else ''}; the last checkpoint is kept. "
                "Lower finetune.learning_rate, or look at these completions"
            )


def _sum(losses: Sequence[tuple[Tensor, Tensor]]) -> float:
    return torch.stack([loss_N.sum(dtype=torch.float64) for _, loss_N in losses]).sum().item() if losses else 0.0


def _owners_of_broken(losses: Sequence[tuple[Tensor, Tensor]]) -> set[int]:
    return {index for owner_N, loss_N in losses for index in owner_N[~loss_N.isfinite().cpu()].tolist()}


@contextlib.contextmanager
def global_generator_kept(world: World) -> Generator[None]:
    """Give the global generators back as they were: a model's own dropout can use no other."""
    with torch.random.fork_rng(
        [] if world.device.type == "cpu" else [world.device.index], device_type=_fork_type(world)
    ):
        yield


def _fork_type(world: World) -> str:
    return "cuda" if world.device.type == "cpu" else world.device.type


LEAK = {torch.float32: 1e-4, torch.bfloat16: 0.05, torch.float16: 0.02}
"""More than rounding explains."""


def check_student(
    student: Student, sequences: Sequence[TrainingSequence], config: Finetune, world: World, *, varlen: bool
) -> None:
    """See that the chunked loss is the model's own, and that packed sequences do not see each other. A collective.

    Raises:
        ConfigError: they do, and `finetune.packing` is on.
    """
    student.eval()
    tokens = max(sequences[:64], key=lambda sequence: len(sequence.tokens)).tokens[:64]
    if not all_ranks(check_tail_(student, torch.tensor([tokens], device=world.device))):
        student.tail = None
        log.info(
            "finetune: the model changes its logits in a way of its own, so they are held whole, which takes memory"
        )
    if config.packing:
        leak = _leak(student, sequences, world, varlen=varlen)
        with together("checking that packed sequences do not see each other"):
            if leak > LEAK[student.model.dtype]:
                raise ConfigError(
                    f"finetune.packing: True is not valid for this model: a token's loss changes by {leak:.2%} with "
                    "what is packed in front of it; set finetune.packing=false"
                )


@torch.no_grad()
def _leak(student: Student, sequences: Sequence[TrainingSequence], world: World, *, varlen: bool) -> float:
    """How much the loss of a token depends on a sequence in front of its own in the same row, relative to the mean."""
    second = max(range(min(len(sequences), 64)), key=lambda index: sequences[index].num_targets)
    first = (second + 1) % len(sequences)
    losses = []
    for row in ([second], [first, second]):
        batch = collate([row], sequences, lambda _: 0, pad_token_id=0, varlen=varlen).to(world.device)
        _, loss_N = student(batch.token_BT, batch.source_N, batch.label_N, batch.context)
        losses.append(loss_N[batch.owner_N == second])
    return ((losses[1] - losses[0]).abs().max() / losses[0].mean()).item()
