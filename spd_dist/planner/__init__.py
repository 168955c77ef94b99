"""What a run takes of a cluster, from its config alone: memory, seconds, traffic, and the smallest cluster that can.

cluster.py       the cluster, the work, what ZeRO keeps on each rank
profile.py       a config -> a model in numbers, without weights
dry_run.py       what passes hold in memory, without computing anything
stage_memory.py  a stage and a placement -> bytes of one rank
seconds.py       a stage and a placement -> operations, bytes, and what takes longest
plan.py          the placement that fits each stage; the smallest cluster
"""

from spd_dist.planner.cluster import DEVICES, Cluster, DeviceSpec, Workload, device_named
from spd_dist.planner.plan import Plan, StagePlan, plan_run, smallest_cluster
from spd_dist.planner.profile import Profile, profile_of

__all__ = [
    "DEVICES", "Cluster", "DeviceSpec", "Plan", "Profile", "StagePlan", "Workload", "device_named", "plan_run",
    "profile_of", "smallest_cluster",
]  # fmt: skip
