"""An experiment: a run for each seed that differs in nothing else, and jobs that cover all of it."""

import dataclasses
from pathlib import Path

import pytest

from spd_dist.arms import ARMS
from spd_dist.config import Config, Experiment
from spd_dist.errors import ConfigError
from spd_dist.overrides import load_experiment, to_yaml
from spd_dist.runs.experiment import ExperimentJob, jobs, unfinished
from spd_dist.storage.artifacts import write_json
from spd_dist.storage.settings import result_settings

EXPERIMENTS = sorted(Path("configs/experiments").glob("*.yaml"))


def plain(config: Config) -> dict[str, object]:
    return result_settings(dataclasses.asdict(config))


def test_runs_of_one_experiment_differ_in_their_seed_only():
    experiment = load_experiment([], ["folder=x", "seeds=[3,5]", "arms=[base,spd]", "finetune.num_epochs=2"])
    three, five = (experiment.config_of(seed) for seed in (3, 5))
    assert (three.run_dir, five.run_dir) == ("x/seed_3", "x/seed_5")
    assert three.evaluate.arms == ("base", "spd")
    assert three.finetune.num_epochs == 2
    assert {key for key in plain(three) if plain(three)[key] != plain(five)[key]} == {"seed"}


def test_words_are_of_the_run_unless_they_are_of_the_experiment(tmp_path):
    file = tmp_path / "experiment.yaml"
    file.write_text("folder: y\nseeds: [1, 2]\nrun: {project: {rank_rule: fixed, rank: 8}}\n")
    experiment = load_experiment([file], ["project.rank=16", "run.finetune.mode=full", "arms=[base,psr]"])
    assert (experiment.folder, experiment.arms, experiment.run.project.rank) == ("y", ("base", "psr"), 16)
    assert experiment.run.finetune.mode == "full"
    file.write_text(to_yaml(experiment))
    assert load_experiment([file]) == experiment


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["seeds=[1]"], r"seeds: \[1\] is not valid; name at least two"),
        (["seeds=[1,1]"], r"seeds: \[1, 1\] is not valid"),
        (["seed=3"], "run.seed: 3 is not valid in an experiment of a run a seed; set seeds"),
        (["run.run_dir=x"], "run.run_dir: 'x' is not valid in an experiment .*; set folder"),
        (["evaluate.arms=[base]"], "run.evaluate.arms: .* is not valid in an experiment .*; set arms"),
        (["arms=[spd,spd]"], "spd twice is not valid"),
        (["project.rank_rule=fixed"], "project.rank: None is not valid"),
        (["sed=3"], "run.sed: unknown key"),
    ],
)
def test_what_is_not_an_experiment_is_refused(words, message):
    with pytest.raises(ConfigError, match=message):
        load_experiment([], words)


def test_jobs_are_one_arm_of_one_seed_and_with_rounds_all_arms_of_a_seed():
    experiment = Experiment(seeds=(1, 2), arms=("base", "spd"))
    assert jobs(experiment) == [ExperimentJob(seed, (arm,)) for seed in (1, 2) for arm in ("base", "spd")]
    with_rounds = load_experiment([], ["seeds=[1,2]", "arms=[base,spd]", "rounds=2"])
    assert jobs(with_rounds) == [ExperimentJob(1, ("base", "spd")), ExperimentJob(2, ("base", "spd"))]


def test_a_job_is_finished_when_its_arms_have_answered_in_every_round(tmp_path):
    experiment = load_experiment([], [f"folder={tmp_path}", "seeds=[1,2]", "arms=[base,spd]", "rounds=2"])
    for place in ("seed_1", "seed_1/rounds/2", "seed_2"):
        for arm in ("base", "spd"):
            write_json(tmp_path / place / "evaluate" / arm / "manifest.json", {})
    assert unfinished(experiment) == [ExperimentJob(2, ("base", "spd"))]


@pytest.mark.parametrize("path", EXPERIMENTS, ids=str)
def test_every_shipped_experiment_loads_and_begins_with_its_command(path):
    experiment = load_experiment([path])
    assert len(experiment.seeds) >= 2
    first, *_ = path.read_text().splitlines()
    assert first.startswith("# ")
    assert f"launchers/experiment.py --config {path}" in first


def test_experiments_are_shipped_and_one_has_every_arm():
    arms = [{arm.partition("@")[0] for arm in load_experiment([path]).arms} for path in EXPERIMENTS]
    assert ARMS.keys() in arms
