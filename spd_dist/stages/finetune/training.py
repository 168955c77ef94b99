"""All epochs: the schedule, checkpoints, validation, and every way to stop."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from spd_dist.config import Finetune
from spd_dist.distributed.collectives import any_rank, together
from spd_dist.distributed.frozen_weights import FrozenWeights
from spd_dist.distributed.heartbeat import Heartbeat, naming_lagging_ranks
from spd_dist.distributed.memory import peak_bytes, peak_flops
from spd_dist.distributed.training_engine import DeepSpeedEngine, close_engine, training_engine, training_settings
from spd_dist.distributed.world import World
from spd_dist.errors import DataError, StopRequested
from spd_dist.models.loss import Student
from spd_dist.models.model_stats import Outline, outline_of
from spd_dist.models.policy import Policy
from spd_dist.models.save_weights import probe_logits
from spd_dist.seeding import generator
from spd_dist.stages.context import StageContext
from spd_dist.stages.finetune.batching import global_batches
from spd_dist.stages.finetune.checkpoints import Checkpoints, Found, State
from spd_dist.stages.finetune.sequences import TrainingSequences, lengths_of
from spd_dist.stages.finetune.step import StepResult, TrainStep, check_student, global_generator_kept
from spd_dist.tracking.progress import Progress, ProgressReports

log = logging.getLogger(__name__)


def learning_rate_fraction(step: int, *, num_steps: int, num_warmup_steps: int) -> float:
    """Share of the peak at zero-based `step`: linear warm-up from zero, then half a cosine down to zero.

    The same numbers as `transformers.get_cosine_schedule_with_warmup`.
    """
    if step < num_warmup_steps:
        return step / num_warmup_steps
    done = (step - num_warmup_steps) / max(1, num_steps - num_warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * done))


class Speedometer:
    """What a training's steps cost on this hardware."""

    def __init__(self, outline: Outline, world: World, *, has_teacher: bool = False) -> None:
        self.world = world
        # Without attention's, as is usual.
        self.flops_per_token = outline.training_flops + has_teacher * outline.forward_flops
        self.peak_flops = peak_flops(world)

    def measure(self, num_tokens: int, seconds: float) -> dict[str, float]:
        """Peak memory of this rank so far, and the model FLOPs utilisation where the accelerator's peak is known."""
        measured = {"peak_memory_gib": peak_bytes(self.world) / 2**30}
        if self.peak_flops is not None:
            measured["mfu_fraction"] = num_tokens * self.flops_per_token / (seconds * self.peak_flops * self.world.size)
        return measured


@dataclass(frozen=True)
class Corpus:
    """What one fine-tuning learns from."""

    train: TrainingSequences
    validation: TrainingSequences
    identity: str
    """The hash of all that the trained weights depend on."""

    @property
    def probe(self) -> tuple[int, ...]:
        """A few tokens to compare logits on."""
        return self.train[0].tokens[:64]


@dataclass(frozen=True)
class TrainingResult:
    """A finished training."""

    state: State
    saved_step: int
    """The step whose weights are the student's."""
    probe_logits: Tensor
    """The student's logits on the probe, to check what is saved."""


class Trainer:
    """One fine-tuning run of a student. Its methods are collectives."""

    def __init__(
        self,
        policy: Policy,
        student: Student,
        corpus: Corpus,
        config: Finetune,
        context: StageContext,
        frozen: FrozenWeights | None = None,
    ) -> None:
        """`student` is the policy's model, with its dropout's keys and its teacher, if it has one.

        `frozen` is to keep the weights that it begins with.
        """
        self.policy, self.student, self.corpus, self.config, self.context = policy, student, corpus, config, context
        self.frozen = frozen
        self.steps_per_epoch = -(-len(corpus.train) // config.global_batch_size)
        self.num_steps = self.steps_per_epoch * config.num_epochs
        self.checkpoints = Checkpoints(
            context.folder / "checkpoints",
            corpus.identity,
            context.world,
            zero_stage=context.distributed.zero_stage,
            keep=config.keep_checkpoints,
            keep_every=config.keep_every,
        )
        reports = ProgressReports(every_seconds=context.progress_seconds, run=context.estimate)
        self.progress = Progress("finetune", self.num_steps, f"steps of {context.arm}", reports)
        self.heartbeat = context.heartbeat or Heartbeat(context.folder / "heartbeat", context.world)
        self.speed = Speedometer(outline_of(policy.model), context.world, has_teacher=student.teacher is not None)
        self.state = State()
        self.batches: list[list[int]] = []
        """Of the current epoch."""

    def run(self) -> TrainingResult:
        """Train to the end, from the newest checkpoint if there is one.

        Raises:
            DataError: a loss or gradient is not finite, or a checkpoint cannot be written or used.
            StopRequested: the context said so; a checkpoint is there.
        """
        model = self.policy.model
        if self.config.checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        engine = self._engine(self.checkpoints.newest())
        try:
            check_student(self.student, self.corpus.train, self.config, self.context.world, varlen=self._varlen)
            with self.progress, naming_lagging_ranks(self.heartbeat), global_generator_kept(self.context.world):
                self.progress.skip(self.state.step)
                self._train(engine)
            best_step = self.state.best_step if self._keeps_best else None
            saved_step = self.state.step if best_step is None else best_step
            if saved_step != self.state.step:
                close_engine(engine)
                done = self.state
                engine = self._engine(self.checkpoints.at(saved_step))
                self.state = done
            logits = probe_logits(model, self.corpus.probe, self.context.world.device)
        finally:
            close_engine(engine)
            model.eval()
            if self.config.checkpointing:
                model.gradient_checkpointing_disable()
        return TrainingResult(self.state, saved_step, logits)

    @property
    def _keeps_best(self) -> bool:
        return self.config.stop_on_train_loss or self.config.keep_best

    @property
    def _varlen(self) -> bool:
        """Flash-attention keeps packed sequences apart only if all of them stand in one row."""
        settings: Any = self.policy.model.config
        return self.config.packing and settings._attn_implementation.startswith("flash")

    def _engine(self, found: Found | None) -> DeepSpeedEngine:
        config = self.config
        settings = training_settings(
            self.context.distributed, self.policy.model.dtype, max_grad_norm=config.max_grad_norm
        )
        with together("reading a checkpoint"):
            if found is not None and config.optimizer == "adamw_8bit" and self.checkpoints.is_of_others(found):
                raise DataError(
                    f"{found.folder} holds states of 8 bits for {found.marker.world_size} ranks under "
                    f"distributed.zero_stage={found.marker.zero_stage}, which no others can share; go on with as many, "
                    f"or delete {self.checkpoints.folder}"
                )
        folder = None if found is None else self.checkpoints.loadable(found)
        if found is not None and folder != found.folder:
            settings["checkpoint"] = {**settings.get("checkpoint", {}), "load_universal": True}
        engine = training_engine(
            self.student,
            settings,
            learning_rate=config.learning_rate,
            weight_decay=config.weight_decay,
            kind=config.optimizer,
        )
        if self.frozen is not None:
            self.frozen.keep(engine)
        if found is not None and folder is not None:
            self.checkpoints.load(engine, folder)
            self.state = found.marker.state
            done, arm = self.state.step, self.context.arm
            log.info("finetune: goes on after step %d of %d of %s", done, self.num_steps, arm)
        return engine

    def _train(self, engine: DeepSpeedEngine) -> None:
        trainer = TrainStep(
            engine,
            self.student.keys,
            self.corpus.train,
            self.config,
            self.context.seed,
            self.context.world,
            self.policy.pad_token_id,
            varlen=self._varlen,
        )
        try:
            while self.state.step < self.num_steps and not self.state.stopped_early:
                self._step(trainer)
        except DataError:  # on all ranks: what was being written is a good checkpoint
            self.checkpoints.complete()
            raise
        self.checkpoints.complete()

    def _step(self, trainer: TrainStep) -> None:
        """One step, and what is due after it."""
        state = self.state
        self.heartbeat.beat(f"step {state.step + 1} of finetune")
        self.checkpoints.complete_if_written()
        self._stop_if_asked(trainer.engine)
        result = trainer.step(self._batch(), state.step, self._learning_rate_fraction())
        state.took_step(result.loss, result.num_targets)
        self._report(result)
        ends_epoch = state.step % self.steps_per_epoch == 0
        is_best = ends_epoch and self._end_epoch(trainer)
        is_last = state.step == self.num_steps or state.stopped_early
        if is_best or is_last or state.step % self.config.checkpoint_every == 0:
            self._begin_checkpoint(trainer.engine)

    def _batch(self) -> list[int]:
        """The sequences of the next step: a function of the seed and the step alone."""
        epoch, index = divmod(self.state.step, self.steps_per_epoch)
        if index == 0 or not self.batches:
            order = generator(self.context.seed, "finetune", "order", epoch)
            self.batches = global_batches(lengths_of(self.corpus.train), self.config, order)
        return self.batches[index]

    def _learning_rate_fraction(self) -> float:
        num_warmup_steps = int(self.config.warmup_epochs * self.steps_per_epoch)
        return learning_rate_fraction(self.state.step, num_steps=self.num_steps, num_warmup_steps=num_warmup_steps)

    def _end_epoch(self, trainer: TrainStep) -> bool:
        """Measure the epoch; whether its weights are the best so far and may be wanted in the end."""
        validation = self.corpus.validation
        losses = self.state.ended_epoch(trainer.mean_loss(validation) if validation else None)
        self._log({f"epoch_{name}": value for name, value in losses.items()})
        if self.config.stop_on_train_loss:
            is_best = self.state.judge(losses["loss"], patience=1)
        else:
            is_best = bool(validation) and self.state.judge(losses["validation_loss"], self.config.patience)
        return is_best and self._keeps_best

    def _report(self, result: StepResult) -> None:
        self.progress.advance(1, result.num_tokens)
        self._log(
            {
                "loss": result.loss,
                "grad_norm": result.gradient_norm,
                "learning_rate": result.learning_rate,
                "tokens_per_second": result.num_tokens / result.seconds,
                **self.speed.measure(result.num_tokens, result.seconds),
            }
        )

    def _log(self, values: Mapping[str, float]) -> None:
        if self.context.metrics is not None:
            self.context.metrics.log("finetune", values, self.state.step)

    def _stop_if_asked(self, engine: DeepSpeedEngine) -> None:
        if not any_rank(self.context.should_stop()):
            return
        self._begin_checkpoint(engine)
        self.checkpoints.complete()
        with together("stopping"):
            raise StopRequested(
                f"finetune: stopped on request after step {self.state.step} of {self.num_steps} of {self.context.arm}; "
                "start the same command again to go on"
            )

    def _begin_checkpoint(self, engine: DeepSpeedEngine) -> None:
        best_step = self.state.best_step if self._keeps_best else None
        self.checkpoints.begin(engine, self.state, best_step=best_step)
