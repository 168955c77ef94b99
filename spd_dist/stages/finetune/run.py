"""The stage: from a policy and its completions to a saved student."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from typing import Any

from spd_dist.config import Finetune
from spd_dist.distributed.zero import weights_fingerprint
from spd_dist.errors import DataError
from spd_dist.models.adapters import add_adapters, key_dropout
from spd_dist.models.dropout import TokenKeys
from spd_dist.models.next_token_loss import Student
from spd_dist.models.policy import Policy
from spd_dist.runtime.artifacts import content_hash
from spd_dist.runtime.seeding import generator
from spd_dist.stages.finetune.export import export_adapter, export_model
from spd_dist.stages.finetune.job import Job
from spd_dist.stages.finetune.sequences import TrainingSequence, held_out, training_sequences
from spd_dist.stages.finetune.training import Training
from spd_dist.types import Completion

NUM_PROBE_TOKENS = 64
NOT_OF_RESULTS = ("micro_batch_size", "packing", "checkpointing", "checkpoint_every", "keep_checkpoints", "keep_every")


def finetune(policy: Policy, completions: Sequence[Completion], config: Finetune, job: Job) -> dict[str, Any]:
    """Train `policy` on its own `completions`, and write the student to `job.folder`. A collective.

    Starts where the newest whole checkpoint in `job.folder` left off. LoRA leaves `policy` as it was, without an engine;
    full fine-tuning leaves the student in it.

    Returns:
        The summary: sequences and tokens, losses by epoch, steps, seconds, and what was saved.

    Raises:
        DataError: the weights are not those that were loaded, nothing is supervised, or a loss or gradient is not finite.
        StopRequested: `job.should_stop` said so; a checkpoint is there.
    """
    started = time.perf_counter()
    policy.release()
    if weights_fingerprint(policy.model) != policy.fingerprint:
        raise DataError(
            f"model.name: the weights of {policy.name} changed since they were loaded; fine-tuning starts from the untouched ones. "
            "Load the policy again"
        )
    sequences = training_sequences(completions, config, pad_token_id=policy.pad_token_id)
    training_part, validation_part = held_out(
        sequences, config.validation_fraction, generator(job.seed, "finetune", "held out")
    )
    if config.mode == "lora":
        adapted = add_adapters(
            policy.model, config, generator=generator(job.seed, "finetune", "adapters"), base_name=policy.name
        )
        keys = key_dropout(adapted)
    else:
        adapted, keys = None, TokenKeys()
        policy.model.requires_grad_(True)
    training = Training(
        policy,
        Student(policy.model),
        keys,
        (training_part, validation_part),
        config,
        job,
        identity=_identity(policy, sequences, config, job),
        probe=(probe := sequences[0].tokens[:NUM_PROBE_TOKENS]),
    )
    outcome = training.run()
    if adapted is not None:
        saved = export_adapter(policy, adapted, job, probe, outcome.probe_logits)
    else:
        saved = export_model(policy, job, probe, outcome.probe_logits)
    return {
        "num_sequences": len(training_part),
        "num_validation_sequences": len(validation_part),
        "num_targets": sum(sequence.num_targets for sequence in training_part),
        "num_cut": sum(len(c.prompt_tokens) + len(c.tokens) > config.max_tokens for c in completions),
        "num_steps": outcome.state.step,
        "saved_step": outcome.saved_step,
        "stopped_early": outcome.state.stopped_early,
        "epochs": outcome.state.epochs,
        **saved,
        "seconds": time.perf_counter() - started,
    }


def _identity(policy: Policy, sequences: Sequence[TrainingSequence], config: Finetune, job: Job) -> str:
    """The hash of all that the trained weights depend on."""
    settings = {key: value for key, value in dataclasses.asdict(config).items() if key not in NOT_OF_RESULTS}
    data = [dataclasses.astuple(sequence) for sequence in sequences]
    return content_hash([policy.fingerprint, settings, job.seed, data])
