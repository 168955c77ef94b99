"""Bytes of one rank at the peak of a stage, item by item."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from spd_dist.arms import chosen
from spd_dist.config import Config, planned_rows
from spd_dist.inference.placement import decode_bytes, packed_bytes
from spd_dist.models.model_stats import Outline
from spd_dist.planner.cluster import Cluster, Zero
from spd_dist.planner.profile import Profile
from spd_dist.stages.sketch.frequent_directions import plan_sketches

Placement = Literal["replica", "layerwise", "offload"]
FLOAT32, FLOAT64 = 4, 8
OPTIMIZER_BYTES = 4 * FLOAT32
"""Of a trained element: AdamW's two moments, the float32 weight, and its gradient."""
EIGHT_BIT_BYTES = 2 * FLOAT32 + 2
"""The same with moments of 8 bits."""


@dataclass(frozen=True)
class Need:
    """Memory of one rank."""

    device: Mapping[str, int]
    """Bytes by what they are for."""
    host: Mapping[str, int] = field(default_factory=dict)
    """The same, in the host's memory."""

    @property
    def device_bytes(self) -> int:
        """Their sum."""
        return sum(self.device.values())

    @property
    def host_bytes(self) -> int:
        """Their sum."""
        return sum(self.host.values())


def need(stage: str, placement: Placement, profile: Profile, config: Config, cluster: Cluster) -> Need:
    """What a rank of `cluster` needs for a stage of `STAGES`; or to `load` the policy, which is never the most."""
    return {**STAGES, "load": _load}[stage](placement, profile, config, cluster)


class Backward(NamedTuple):
    """A backward pass behind the forward pass."""

    num_reused: int
    """Parameters that it uses again."""
    checkpointing: bool = False


def _weights(
    outline: Outline,
    placement: Placement,
    profile: Profile,
    cluster: Cluster,
    zero: Zero,
    backward: Backward | None = None,
) -> Need:
    """Frozen weights, and what of them is gathered."""
    size = profile.element_bytes
    if placement == "replica":
        return Need(_replica(profile, profile.element_bytes * sum(outline.frozen)))
    shards = size * zero.shards(outline.frozen, cluster.num_ranks)
    if backward is None:
        whole = zero.gathered_forward(outline.frozen)
    else:
        whole = zero.gathered_backward(outline.frozen, reused=backward.num_reused, checkpointing=backward.checkpointing)
    gathered = size * (zero.persistent(outline.frozen) + whole)
    if placement == "offload":
        return Need({"gathered": gathered}, {"shards": shards})
    return Need({"shards": shards, "gathered": gathered})


def _replica(profile: Profile, num_bytes: int) -> dict[str, int]:
    """A whole copy of weights that take `num_bytes` as passes use them, and one of those in 4 bits made whole."""
    if not profile.four_bits:
        return {"weights": num_bytes}
    saved = profile.policy.num_parameters * profile.element_bytes - profile.weight_bytes
    return {"weights": num_bytes - saved, "one weight whole": max(profile.four_bits) * profile.element_bytes}


def _calibrate(placement: Placement, profile: Profile, config: Config, cluster: Cluster) -> Need:
    """The turn of a pass, or what is gathered on the way there, where no activation is kept."""
    zero, calibrate = Zero.of(config.distributed), config.calibrate
    weights = _weights(profile.policy, placement, profile, cluster, zero, Backward(profile.num_captured))
    plans = plan_sketches(
        profile.sites, config.sketch, planned_rank=config.project.planned_rank, num_shards=calibrate.num_shards
    )
    own_shards = -(-calibrate.num_shards // cluster.num_ranks)
    sketches = own_shards * sum(plans[site.width].num_bytes(site.width) for site in profile.sites)
    widths = sorted((site.width for site in profile.sites), reverse=True)
    # Gradients at the sites and their rows; the dry run has those of one layer's keys and values.
    num_tokens = calibrate.batch_size * calibrate.max_tokens
    rows = 2 * profile.element_bytes * num_tokens * sum(widths[2:])
    # The moments of the sites in flight: packed and joined to be sent, and received of a shard a rank to be summed.
    in_flight, num_sending = (min(count, cluster.num_ranks) for count in (len(widths), calibrate.num_shards))
    exchange = FLOAT64 * widths[0] ** 2 * (2 * in_flight + num_sending + 1)
    working = max(profile.calibrate_peak + rows, exchange)
    turn = Need({**weights.device, "sketches": sketches, "activations": working}, weights.host)
    weights = _weights(profile.policy, placement, profile, cluster, zero)
    way = Need({**weights.device, "sketches": sketches, "activations": 0}, weights.host)
    return max(turn, way, key=lambda one: one.device_bytes)


def _generate(placement: Placement, profile: Profile, config: Config, cluster: Cluster) -> Need:
    generate, weights = config.generate, _placed(placement, profile, config, cluster)
    contrasts = any(arm.contrasts(generate.contrast) for arm in chosen(config.evaluate.arms))
    rows = planned_rows(generate.batch_size)
    needed = _decoding(weights, profile, config, rows, generate.max_new_tokens, is_cpu=cluster.is_cpu)
    return Need({**needed.device, "cache": (1 + contrasts) * needed.device["cache"]}, needed.host)


def _placed(placement: Placement, profile: Profile, config: Config, cluster: Cluster) -> Need:
    """The policy's weights: a replica is gathered beside the shards, which stay."""
    zero = Zero.of(config.distributed)
    weights = _weights(profile.policy, placement, profile, cluster, zero)
    if placement == "replica" and zero.stage == 3:
        shards = profile.element_bytes * zero.shards(profile.policy.frozen, cluster.num_ranks)
        return Need({"shards": shards, **weights.device})
    return weights


def _token_effects(placement: Placement, profile: Profile, config: Config, cluster: Cluster) -> Need:
    weights = _placed(placement, profile, config, cluster)
    return Need({**weights.device, "activations": profile.score_peak}, weights.host)


def _evaluate(placement: Placement, profile: Profile, config: Config, cluster: Cluster) -> Need:
    """The student's adapters are merged where it is whole on each rank."""
    weights = _weights(profile.policy, placement, profile, cluster, Zero.of(config.distributed))
    rows = planned_rows(config.evaluate.batch_size)
    return _decoding(weights, profile, config, rows, config.evaluate.max_new_tokens, is_cpu=cluster.is_cpu)


def _decoding(
    weights: Need, profile: Profile, config: Config, batch_size: int, new_tokens: int, *, is_cpu: bool
) -> Need:
    needed = decode_bytes(
        profile.policy,
        batch_size=batch_size,
        prompt_tokens=config.data.max_prompt_tokens,
        new_tokens=new_tokens,
        element_bytes=profile.element_bytes,
    )
    if is_cpu and "weights" in weights.device:
        weights = Need({**weights.device, "packed": packed_bytes(profile.policy, profile.element_bytes)}, weights.host)
    return Need({**weights.device, "cache": needed.cache, "activations": needed.working}, weights.host)


def _finetune(placement: Placement, profile: Profile, config: Config, cluster: Cluster) -> Need:
    """Training, or the check of the saved model afterwards: it is read back in shards, or whole, as the policy is."""
    training = _training(placement, profile, config, cluster)
    if config.finetune.mode == "lora" and not config.finetune.merge:
        return training
    held = {name: training.device[name] for name in ("weights", "shards", "trained") if name in training.device}
    saved = profile.weight_bytes
    if placement != "replica":
        saved = sum(_load(placement, profile, config, cluster).device.values())
    check = Need({**held, "saved model": saved}, training.host)
    return max(training, check, key=lambda one: one.device_bytes)


def _load(placement: Placement, profile: Profile, config: Config, cluster: Cluster) -> Need:
    """Shards, and the weight that is cut into them, with its new shard: gloo holds what it gathers once more.

    What rank 0 maps of the files is the system's to take back.
    """
    if placement == "replica":
        return Need(_replica(profile, profile.element_bytes * profile.policy.num_parameters))
    zero, frozen = Zero.of(config.distributed), profile.policy.frozen
    shards = profile.element_bytes * zero.shards(frozen, cluster.num_ranks)
    largest = (1 + cluster.is_cpu) * max(frozen) + zero.shards([max(frozen)], cluster.num_ranks)
    return Need({"shards": shards, "gathered": profile.element_bytes * largest})


def _training(placement: Placement, profile: Profile, config: Config, cluster: Cluster) -> Need:
    zero, student, size = Zero.of(config.distributed), profile.student, profile.element_bytes
    activations, kept = profile.finetune_peak, {}
    if config.finetune.offload_activations:  # each layer's input but that of the one at work
        num_tokens = config.finetune.micro_batch_size * config.finetune.max_tokens
        kept = {"activations": size * num_tokens * student.hidden_size * (student.num_layers - 1)}
        activations = max(0, activations - kept["activations"])
    num_trained = sum(student.trained)
    state_bytes = OPTIMIZER_BYTES if config.finetune.optimizer == "adamw" else EIGHT_BIT_BYTES
    if placement == "replica":
        divided = cluster.num_ranks if zero.stage in (1, 2) else 1
        optimizer = state_bytes * num_trained // divided
        weights = _replica(profile, size * student.num_parameters)
        if profile.keeps_weights:
            weights["first weights"] = size * num_trained
        device = {**weights, "gradients": size * num_trained, "optimizer": optimizer}
        return Need({**device, "activations": activations}, kept)
    backward = Backward(student.num_parameters, config.finetune.checkpointing)
    weights = _weights(student, placement, profile, cluster, zero, backward)
    own = zero.shards(student.trained, cluster.num_ranks)
    trained = {"trained": size * (own + zero.persistent(student.trained)) + size * own}  # and their gradients
    optimizer = {"optimizer": state_bytes * own}
    if config.finetune.mode == "full":
        whole = size * zero.gathered_backward(student.trained, reused=num_trained)
        trained["trained"] += whole
    first = {"first weights": size * own} if profile.keeps_weights else {}
    bucket = min(zero.reduce_bucket_size, num_trained) if cluster.is_cpu else zero.reduce_bucket_size
    device = {**weights.device, **trained, "buckets": size * bucket, "activations": activations}
    if placement == "offload":
        return Need(device, {**weights.host, **optimizer, **first, **kept})
    return Need({**device, **optimizer, **first}, {**weights.host, **kept})


STAGES: dict[str, Callable[[Placement, Profile, Config, Cluster], Need]] = {
    "calibrate": _calibrate,
    "generate": _generate,
    "finetune": _finetune,
    "token_effects": _token_effects,
    "evaluate": _evaluate,
}
"""Those that load a policy; `calibrate` stands for all that stream into the subspace."""
