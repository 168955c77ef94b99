"""The stage: from a policy and its completions to a saved student."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch

from spd_dist.config import Finetune
from spd_dist.distributed.collectives import together
from spd_dist.distributed.frozen_weights import FrozenWeights
from spd_dist.distributed.zero import end_engine, frozen_engine, is_sharded
from spd_dist.models.forward import use_liger
from spd_dist.models.lora import (
    InputSums,
    PeftModel,
    adapted_modules,
    add_adapters,
    key_dropout,
    lora_layers,
    reads_inputs,
    summing_inputs,
    without_adapters,
)
from spd_dist.models.loss import Student, Teacher
from spd_dist.models.model_card import Card
from spd_dist.models.policy import Policy
from spd_dist.projection.hooks import projected
from spd_dist.projection.operators import projection_hash
from spd_dist.seeding import generator
from spd_dist.stages.context import StageContext
from spd_dist.stages.finetune.preconditions import check_start, check_teacher, check_untouched
from spd_dist.stages.finetune.sequences import TrainingSequences, held_out, training_sequences
from spd_dist.stages.finetune.student_export import Export, SavedAdapter, SavedModel
from spd_dist.stages.finetune.training import Corpus, Trainer, TrainingResult
from spd_dist.storage.artifacts import content_hash, sha256_of
from spd_dist.storage.tables import Table, num_tokens_of
from spd_dist.types import Completion, Projection, Subspace

log = logging.getLogger(__name__)

NOT_OF_RESULTS = {
    "micro_batch_size", "packing", "checkpointing", "offload_activations", "checkpoint_every", "keep_checkpoints",
    "keep_every", "merge", "num_on_policy_iterations",
}  # fmt: skip
"""Settings of `finetune` that change no trained weight."""


@dataclass(frozen=True)
class StudentSummary:
    """What `finetune/summary.json` holds."""

    num_sequences: int
    num_validation_sequences: int
    num_targets: int
    """Supervised tokens of an epoch."""
    num_cut: int
    """Completions that were longer than `finetune.max_tokens` with their prompts: their end is not learnt."""
    num_dropped: int
    """Completions of which no token is supervised: nothing is left of them behind the cut."""
    num_steps: int
    saved_step: int
    """The step whose weights were saved."""
    stopped_early: bool
    epochs: list[dict[str, float]]
    """Losses of each."""
    adapter: SavedAdapter | None
    model: SavedModel | None
    seconds: float


def finetune(
    policy: Policy,
    completions: Sequence[Completion],
    config: Finetune,
    context: StageContext,
    projection: Projection | None = None,
    *,
    start: Path | Subspace | None = None,
) -> StudentSummary:
    """Train `policy` on its own `completions`, and write the student to `context.folder`. A collective.

    With a `projection`, which `finetune.loss=distil` needs and nothing else takes, the student learns the next-token
    distributions that the projected policy has along the completions, and not their tokens. With `start`, the folder of
    an adapter of these same settings, LoRA begins as that adapter, and the completions are its student's; with a
    subspace, which `finetune.lora_init=spd` needs and nothing else takes, it begins in that.

    It goes on from the newest whole checkpoint in `context.folder`. LoRA leaves `policy` as it was; full fine-tuning
    leaves the student in it, without an engine.

    Returns:
        The summary, with what was saved.

    Raises:
        ConfigError: settings that this model or DeepSpeed cannot follow.
        DataError: the weights are not as they were loaded, nothing is supervised, or a loss or gradient is not finite.
        StopRequested: `context.should_stop` said so; a checkpoint is there.
    """
    started = time.perf_counter()
    check_untouched(policy)
    with together("preparing the fine-tuning"):
        check_teacher(config, projection, context.distributed)
        check_start(policy, config, start)
        corpus = _corpus(policy, completions, config, context, projection=projection, start=start)
        if config.liger:
            use_liger(policy.model, context.world.device)
    inputs = _inputs(policy, corpus.train, config, context) if reads_inputs(config) and start is None else None
    adapted = None
    if config.mode == "lora":  # it gathers shards, so a rank that fails alone must end, and not wait for the others
        seeded = generator(context.seed, "finetune", "adapters")
        adapted = add_adapters(policy.model, config, generator=seeded, inputs=inputs, start=start)
    else:
        policy.model.requires_grad_(True)
    keys = None if adapted is None else key_dropout(adapted)
    frozen = FrozenWeights() if config.mode == "full" and projection is not None else None
    with taught_by(policy, adapted or frozen, projection) as teacher:
        student = Student(policy.model, teacher, keys, config.divergence)
        outcome = Trainer(policy, student, corpus, config, context, frozen).run()
    if frozen is not None:
        frozen.forget()
    saved_adapter, saved_model = _save(policy, adapted, corpus, config, context, outcome=outcome)
    return StudentSummary(
        num_sequences=len(corpus.train),
        num_validation_sequences=len(corpus.validation),
        num_targets=int(corpus.train.num_targets_N.sum()),
        num_cut=_num_cut(completions, config),
        num_dropped=len(completions) - len(corpus.train) - len(corpus.validation),
        num_steps=outcome.state.step,
        saved_step=outcome.saved_step,
        stopped_early=outcome.state.stopped_early,
        epochs=outcome.state.epochs,
        adapter=saved_adapter,
        model=saved_model,
        seconds=time.perf_counter() - started,
    )


@contextmanager
def taught_by(
    policy: Policy, untrained: PeftModel | FrozenWeights | None, projection: Projection | None
) -> Generator[Teacher | None]:
    """The teacher of a policy in training: the weights that it began with, keys and values projected.

    It is the model without its adapters, or with the weights that were kept. Its hooks stay on the policy, and act only
    while the teacher reads: no second model is held.

    Raises:
        DataError: the projection does not fit the model, or never reached a site.
    """
    if projection is None or untrained is None:
        yield None
        return
    layers = [] if isinstance(untrained, FrozenWeights) else [layer for _, layer in lora_layers(untrained)]
    with projected(policy.model, projection) as monitor:
        monitor.is_on = False

        @contextmanager
        def teacher() -> Generator[None]:
            monitor.is_on = True
            monitor.model_calls += 1  # what is called is inside the model, and so is not counted
            weights = untrained.in_place() if isinstance(untrained, FrozenWeights) else without_adapters(layers)
            try:
                with weights:
                    yield
            finally:
                monitor.is_on = False

        yield teacher


def _num_cut(completions: Sequence[Completion], config: Finetune) -> int:
    num_tokens = num_tokens_of(completions, "prompt_tokens") + num_tokens_of(completions, "tokens")
    return int((num_tokens > config.max_tokens).sum())


def _corpus(
    policy: Policy,
    completions: Sequence[Completion],
    config: Finetune,
    context: StageContext,
    *,
    projection: Projection | None,
    start: Path | Subspace | None,
) -> Corpus:
    sequences = training_sequences(completions, config, pad_token_id=policy.pad_token_id)
    if len(sequences) < len(completions):
        log.warning(
            "%d of %d completions hold no supervised token with finetune.max_tokens=%d and are left out; %d are cut",
            len(completions) - len(sequences), len(completions), config.max_tokens, _num_cut(completions, config),
        )  # fmt: skip
    train, validation = held_out(sequences, config.validation_fraction, generator(context.seed, "finetune", "held out"))
    settings = {key: value for key, value in dataclasses.asdict(config).items() if key not in NOT_OF_RESULTS}
    if isinstance(completions, Table):  # of which the digest stands in its file: no rank reads all of it
        data: object = completions.digest
    else:
        data = [dataclasses.astuple(sequence) for sequence in sequences]
    taught = [] if projection is None else [projection_hash(projection)]
    began: list[Any] = []
    if isinstance(start, Path):
        began = [sha256_of(file) for file in sorted(start.glob("adapter_model.*"))]
    elif start is not None:
        parts = sorted(start.sites.items(), key=lambda item: item[0])
        began = [[str(site), sha256(part.basis_DR.contiguous().numpy().tobytes()).hexdigest()] for site, part in parts]
    return Corpus(train, validation, content_hash([policy.fingerprint, settings, context.seed, data, *taught, *began]))


@torch.no_grad()
def _inputs(
    policy: Policy, sequences: TrainingSequences, config: Finetune, context: StageContext
) -> dict[str, InputSums]:
    """What the modules that get adapters are given by the first sequences: read by every rank, one at a time."""
    with together("looking for the modules that get adapters"):
        modules = adapted_modules(policy.model, config)
    is_scaled = config.lora_init == "corda"
    engine = frozen_engine(policy.model, context.distributed, policy.model.dtype) if is_sharded(policy.model) else None
    try:
        with summing_inputs(modules, scaled=is_scaled) as sums:
            for sequence in sequences[: config.lora_init_examples]:
                tokens = sequence.tokens[: sequence.num_attended]
                policy.model(torch.tensor([tokens], device=context.world.device), use_cache=False)
    finally:
        if engine is not None:
            end_engine(engine)
    return sums


def _save(
    policy: Policy,
    adapted: PeftModel | None,
    corpus: Corpus,
    config: Finetune,
    context: StageContext,
    *,
    outcome: TrainingResult,
) -> tuple[SavedAdapter | None, SavedModel | None]:
    card = Card(
        base_model=policy.name,
        base_path=str(policy.model.name_or_path),
        facts={
            **context.facts,
            "training sequences": str(len(corpus.train)),
            "fine-tuning": f"{_described(config)}, {_optimizer(config, context)}",
            "steps": f"{outcome.saved_step} of {config.global_batch_size} sequences",
            "identity of settings, weights and data": corpus.identity[:16],
        },
        epochs=outcome.state.epochs,
    )
    export = Export(policy, context, card, corpus.probe, outcome.probe_logits)
    if adapted is None:
        return None, export.model()
    saved_model = export.merged(adapted) if config.merge else None
    saved_adapter = export.adapter(adapted)
    if is_sharded(policy.model):
        policy.engine = frozen_engine(policy.model, context.distributed, policy.model.dtype)
    return saved_adapter, saved_model


def _described(config: Finetune) -> str:
    if config.mode == "full":
        return "all parameters"
    name = {"lora": "LoRA", "rslora": "rank-stabilised LoRA", "dora": "DoRA"}[config.lora_variant]
    begins = "" if config.lora_init == "default" else f", from {config.lora_init}"
    targets = ", ".join((*config.lora_targets, *config.lora_parameters))
    return f"{name} of rank {config.lora_rank} on {targets}{begins}"


def _optimizer(config: Finetune, context: StageContext) -> str:
    users = context.distributed.deepspeed.get("optimizer")
    if users is not None:
        return f"DeepSpeed's {users['type']}, as distributed.deepspeed says"
    return f"AdamW, learning rate {config.learning_rate:g}"
