"""What the stages' results depend on: what is the same is done once, what is not is not mixed up."""

import torch

from spd_dist.arms import Scope
from spd_dist.distributed.world import World
from spd_dist.overrides import load_config
from spd_dist.process.signals import StopSignals
from spd_dist.run import Run
from spd_dist.stage_inputs import of_protocol


def protocol(folder, *overrides):
    config = load_config(overrides=[f"run_dir={folder}", "data.num_test=4", "metrics.wandb=disabled", *overrides])
    run = Run(config, World(0, 1, torch.device("cpu")), StopSignals(), Scope(last="project"))
    with run.opened():
        return of_protocol(run)


def test_greedy_answers_are_shared_by_seeds_and_sampled_ones_are_not(tmp_path):
    greedy = [protocol(tmp_path / f"greedy-{seed}", f"seed={seed}") for seed in (1, 2)]
    assert greedy[0] == greedy[1]
    sampled = [protocol(tmp_path / f"s-{seed}", f"seed={seed}", "evaluate.temperature=0.8") for seed in (1, 2)]
    assert sampled[0]["settings"] != sampled[1]["settings"]
    assert sampled[0]["test"] == sampled[1]["test"] == greedy[0]["test"]
