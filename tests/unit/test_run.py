"""What a run says of itself: the name of its job, and what a student's card says that it comes from."""

import pytest
import torch

from spd_dist.arms import Scope, chosen
from spd_dist.distributed.world import World
from spd_dist.overrides import load_config
from spd_dist.process.signals import StopSignals
from spd_dist.run import Run
from spd_dist.tracking.stage_outputs import job_type


@pytest.mark.parametrize(
    ("first", "last", "job"),
    [
        ("calibrate", "evaluate", "pipeline"),
        ("calibrate", "project", "project"),
        ("generate", "generate", "generate"),
        ("project", "generate", "pipeline"),
        ("evaluate", "evaluate", "evaluate"),
    ],
)
def test_a_job_is_named_by_the_folder_that_it_fills(first, last, job):
    assert job_type(first, last) == job


def config_hashes(folder, *words):
    config = load_config(overrides=[f"run_dir={folder}", "metrics.wandb=disabled", *words])
    run = Run(config, World(0, 1, torch.device("cpu")), StopSignals(), Scope(last="project"))
    with run.opened():
        return {arm.name: run.facts_of(arm)["config hash"] for arm in chosen(config.evaluate.arms)}


def test_the_config_hash_of_a_card_is_of_the_arm_s_own_config(tmp_path):
    arms = "evaluate.arms=[psr,spd,spd@rank=16,spd@rank=8,spd_distil,spd_distil@finetune.divergence=js]"
    found = config_hashes(tmp_path / "one", arms)
    assert found["psr"] == found["spd"], "whose settings are the same: the card names the arm beside them"
    assert len(set(found.values())) == 5
    own = ["project.rank_rule=fixed", "project.rank=16", "evaluate.arms=[spd]", "rounds=2", "generate.batch_size=3"]
    assert config_hashes(tmp_path / "other", *own)["spd"] == found["spd@rank=16"]


@pytest.mark.parametrize(
    "word", ["finetune.divergence=js", "finetune.num_on_policy_iterations=2", "project.match_kl=true"]
)
def test_students_of_other_losses_have_other_config_hashes(tmp_path, word):
    arm = ["evaluate.arms=[spd]", "finetune.loss=distil", "project.mode=random"]
    assert config_hashes(tmp_path / "one", *arm) != config_hashes(tmp_path / "other", *arm, word)
