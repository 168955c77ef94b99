"""Experiments by their launcher: killed and resumed, or an array of jobs in any order, they end in one comparison."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from launching import SMALL, Launch, launch
from tiny import save_tiny_model

from spd_dist.arms import ARMS as ARMS_OF_ALL
from spd_dist.storage.artifacts import read_json

LAUNCHER = "launchers/experiment.py"
CORPORA = ("psr", "ssd", "random", "identity", "full", "termination")
ARMS = ("base", "psr", "spd", "projected", "termination", "spd@rank=4")


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    """Two seeds of six arms."""
    folder = tmp_path_factory.mktemp("experiment")
    model = save_tiny_model(folder / "model")
    (folder / "run.yaml").write_text(f"model: {{name: {model}}}\n")
    file = folder / "experiment.yaml"
    file.write_text(f"seeds: [1, 2]\narms: [{', '.join(ARMS)}]\nrun:\n  model: {{name: {model}}}\n")
    return file


def words(config: Path, folder: Path) -> list[str]:
    return [
        "--config",
        str(config),
        f"folder={folder}",
        *SMALL,
        "data.num_train=6",
        "finetune.num_epochs=1",
        "finetune.checkpoint_every=9",
    ]


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory) -> Path:
    """The experiment as one process group of two ranks, killed on its way."""
    folder = tmp_path_factory.mktemp("whole") / "experiment"
    log = folder.with_name("log")
    Launch(2, words(config, folder), log, LAUNCHER).kill_when((folder / "seed_2/finetune/started.json").exists)
    assert not (folder / "report.json").exists()
    output = launch(2, words(config, folder), log, launcher=LAUNCHER)
    assert "SPD, over 2 seeds and 6 examples, against BASE:" in output
    return folder


def answers(folder: Path) -> dict[str, str]:
    return {str(file.relative_to(folder)): file.read_text() for file in folder.glob("seed_*/evaluate/*/*.jsonl")}


def test_every_arm_answers_the_same_examples_under_every_seed(whole):
    assert len(answers(whole)) == 2 * len(ARMS)
    report = read_json(whole / "report.json")
    assert list(report["arms"]) == list(ARMS)
    assert (report["seeds"], report["num_examples"]) == ([1, 2], 6)
    from_base, controls = len(ARMS) - 1, 3
    assert len(report["comparisons"]) == from_base + 2 * controls, "of spd, and of its variant"
    assert set(report["by_seed"]) == {"1", "2"}
    for one in report["by_seed"].values():
        assert {"project", "arms/spd@rank=4/project", "finetune"} <= one["stages"].keys()
        assert set(one["losses"]) == {"psr", "spd", "termination", "spd@rank=4"}
        assert one["angles"]["sites"]
        assert set(one["angles"]["arms"]) == {f"spd@rank=4, {site}" for site in one["stages"]["project"]["sites"]}
    assert "<svg" in (whole / "report.html").read_text()
    for seed in (1, 2):
        assert (whole / f"seed_{seed}" / "report.html").is_file()


def test_what_arms_and_seeds_have_in_common_is_done_once(whole):
    first, second = (whole / "seed_1", whole / "seed_2")

    def source(stage: str) -> str | None:
        return read_json(second / stage / "manifest.json").get("taken_from")

    for shared in ("project", "arms/spd@rank=4/project", "evaluate/base", "evaluate/projected"):
        assert source(shared) == str(first / shared)
    assert source("arms/termination/generate") == str(second / "arms/psr/generate")
    for own in ("generate", "finetune", "evaluate/spd", "arms/psr/generate"):
        assert source(own) is None
    ranks = [
        {site["rank"] for site in read_json(first / stage / "summary.json")["sites"].values()}
        for stage in ("project", "arms/spd@rank=4/project")
    ]
    assert ranks == [{8}, {4}]


@pytest.mark.slow
def test_an_array_of_jobs_in_any_order_ends_in_the_same_comparison(config, whole, tmp_path):
    folder = tmp_path / "experiment"
    array = [*words(config, folder), "--num-tasks", "2", "--task"]
    output = launch(1, [*array[:-3], "--report"], tmp_path / "early", code=3, launcher=LAUNCHER)
    assert "unfinished: base of seed 1; psr of seed 1; spd of seed 1; projected of seed 1; and 8 more" in output
    together = [Launch(1, [*array, task], tmp_path / f"log-{task}", LAUNCHER) for task in ("1", "0")]
    together[1].kill_when((folder / "seed_1/jobs/spd").exists)
    stop(folder / "PREEMPT", folder / "status.task-00001.json", together[0])
    stop(
        folder / "PREEMPT.task-00001",
        folder / "status.task-00001.json",
        Launch(1, [*array, "1"], tmp_path / "again", LAUNCHER),
    )
    launch(1, [*array, "1"], tmp_path / "log-1", launcher=LAUNCHER)
    assert not (folder / "report.json").exists()
    launch(2, [*array, "0"], tmp_path / "log-0", launcher=LAUNCHER)
    assert answers(folder) == answers(whole)
    ours, theirs = (read_json(each / "report.json") for each in (folder, whole))
    assert {key: ours[key] for key in ("arms", "comparisons", "verdict", "examples")} == {
        key: theirs[key] for key in ("arms", "comparisons", "verdict", "examples")
    }
    assert not (folder / "seed_1/jobs").exists()
    states = {file.name: read_json(file)["state"] for file in (folder / "seed_1").glob("status*.json")}
    assert states == dict.fromkeys(["status.json", *(f"status.{arm}.json" for arm in ARMS)], "complete")
    assert [read_json(folder / f"status.task-0000{task}.json")["state"] for task in (0, 1)] == ["complete"] * 2
    assert (folder / "PREEMPT").exists(), "others of the array may still have to see it"


def stop(file: Path, status: Path, task: Launch) -> None:
    """Touch a stop file while a task works: it ends with 75, and its status says so."""
    deadline = time.monotonic() + 60
    while not (status.exists() and read_json(status)["state"] == "running"):
        assert time.monotonic() < deadline, task.output()
        time.sleep(0.01)
    file.touch()
    assert task.wait() == [75], task.output()
    assert "stopped on request" in task.output()
    assert read_json(status)["state"] == "stopped"


@pytest.mark.slow
def test_every_arm_of_the_table_runs_in_one_run(config, tmp_path):
    run = tmp_path / "run"
    names = [name for name in ARMS_OF_ALL if name != "filtered"]  # a random model gives no answers to agree on
    settings = [
        "--config",
        str(config.with_name("run.yaml")),
        f"run_dir={run}",
        f"evaluate.arms=[{','.join(names)}]",
    ]
    launch(1, [*settings, *words(config, run)[3:], "data.num_train=4"], tmp_path / "log")
    report = read_json(run / "report.json")
    assert list(report["arms"]) == names
    assert (run / "arms/full/project/subspace.safetensors").is_file()
    for shared in ("random", "identity"):
        assert not (run / "arms" / shared / "project").exists()
    assert not (run / "arms/supervised/generate").exists()
    assert report["stages"]["arms/supervised/finetune"]["num_sequences"] == 7, "the calibration set"
    card = (run / "arms/supervised/finetune/adapter/README.md").read_text()
    assert "| learnt from | the reference answers of the calibration set, unfiltered |" in card
    corpora = {arm: (run / "arms" / arm / "generate/completions/completions.jsonl").read_text() for arm in CORPORA}
    assert corpora["identity"] == corpora["psr"] == corpora["termination"]
    assert len(set(corpora.values())) == len(CORPORA) - 2


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["seeds=[1]"], "seeds: [1] is not valid; name at least two, each once"),
        (["seed=3"], "run.seed: 3 is not valid in an experiment of a run a seed; set seeds"),
        (["finetune.num_epoch=3"], "run.finetune.num_epoch: unknown key"),
        (["--task", "3", "--num-tasks", "3"], "--task: 3 is not valid; it must be below --num-tasks 3"),
        (["arms=[base,spdd]"], "evaluate.arms: 'spdd' is not an arm"),
    ],
)
def test_what_is_wrong_with_an_experiment_ends_with_2(config, tmp_path, extra, message):
    output = launch(1, [*words(config, tmp_path / "e"), *extra], tmp_path / "log", code=2, launcher=LAUNCHER)
    assert message in output
    assert not (tmp_path / "e").exists()
