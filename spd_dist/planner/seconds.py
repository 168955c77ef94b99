"""How long a stage takes, and what of: operations, memory, launches, network, host or disk.

A stage is a few phases, one after the other; in a phase everything overlaps, so that it takes as long as its slowest
part. The shares of a data sheet's rates that a program gets are assumptions, and stand here.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

from spd_dist.arms import Arm, chosen
from spd_dist.config import Config, planned_rows
from spd_dist.inference.continuous import MAX_PREFILL_TOKENS
from spd_dist.models.model_stats import Outline
from spd_dist.overrides import config_of_arm
from spd_dist.planner.cluster import Cluster, Workload, Zero
from spd_dist.planner.profile import Profile
from spd_dist.planner.stage_memory import FLOAT64, Placement
from spd_dist.stages.score_tokens import rows_of_length

COMPUTE_FRACTION = 0.4
MEMORY_FRACTION = 0.7
NETWORK_FRACTION = 0.7
LAUNCH_SECONDS = 5e-4
"""A layer's kernels, started one by one from Python; half as much again for each backward or second pass."""
HOST_BYTES_PER_SECOND = 25e9
"""Between an accelerator and its host's memory."""
DISK_BYTES_PER_SECOND = 2e9
"""A checkpoint, as one rank reads it for all: so transformers loads under ZeRO-3."""


@dataclass(frozen=True)
class Phase:
    """What the busiest rank does."""

    flops: float = 0.0
    memory_bytes: float = 0.0
    layer_calls: float = 0.0
    network_bytes: float = 0.0
    """Received from the other ranks."""
    host_bytes: float = 0.0
    disk_bytes: float = 0.0

    def seconds(self, cluster: Cluster) -> dict[str, float]:
        """By what takes them."""
        device = cluster.device
        return {
            "compute": self.flops / (COMPUTE_FRACTION * device.flops),
            "memory": self.memory_bytes / (MEMORY_FRACTION * device.memory_bytes_per_second),
            "launches": self.layer_calls * LAUNCH_SECONDS,
            "network": self.network_bytes / (NETWORK_FRACTION * _network_rate(cluster)),
            "host": self.host_bytes / HOST_BYTES_PER_SECOND,
            "disk": self.disk_bytes / DISK_BYTES_PER_SECOND,
        }


@dataclass(frozen=True)
class Cost:
    """A stage's time."""

    seconds: float
    bottleneck: str
    """What most of the time goes to."""
    network_bytes: float
    """Received by a rank."""


def cost(
    stage: str, placement: Placement, profile: Profile, config: Config, *, cluster: Cluster, workload: Workload
) -> Cost:
    """The time of a stage, over all arms that go through it."""
    job = _Job(placement, profile, config, cluster, workload)
    phases = STAGES[stage](job)
    taken: dict[str, float] = {}
    for phase in phases:
        part, seconds = max(phase.seconds(cluster).items(), key=lambda item: item[1])
        taken[part] = taken.get(part, 0.0) + seconds
    return Cost(sum(taken.values()), max(taken, key=taken.__getitem__), sum(phase.network_bytes for phase in phases))


def _network_rate(cluster: Cluster) -> float:
    """Bytes a second at which every rank receives what all ranks hold a part of, in a ring through all hosts."""
    within, across = cluster.device.node_bytes_per_second, cluster.device.network_bytes_per_second
    return within if cluster.nodes == 1 else min(within, across * cluster.gpus_per_node)


@dataclass(frozen=True)
class _Job:
    placement: Placement
    profile: Profile
    config: Config
    cluster: Cluster
    workload: Workload

    @property
    def zero(self) -> Zero:
        return Zero.of(self.config.distributed)

    @property
    def is_sharded(self) -> bool:
        return self.placement != "replica"

    @functools.cached_property
    def arms(self) -> list[tuple[Arm, Config]]:
        """All arms, each with the config that it has for its own."""
        return [(arm, config_of_arm(self.config, arm)) for arm in chosen(self.config.evaluate.arms)]

    @property
    def made(self) -> list[tuple[Arm, Config]]:
        """The same, of those that differ in `evaluate` alone one."""
        return list({arm.made_as: (arm, own) for arm, own in self.arms}.values())

    def num_learned(self, arm: Arm, own: Config) -> int:
        """Completions or references that a student learns from, if nothing is filtered."""
        if arm.learns_from == "references":
            return own.calibrate.num_examples
        return self.workload.num_train * own.generate.num_samples

    def gathers(self, num_elements: float) -> tuple[float, float]:
        """(network bytes, host bytes) of gathering so many elements once."""
        num_ranks, size = self.cluster.num_ranks, self.profile.element_bytes * num_elements
        on_host = self.placement == "offload" or self.zero.offloads_parameters
        return size * (num_ranks - 1) / num_ranks, size / num_ranks if on_host else 0.0

    def backward_gathers(self, num_elements: float) -> float:
        """Elements that a backward pass gathers again: the last ones are still there."""
        return max(0.0, num_elements - self.zero.max_reuse_distance // 2)


def _calibrate(job: _Job) -> list[Phase]:
    profile, calibrate = job.profile, job.config.calibrate
    outline, num_ranks = profile.policy, job.cluster.num_ranks
    of_shard = math.ceil(calibrate.num_examples / calibrate.num_shards)
    num_batches = math.ceil(calibrate.num_shards / num_ranks) * math.ceil(of_shard / calibrate.batch_size)
    length = job.workload.prompt_tokens + job.workload.answer_tokens
    num_tokens = num_batches * min(calibrate.batch_size, of_shard) * length
    gathered = outline.num_parameters + job.backward_gathers(profile.num_captured)
    network, host = job.gathers(gathered * num_batches) if job.is_sharded else (0.0, 0.0)
    exchanged = FLOAT64 * calibrate.num_shards * max(site.width for site in profile.sites) ** 2
    passes = 2 + calibrate.checkpointing
    return [
        Phase(disk_bytes=profile.weight_bytes),
        Phase(
            flops=num_tokens * (_flops(outline, length) + passes * profile.num_captured),
            memory_bytes=2 * num_batches * profile.weight_bytes,
            layer_calls=num_batches * outline.num_layers * passes,
            network_bytes=network + exchanged * (num_ranks > 1),
            host_bytes=host,
        ),
    ]


def _generate(job: _Job) -> list[Phase]:
    writers = [(arm, own) for arm, own in job.made if arm.writes]
    phases: list[Phase] = []
    for arm, own in writers:
        generate, num_rows = own.generate, job.num_learned(arm, own)
        tokens = min(generate.max_new_tokens, job.workload.completion_tokens)
        found = _decode(job, num_rows, planned_rows(generate.batch_size), tokens)
        phases += found * (1 + arm.contrasts(generate.contrast))
    if job.placement == "replica" and job.zero.stage == 3:
        network, host = job.gathers(job.profile.policy.num_parameters)
        phases += [Phase(network_bytes=network, host_bytes=host)] * len(writers)
    return phases


def _evaluate(job: _Job) -> list[Phase]:
    phases: list[Phase] = []
    for _, own in job.arms:
        evaluate = own.evaluate
        tokens = min(evaluate.max_new_tokens, job.workload.completion_tokens)
        num_rows = job.workload.num_test * evaluate.num_samples
        phases += _decode(job, num_rows, planned_rows(evaluate.batch_size), tokens)
    num_loads = 1 + sum(arm.trains for arm, _ in job.arms)
    return phases + [Phase(disk_bytes=job.profile.weight_bytes)] * num_loads


def _decode(job: _Job, num_rows: int, batch_size: int, new_tokens: int) -> list[Phase]:
    """Read the prompts, then a token for every row of a batch, again and again."""
    outline, profile, workload = job.profile.policy, job.profile, job.workload
    own = math.ceil(num_rows / job.cluster.num_ranks)
    num_batches, batch_size = math.ceil(own / batch_size), min(own, batch_size)
    num_reads = math.ceil(own * workload.prompt_tokens / MAX_PREFILL_TOKENS)
    num_steps = num_batches * new_tokens
    length = workload.prompt_tokens + new_tokens // 2
    cached = batch_size * length * outline.num_layers * outline.kv_width * profile.element_bytes
    phases = []
    for count, flops, memory in (
        (num_reads, own * workload.prompt_tokens * _flops(outline, workload.prompt_tokens), 0),
        (num_steps, num_steps * batch_size * _flops(outline, 2 * length), cached),
    ):
        network, host = job.gathers(count * outline.num_parameters) if job.is_sharded else (0.0, 0.0)
        phases.append(
            Phase(
                flops=flops,
                memory_bytes=count * (profile.weight_bytes + memory),
                layer_calls=count * outline.num_layers,
                network_bytes=network,
                host_bytes=host,
            )
        )
    return phases


def _finetune(job: _Job) -> list[Phase]:
    return [_training(job, arm, own) for arm, own in job.made if arm.trains]


def _training(job: _Job, arm: Arm, own: Config) -> Phase:
    """Of one student; a teacher is a forward pass more."""
    finetune, student, workload = own.finetune, job.profile.student, job.workload
    num_ranks, size = job.cluster.num_ranks, job.profile.element_bytes
    distils = arm.distils(finetune.loss)
    num_steps = finetune.num_epochs * math.ceil(job.num_learned(arm, own) / finetune.global_batch_size)
    rows = math.ceil(finetune.global_batch_size / num_ranks)
    num_batches = num_steps * math.ceil(rows / finetune.micro_batch_size)
    written = min(own.generate.max_new_tokens, workload.completion_tokens)
    learned = workload.answer_tokens if arm.learns_from == "references" else written
    length = min(finetune.max_tokens, workload.prompt_tokens + learned)
    num_trained = sum(student.trained)
    passes = 2 + finetune.checkpointing + distils  # forward, gradient of the input, and the forward pass again
    flops = passes * _flops(student, length) + 2 * num_trained
    gathered = (1 + distils) * student.num_parameters + job.backward_gathers(student.num_parameters)
    network, host = job.gathers(gathered * num_batches) if job.is_sharded else (0.0, 0.0)
    reduced = 2 * size * num_trained * num_batches * (num_ranks - 1) / num_ranks
    if job.placement == "offload" or job.zero.offloads_optimizer:
        host += 2 * size * num_trained / num_ranks * num_steps
    return Phase(
        flops=num_steps * rows * length * flops,
        memory_bytes=passes * num_batches * job.profile.weight_bytes,
        layer_calls=num_batches * student.num_layers * (passes + 1),
        network_bytes=network + reduced,
        host_bytes=host,
    )


def _flops(outline: Outline, length: int) -> float:
    """Of one token's forward pass, in a sequence that it sees half of on average."""
    return outline.forward_flops + 2 * outline.num_layers * outline.attention_width * length


def _token_effects(job: _Job) -> list[Phase]:
    """What each arm wrote first, read twice: under the policy as it is, and held to the projection."""
    workload, outline = job.workload, job.profile.policy
    length = workload.prompt_tokens + workload.completion_tokens
    num_coloured = job.config.evaluate.num_coloured
    num_rows = sum(min(num_coloured, job.num_learned(arm, own)) for arm, own in job.made if arm.writes)
    num_batches = 2 * math.ceil(math.ceil(num_rows / rows_of_length(length)) / job.cluster.num_ranks)
    is_gathered = job.placement == "replica" and job.zero.stage == 3
    num_gathers = num_batches if job.is_sharded else float(is_gathered)
    network, host = job.gathers(num_gathers * outline.num_parameters)
    phase = Phase(
        flops=num_batches * rows_of_length(length) * length * _flops(outline, length),
        memory_bytes=num_batches * job.profile.weight_bytes,
        layer_calls=num_batches * outline.num_layers,
        network_bytes=network,
        host_bytes=host,
    )
    return [phase]


STAGES: dict[str, Callable[[_Job], list[Phase]]] = {
    "calibrate": _calibrate,
    "generate": _generate,
    "finetune": _finetune,
    "token_effects": _token_effects,
    "evaluate": _evaluate,
}
