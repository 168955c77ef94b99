"""All epochs: the schedule, checkpoints, stopping on request, on a NaN, or because the loss no longer falls."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from spd_dist.config import Finetune
from spd_dist.distributed.collectives import any_rank
from spd_dist.distributed.training import DeepSpeedEngine, training_engine, training_settings
from spd_dist.errors import StopRequested
from spd_dist.models.dropout import TokenKeys
from spd_dist.models.next_token_loss import Student
from spd_dist.models.policy import Policy
from spd_dist.models.save import probe_logits
from spd_dist.runtime.progress import Progress
from spd_dist.runtime.seeding import generator
from spd_dist.stages.finetune.checkpoints import Checkpoints, Found
from spd_dist.stages.finetune.job import Job
from spd_dist.stages.finetune.loop import StepResult, Trainer, global_generator_kept
from spd_dist.stages.finetune.plan import global_batches
from spd_dist.stages.finetune.schedule import learning_rate_fraction
from spd_dist.stages.finetune.sequences import TrainingSequence

log = logging.getLogger(__name__)


@dataclass
class State:
    """Where the training stands: what a checkpoint holds beside weights and optimizer."""

    step: int = 0
    """Optimizer steps done."""
    nll: float = 0.0
    num_targets: int = 0
    """Both summed over the steps of this epoch so far."""
    epochs: list[dict[str, float]] = field(default_factory=list)
    best_loss: float | None = None
    best_step: int | None = None
    num_worse_epochs: int = 0
    stopped_early: bool = False


@dataclass(frozen=True)
class Outcome:
    """A finished training."""

    state: State
    num_steps: int
    saved_step: int
    """The step whose weights are the student's."""
    probe_logits: Tensor
    """The student's logits on the probe, to check what is saved."""


class Training:
    """One fine-tuning run of a student."""

    def __init__(
        self,
        policy: Policy,
        student: Student,
        keys: TokenKeys,
        parts: Sequence[list[TrainingSequence]],
        config: Finetune,
        job: Job,
        *,
        identity: str,
        probe: tuple[int, ...],
    ) -> None:
        """`parts` are the sequences to train on and those to validate on."""
        self.policy, self.student, self.keys = policy, student, keys
        self.training_part, self.validation_part = parts
        self.config, self.job, self.probe = config, job, probe
        self.steps_per_epoch = -(-len(self.training_part) // config.global_batch_size)
        self.num_steps = self.steps_per_epoch * config.num_epochs
        self.checkpoints = Checkpoints(
            job.folder / "checkpoints", identity, job.world, keep=config.keep_checkpoints, keep_every=config.keep_every
        )
        self.progress = Progress("finetune", self.num_steps, "steps", every_seconds=job.progress_seconds)
        self.state = State()

    def run(self) -> Outcome:
        """Train to the end, from the newest checkpoint if there is one."""
        model = self.policy.model
        if self.config.checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        engine = self._engine(self.checkpoints.newest())
        try:
            with self.progress, global_generator_kept(self.job.world):
                self.progress.skip(self.state.step)
                self._epochs(engine)
            if self._keeps_best and self.state.best_step not in (None, self.state.step):
                engine.destroy()
                done, saved_step = self.state, self.state.best_step
                engine = self._engine(self.checkpoints.at(saved_step))
                self.state = done
            else:
                saved_step = self.state.step
            logits = probe_logits(model, self.probe, self.job.world.device)
        finally:
            engine.destroy()
            model.eval()
            if self.config.checkpointing:
                model.gradient_checkpointing_disable()
        return Outcome(self.state, self.num_steps, saved_step, logits)

    @property
    def _keeps_best(self) -> bool:
        return self.config.stop_on_train_loss or self.config.keep_best

    def _engine(self, found: Found | None) -> DeepSpeedEngine:
        settings = training_settings(
            self.job.distributed, self.policy.model.dtype, max_grad_norm=self.config.max_grad_norm
        )
        folder = None if found is None else self.checkpoints.loadable(found)
        if found is not None and folder != found.folder:
            settings["checkpoint"] = {**settings.get("checkpoint", {}), "load_universal": True}
        engine = training_engine(
            self.student, settings, learning_rate=self.config.learning_rate, weight_decay=self.config.weight_decay
        )
        if found is not None:
            self.checkpoints.load(engine, folder)
            self.state = State(**found.state)
            log.info("finetune: goes on after step %d of %d", found.step, self.num_steps)
        return engine

    def _epochs(self, engine: DeepSpeedEngine) -> None:
        trainer = Trainer(
            engine, self.keys, self.training_part, self.config, self.job.seed, self.job.world, self.policy.pad_token_id
        )
        lengths = [len(sequence.tokens) for sequence in self.training_part]
        num_warmup_steps = int(self.config.warmup_epochs * self.steps_per_epoch)
        while self.state.step < self.num_steps and not self.state.stopped_early:
            epoch, first = divmod(self.state.step, self.steps_per_epoch)
            batches = global_batches(lengths, self.config, generator(self.job.seed, "finetune", "order", epoch))
            for batch in batches[first:]:
                self._stop_if_asked(engine)
                fraction = learning_rate_fraction(
                    self.state.step, num_steps=self.num_steps, num_warmup_steps=num_warmup_steps
                )
                self._took(trainer.step(batch, self.state.step, fraction))
                ends_epoch = self.state.step % self.steps_per_epoch == 0
                is_best = self._end_epoch(trainer, epoch) if ends_epoch else False
                if (
                    self.state.step % self.config.checkpoint_every == 0
                    or self.state.step == self.num_steps
                    or is_best
                    or self.state.stopped_early
                ):
                    self._save(engine)

    def _took(self, result: StepResult) -> None:
        self.state.step += 1
        self.state.nll += result.loss * result.num_targets
        self.state.num_targets += result.num_targets
        self.progress.advance(1, result.num_tokens)
        self._log(
            {
                "loss": result.loss,
                "grad_norm": result.gradient_norm,
                "learning_rate": result.learning_rate,
                "tokens_per_second": result.num_tokens / result.seconds,
            }
        )

    def _log(self, values: Mapping[str, float]) -> None:
        if self.job.metrics is not None:
            self.job.metrics.log("finetune", values, self.state.step)

    def _end_epoch(self, trainer: Trainer, epoch: int) -> bool:
        """Measure the epoch; whether it is the best so far, and its weights may be wanted."""
        state = self.state
        losses = {"loss": state.nll / max(1, state.num_targets)}
        if self.validation_part:
            losses["validation_loss"] = trainer.mean_loss(self.validation_part)
        state.nll, state.num_targets = 0.0, 0
        state.epochs.append({"epoch": epoch + 1, **losses})
        self._log({f"epoch_{name}": value for name, value in losses.items()})
        judged = losses["loss" if self.config.stop_on_train_loss else "validation_loss"] if self._judges else None
        if judged is None:
            return False
        is_best = state.best_loss is None or judged < state.best_loss
        if is_best:
            state.best_loss, state.best_step = judged, state.step
        state.num_worse_epochs = 0 if is_best else state.num_worse_epochs + 1
        patience = 1 if self.config.stop_on_train_loss else self.config.patience
        state.stopped_early = patience is not None and state.num_worse_epochs >= patience
        return is_best and self._keeps_best

    @property
    def _judges(self) -> bool:
        return self.config.stop_on_train_loss or bool(self.validation_part)

    def _stop_if_asked(self, engine: DeepSpeedEngine) -> None:
        if not any_rank(self.job.should_stop()):
            return
        self._save(engine)
        raise StopRequested(
            f"finetune: stopped on request after step {self.state.step} of {self.num_steps}; start the same command again to go on"
        )

    def _save(self, engine: DeepSpeedEngine) -> None:
        self.checkpoints.save(
            engine,
            self.state.step,
            dataclasses.asdict(self.state),
            best_step=self.state.best_step if self._keeps_best else None,
        )
