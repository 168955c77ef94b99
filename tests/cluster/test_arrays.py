"""Chains and arrays of jobs: whatever makes the parts, it is the same run."""

from __future__ import annotations

import csv
import json
import sys
import time

import pytest
from emulated import Run, described, ended, freeze_when, processes, run_on, states, thaw, wait_for
from launching import SETTINGS, SMALL, differences, results

from spd_dist.storage.artifacts import read_json

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]

NUMBERS = {"stages", "losses", "angles"}
"""Of a report: losses and energies, whose last digits depend on the number of ranks."""


def close(found: dict, expected: dict) -> bool:
    """Whether two runs on different numbers of ranks are the same."""
    reports = [{key: value for key, value in one["report"].items() if key not in NUMBERS} for one in (found, expected)]
    return found | {"report": reports[0]} == expected | {"report": reports[1]}


@pytest.mark.slow
def test_a_chain_of_jobs_on_other_numbers_of_nodes_is_the_same_run(run, undisturbed):
    options = " ".join(["--ntasks-per-node=1", "--cpus-per-task=2", "--gpus-per-node=1", "--time=30"])
    output = f"--output={run.folder.parent}/%x.out"
    chain = {"NODES": "1 2 1 2", "SBATCH_OPTIONS": f"{options} {output}"}
    submitted = run_on("node0", "slurm/stages.sh", *run.arguments(), **chain)
    jobs = [line.split()[0] for line in submitted.splitlines()]
    assert len(jobs) == 4, submitted
    assert [described(job)["NumNodes"].split("-")[0] for job in jobs] == ["1", "2", "1", "2"]
    assert all(states(job) == {"PENDING"} for job in jobs[1:])
    for job in jobs:
        ended(job, "COMPLETED", run)
    assert close(results(run.folder), undisturbed)

    wrong = run_on("node0", "slurm/stages.sh", *run.arguments("finetune.num_epoch=1"), check=False)
    assert "the nearest valid key is finetune.num_epochs" in wrong


def test_an_array_makes_one_corpus_two_tasks_at_a_time(run, undisturbed):
    before = run.submit("--nodes=1", "--job-name=before", more=["--until", "project"])
    array = run.submit("--array=0-2%2", f"--dependency=afterok:{before}", script="slurm/array_generate.sbatch")
    after = run.submit("--nodes=2", "--job-name=after", f"--dependency=afterok:{array}")
    most = 0
    while states(after) == {"PENDING"}:
        running = run_on("node0", "squeue", "-h", "-t", "R,CG", "-j", array, "-r", "-o", "%K", check=False)
        most = max(most, len(running.split()))
        assert states(before) != {"FAILED"}, run.log()
        time.sleep(1)
    ended(after, "COMPLETED", run)
    assert most == 2
    assert sorted(file.name for file in run.folder.glob("status*")) == [
        "status.json", *(f"status.task-{index:05d}.json" for index in range(3)),
    ]  # fmt: skip
    beats = sorted(file.name for file in (run.folder / "heartbeat").glob("task*"))
    assert beats == [f"task-{index:05d}" for index in range(3)]
    assert close(results(run.folder), undisturbed)


@pytest.mark.slow
def test_a_sweep_is_planned_submitted_seen_and_collected(cluster, words, undisturbed, tmp_path):
    overrides = dict(word.split("=", 1) for word in words[2:])
    sweep = {
        "folder": str(tmp_path / "sweep"),
        "config": [words[1]],
        "overrides": overrides,
        "grid": {"seed": [42, 43]},
    }
    (tmp_path / "sweep.yaml").write_text(json.dumps(sweep))
    plan = tmp_path / "sweep" / "plan.json"
    python = [sys.executable]
    assert "2 points" in run_on("node0", *python, "launchers/sweep.py", "plan", tmp_path / "sweep.yaml")
    resources = ["--ranks-per-node", "1", "--cpus-per-rank", "2", "--nodes", "2", "--time", "0:30:00"]
    submit = [*python, "launchers/submit.py", "sweep", plan, "--array", "0-1%1", *resources]
    job = run_on("node0", *submit).split()[0]
    points = [Run(folder, words) for folder in (tmp_path / "sweep" / "000-seed42", tmp_path / "sweep" / "001-seed43")]
    ended(job, "COMPLETED", points[0])
    status = run_on("node0", *python, "launchers/sweep.py", "status", plan)
    assert status.count("complete") >= 3, status
    collected = run_on("node0", *python, "launchers/sweep.py", "collect", plan)
    assert "2 seeds (42, 43)" in collected
    assert len(list(csv.DictReader((plan.parent / "results.csv").read_text().splitlines()))) == 4
    assert differences(results(points[0].folder), undisturbed) == []


@pytest.mark.slow
def test_an_experiment_by_an_array_goes_on_by_itself_after_all_its_tasks_were_asked_to_stop(cluster, words, tmp_path):
    folder = tmp_path / "experiment"
    (model,) = (word for word in words if word.startswith("model.name="))
    settings = [f"folder={folder}", "seeds=[1,2]", "arms=[base,spd]", model, *SMALL, *SETTINGS]
    resources = ["--ranks-per-node", "1", "--cpus-per-rank", "2", "--time", "0:30:00"]
    submit = ["launchers/submit.py", "experiment", "--array", "0-1", *resources, f"--sbatch=--output={tmp_path}/%a.out"]
    job = run_on("node0", sys.executable, *submit, *settings).split()[0]
    run = Run(folder, ())

    def ranks(task: int) -> list[int]:
        ends = ["--num-tasks", "2", "--task", str(task), ""]
        return [
            pid
            for pid, words in processes()
            if f"folder={folder}" in words and words[1:3] == ["-u", "launchers/experiment.py"] and words[-5:] == ends
        ]

    statuses = [folder / f"status.task-0000{task}.json" for task in (0, 1)]
    frozen = [
        freeze_when(status.exists, lambda task=task: ranks(task), run.log) for task, status in enumerate(statuses)
    ]
    (folder / "PREEMPT").touch()
    thaw([pid for pids in frozen for pid in pids])
    wait_for(lambda: run.log().count("stopped on request, requeued") == 2, 60, run.log)
    ended(job, "COMPLETED", run)
    assert run.log().count(": start 2 on node") == 2
    assert run.log().count("requeued") == 2, "the file that still lies there stops no task again"
    assert [read_json(status)["state"] for status in statuses] == ["complete", "complete"]
    report = read_json(folder / "report.json")
    assert (report["seeds"], list(report["arms"])) == ([1, 2], ["base", "spd"])
