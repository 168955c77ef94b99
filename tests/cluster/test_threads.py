"""How many threads a rank takes of the cores to which a real `srun` binds it."""

from __future__ import annotations

import os
import sys

import pytest
from emulated import run_on

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(300)]
SAY = """
import torch
from spd_dist.config import Distributed
from spd_dist.distributed.world import join_world, leave_world
join_world(Distributed())
print("threads", torch.get_num_threads())
leave_world()
"""


def threads(*options: str) -> list[int]:
    """Those of each rank of a step."""
    output = run_on("node0", "srun", *options, sys.executable, "-c", SAY)
    return [int(line.split()[1]) for line in output.splitlines() if line.startswith("threads ")]


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores to bind ranks to")
def test_ranks_take_the_cores_that_srun_gives_them_and_share_those_that_it_does_not(cluster):
    one_each = ("--nodes=2", "--ntasks-per-node=1", "--cpu-bind=threads")
    assert threads(*one_each, "--cpus-per-task=1") == [1, 1]
    assert threads(*one_each, "--cpus-per-task=2") == [2, 2], "of two hosts: they do not share"
    assert threads("--nodes=1", "--ntasks-per-node=2", "--cpus-per-task=1", "--cpu-bind=threads") == [1, 1]
    cores = len(os.sched_getaffinity(0))
    unbound = ("--nodes=1", "--ntasks-per-node=2", "--cpus-per-task=1", "--cpu-bind=none")
    assert threads(*unbound) == [cores // 2] * 2, "both may run on every core"
