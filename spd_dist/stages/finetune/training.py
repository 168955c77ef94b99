"""All epochs: the schedule, checkpoints, validation, and every way to stop."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from spd_dist.config import Finetune
from spd_dist.distributed.collectives import any_rank, together
from spd_dist.distributed.heartbeat import Heartbeat, naming_lagging_ranks
from spd_dist.distributed.training import DeepSpeedEngine, close_engine, training_engine, training_settings
from spd_dist.errors import DataError, StopRequested
from spd_dist.models.dropout import TokenKeys
from spd_dist.models.next_token_loss import Student
from spd_dist.models.outline import outline_of
from spd_dist.models.policy import Policy
from spd_dist.models.save import probe_logits
from spd_dist.runtime.progress import Progress
from spd_dist.runtime.seeding import generator
from spd_dist.stages.finetune.checkpoints import Checkpoints, Found
from spd_dist.stages.finetune.job import Job
from spd_dist.stages.finetune.loop import StepResult, Trainer, global_generator_kept
from spd_dist.stages.finetune.plan import global_batches
from spd_dist.stages.finetune.probes import check_student
from spd_dist.stages.finetune.schedule import learning_rate_fraction
from spd_dist.stages.finetune.sequences import TrainingSequence
from spd_dist.stages.finetune.speed import Speedometer
from spd_dist.stages.finetune.state import State

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Corpus:
    """What one fine-tuning learns from."""

    train: list[TrainingSequence]
    validation: list[TrainingSequence]
    identity: str
    """The hash of all that the trained weights depend on."""

    @property
    def probe(self) -> tuple[int, ...]:
        """A few tokens to compare logits on."""
        return self.train[0].tokens[:64]


@dataclass(frozen=True)
class Outcome:
    """A finished training."""

    state: State
    saved_step: int
    """The step whose weights are the student's."""
    probe_logits: Tensor
    """The student's logits on the probe, to check what is saved."""


class Training:
    """One fine-tuning run of a student. Its methods are collectives."""

    def __init__(self, policy: Policy, corpus: Corpus, config: Finetune, job: Job, *, keys: TokenKeys) -> None:
        """`keys` are those of the dropout inside the policy's adapters."""
        self.policy, self.corpus, self.config, self.job, self.keys = policy, corpus, config, job, keys
        self.student = Student(policy.model)
        self.steps_per_epoch = -(-len(corpus.train) // config.global_batch_size)
        self.num_steps = self.steps_per_epoch * config.num_epochs
        self.checkpoints = Checkpoints(
            job.folder / "checkpoints",
            corpus.identity,
            job.world,
            zero_stage=job.distributed.zero_stage,
            keep=config.keep_checkpoints,
            keep_every=config.keep_every,
        )
        said = {"every_seconds": job.progress_seconds, "run": job.estimate}
        self.progress = Progress("finetune", self.num_steps, "steps", **said)
        self.heartbeat = job.heartbeat or Heartbeat(job.folder / "heartbeat", job.world)
        self.speed = Speedometer(outline_of(policy.model), job.world)
        self.state = State()
        self.batches: list[list[int]] = []
        """Of the current epoch."""

    def run(self) -> Outcome:
        """Train to the end, from the newest checkpoint if there is one.

        Raises:
            DataError: a loss or gradient is not finite, or a checkpoint cannot be written or used.
            StopRequested: the job said so; a checkpoint is there.
        """
        model = self.policy.model
        if self.config.checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        engine = self._engine(self.checkpoints.newest())
        try:
            check_student(self.student, self.corpus.train, self.config, self.job.world, varlen=self._varlen)
            with self.progress, naming_lagging_ranks(self.heartbeat), global_generator_kept(self.job.world):
                self.progress.skip(self.state.step)
                self._train(engine)
            saved_step = self.state.best_step if self._keeps_best else self.state.step
            if saved_step != self.state.step:
                close_engine(engine)
                done = self.state
                engine = self._engine(self.checkpoints.at(saved_step))
                self.state = done
            logits = probe_logits(model, self.corpus.probe, self.job.world.device)
        finally:
            close_engine(engine)
            model.eval()
            if self.config.checkpointing:
                model.gradient_checkpointing_disable()
        return Outcome(self.state, saved_step, logits)

    @property
    def _keeps_best(self) -> bool:
        return self.config.stop_on_train_loss or self.config.keep_best

    @property
    def _varlen(self) -> bool:
        """Flash-attention keeps packed sequences apart only if all of them stand in one row."""
        return self.config.packing and self.policy.model.config._attn_implementation.startswith("flash")

    def _engine(self, found: Found | None) -> DeepSpeedEngine:
        config = self.config
        settings = training_settings(self.job.distributed, self.policy.model.dtype, max_grad_norm=config.max_grad_norm)
        folder = None if found is None else self.checkpoints.loadable(found)
        if found is not None and folder != found.folder:
            settings["checkpoint"] = {**settings.get("checkpoint", {}), "load_universal": True}
        engine = training_engine(
            self.student, settings, learning_rate=config.learning_rate, weight_decay=config.weight_decay
        )
        if found is not None:
            self.checkpoints.load(engine, folder)
            self.state = State(**found.state)
            log.info("finetune: goes on after step %d of %d", found.step, self.num_steps)
        return engine

    def _train(self, engine: DeepSpeedEngine) -> None:
        trainer = Trainer(
            engine,
            self.keys,
            self.corpus.train,
            self.config,
            self.job.seed,
            self.job.world,
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

    def _step(self, trainer: Trainer) -> None:
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
            lengths = [len(sequence.tokens) for sequence in self.corpus.train]
            self.batches = global_batches(lengths, self.config, generator(self.job.seed, "finetune", "order", epoch))
        return self.batches[index]

    def _learning_rate_fraction(self) -> float:
        num_warmup_steps = int(self.config.warmup_epochs * self.steps_per_epoch)
        return learning_rate_fraction(self.state.step, num_steps=self.num_steps, num_warmup_steps=num_warmup_steps)

    def _end_epoch(self, trainer: Trainer) -> bool:
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
        if self.job.metrics is not None:
            self.job.metrics.log("finetune", values, self.state.step)

    def _stop_if_asked(self, engine: DeepSpeedEngine) -> None:
        if not any_rank(self.job.should_stop()):
            return
        self._begin_checkpoint(engine)
        self.checkpoints.complete()
        with together("stopping"):
            raise StopRequested(
                f"finetune: stopped on request after step {self.state.step} of {self.num_steps}; "
                "start the same command again to go on"
            )

    def _begin_checkpoint(self, engine: DeepSpeedEngine) -> None:
        best_step = self.state.best_step if self._keeps_best else None
        self.checkpoints.begin(engine, self.state.step, dataclasses.asdict(self.state), best_step=best_step)
