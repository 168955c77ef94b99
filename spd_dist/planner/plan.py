"""The placement that fits each stage, what it takes, and the smallest cluster that can run all of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from spd_dist.arms import chosen
from spd_dist.config import Config
from spd_dist.inference.placement import HEADROOM
from spd_dist.planner.cluster import GIB, Cluster, Workload, Zero
from spd_dist.planner.profile import Profile
from spd_dist.planner.seconds import Cost, cost
from spd_dist.planner.stage_memory import STAGES, Need, Placement, need

MAX_NODES = 1024
TOKEN_EFFECTS = "token_effects"
REMEDIES = {
    ("calibrate", "activations"): "set calibrate.checkpointing=true, or lower calibrate.batch_size",
    ("calibrate", "sketches"): "lower calibrate.num_shards or sketch.memory_gib",
    ("generate", "cache"): "lower generate.batch_size, generate.max_new_tokens or data.max_prompt_tokens",
    ("generate", "activations"): "lower generate.batch_size",
    ("finetune", "activations"): "set finetune.checkpointing=true, or lower finetune.micro_batch_size",
    ("finetune", "optimizer"): "use more ranks, or set finetune.mode=lora",
    ("finetune", "trained"): "use more ranks, or set finetune.mode=lora",
    ("finetune", "saved model"): "set finetune.mode=lora and finetune.merge=false",
    ("token_effects", "activations"): "lower generate.max_new_tokens, or set evaluate.num_coloured=0",
    ("evaluate", "cache"): "lower evaluate.batch_size, evaluate.max_new_tokens or data.max_prompt_tokens",
    ("evaluate", "activations"): "lower evaluate.batch_size",
}
"""What to change where a stage does not fit, by its largest item; else more ranks, or distributed.zero_stage=3."""


@dataclass(frozen=True)
class StagePlan:
    """A stage as it would run."""

    stage: str
    placement: Placement
    need: Need
    cost: Cost
    fits: bool


@dataclass(frozen=True)
class Plan:
    """A run as it would go."""

    cluster: Cluster
    stages: tuple[StagePlan, ...]
    advice: tuple[str, ...]

    @property
    def fits(self) -> bool:
        """Whether every stage does."""
        return all(stage.fits for stage in self.stages)

    @property
    def seconds(self) -> float:
        """Of all stages."""
        return sum(stage.cost.seconds for stage in self.stages)


def plan_run(profile: Profile, config: Config, cluster: Cluster, workload: Workload) -> Plan:
    """Each stage in the first placement that fits: whole on every rank, sharded, or sharded in the hosts' memory."""
    stages = tuple(_stage_plan(stage, profile, config, cluster, workload) for stage in stages_of(config))
    return Plan(cluster, stages, tuple(_advice(stages, profile, config, cluster)))


def stages_of(config: Config) -> list[str]:
    """Those of a run of `config`: tokens are scored if it says how many, one arm is projected, and one writes."""
    arms = chosen(config.evaluate.arms)
    scores = config.evaluate.num_coloured and any(arm.projects for arm in arms) and any(arm.writes for arm in arms)
    return [stage for stage in STAGES if stage != TOKEN_EFFECTS or scores]


def smallest_cluster(profile: Profile, config: Config, cluster: Cluster, *, offload: bool = False) -> Cluster | None:
    """The fewest of the cluster's accelerators that every stage fits on, on as few hosts; None up to `MAX_NODES`.

    With `offload`, weights and optimizer may lie in the hosts' memory.
    """
    sizes = [(1, gpus) for gpus in range(1, cluster.gpus_per_node + 1)]
    sizes += [(nodes, cluster.gpus_per_node) for nodes in range(2, MAX_NODES + 1)]

    def runs_on(index: int) -> bool:
        sized = cluster.sized(*sizes[index])
        chosen = (_first_fit(stage, profile, config, sized) for stage in stages_of(config))
        return all(fits and (offload or placement != "offload") for placement, _, fits in chosen)

    low, high = 0, len(sizes)  # more ranks hold less each
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if runs_on(middle) else (middle + 1, high)
    return cluster.sized(*sizes[low]) if low < len(sizes) else None


def placements(stage: str, config: Config) -> list[Placement]:
    """Those that a stage may be run in under `config`, the fastest first."""
    zero = Zero.of(config.distributed)
    if zero.stage < 3:
        return ["replica"]
    sharded: list[Placement] = ["offload"] if zero.offloads_parameters else ["layerwise", "offload"]
    if stage not in ("generate", TOKEN_EFFECTS, "evaluate"):
        return sharded
    wanted = config.generate.placement if stage == "generate" else config.evaluate.placement
    by_wish: dict[str, list[Placement]] = {
        "auto": ["replica", *sharded], "replica": ["replica"], "layerwise": sharded
    }  # fmt: skip
    return by_wish[wanted]


def _first_fit(stage: str, profile: Profile, config: Config, cluster: Cluster) -> tuple[Placement, Need, bool]:
    tried: list[tuple[Placement, Need]] = []
    for placement in placements(stage, config):
        tried.append((placement, need(stage, placement, profile, config, cluster)))
        if _fits(tried[-1][1], cluster):
            return *tried[-1], True
    return *tried[-1], False


def _fits(needed: Need, cluster: Cluster) -> bool:
    host = cluster.host_memory_gib * GIB / cluster.gpus_per_node
    return needed.device_bytes <= HEADROOM * cluster.gpu_memory_gib * GIB and needed.host_bytes <= HEADROOM * host


def _stage_plan(stage: str, profile: Profile, config: Config, cluster: Cluster, workload: Workload) -> StagePlan:
    placement, needed, fits = _first_fit(stage, profile, config, cluster)
    taken = cost(stage, placement, profile, config, cluster=cluster, workload=workload)
    return StagePlan(stage, placement, needed, taken, fits)


def _is_whole_elsewhere(
    stage: str, stages: tuple[StagePlan, ...], profile: Profile, config: Config, cluster: Cluster
) -> bool:
    """Whether a stage that is sharded need not be."""
    is_sharded = any(one.stage == stage and one.placement != "replica" for one in stages)
    return is_sharded and _fits(need(stage, "replica", profile, config, cluster), cluster)


def _advice(stages: tuple[StagePlan, ...], profile: Profile, config: Config, cluster: Cluster) -> Iterator[str]:
    for stage in stages:
        if not stage.fits:
            largest = max(stage.need.device, key=stage.need.device.__getitem__)
            remedy = REMEDIES.get((stage.stage, largest), "use more ranks, with distributed.zero_stage=3")
            yield f"{stage.stage} does not fit: most of it are its {largest}; {remedy}"
        elif stage.placement == "offload" and not Zero.of(config.distributed).offloads_parameters:
            yield (
                f"{stage.stage} fits only with distributed.deepspeed.zero_optimization.offload_param.device=cpu "
                "(and offload_optimizer.device=cpu, to train)"
            )
    wholes = [
        stage for stage in ("calibrate", "finetune") if _is_whole_elsewhere(stage, stages, profile, config, cluster)
    ]
    if wholes:
        yield (
            f"{' and '.join(wholes)} would also fit whole on every rank: distributed.zero_stage=0 saves their gathers"
        )
    for key, share in (
        ("calibrate.num_shards", config.calibrate.num_shards),
        ("finetune.global_batch_size", config.finetune.global_batch_size),
    ):
        if share < cluster.num_ranks:
            yield f"{key}={share} keeps {cluster.num_ranks - share} of {cluster.num_ranks} ranks idle; raise it"
