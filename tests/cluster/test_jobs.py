"""What happens to jobs: pre-empted, out of time, cancelled, their node gone. Each run ends as an undisturbed one."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest
from emulated import HERE, STATE, Run, described, ended, run_on, sbatch, thaw, wait_for
from launching import differences, results

from spd_dist.storage.artifacts import read_json
from spd_dist.storage.completions import read_completions

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]


def restarts(job: str) -> int:
    return int(described(job)["Restarts"])


MIDDLE = {  # a stage, and how to see that it is at work
    "calibrate": lambda run: '"calibrate/done_count"' in run.metrics(),
    "generate": Run.has_completions,
    "finetune": Run.checkpoints,
}


@pytest.mark.slow
def test_a_job_that_is_pre_empted_in_every_stage_goes_on_by_itself(run, undisturbed):
    more = ["generate.batch_size=1", "metrics.progress_seconds=0.001"]
    job = run.submit("--nodes=2", "--partition=cheap", more=more)
    for count, is_at_work in enumerate(MIDDLE.values(), 1):
        run.freeze_when(lambda is_at_work=is_at_work: is_at_work(run))
        # SLURM itself lets them go on, with SIGCONT, when it asks them to end.
        urgent = sbatch("--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap", "sleep 1")
        wait_for(lambda count=count: restarts(job) == count, 60, run.log)
        assert read_json(run.folder / "status.json")["state"] == "stopped", run.log()
        ended(urgent, "COMPLETED", run)
        if count == 1:
            assert any((run.folder / "project" / "unfinished").iterdir())
    ended(job, "COMPLETED", run)
    assert differences(results(run.folder), undisturbed) == []
    assert run.log().count("stopped on request, requeued") == 3


@pytest.mark.slow
def test_a_job_survives_its_node_its_time_limit_and_is_gone_when_cancelled(run, undisturbed):
    job = run.submit("--nodes=2", more=["generate.batch_size=1"])
    pids = run.freeze_when(run.has_completions)
    power_off("node1")
    thaw([pid for pid in pids if Path(f"/proc/{pid}").exists()])
    wait_for(lambda: restarts(job) == 1, 60, run.log)
    lines = read_lines(run)
    assert lines
    subprocess.run([HERE / "up.sh"], check=True)

    pids = run.freeze_when(run.checkpoints)
    assert lines.items() <= read_lines(run).items()
    run_on("node0", "scontrol", "update", f"JobId={job}", "TimeLimit=1")
    wait_for(lambda: f"job {job}: asked to stop by USR1" in run.log(), 60, run.log)
    thaw(pids)
    wait_for(lambda: restarts(job) == 2, 60, run.log)
    run_on("node0", "scontrol", "update", f"JobId={job}", "TimeLimit=30")

    run.freeze_when(lambda: "evaluate, " in run.place())
    run_on("node0", "scancel", job)
    ended(job, "CANCELLED", run)
    assert not (run.folder / "report.json").exists()
    wait_for(lambda: not run.ranks(), 30, run.log)

    again = run.submit("--nodes=2")
    ended(again, "COMPLETED", run)
    assert differences(results(run.folder), undisturbed) == []
    assert restarts(again) == 0


def power_off(host: str) -> None:
    """Every process of the host dies at once, its init first."""
    os.kill(int((STATE / f"{host}.pid").read_text()), signal.SIGKILL)


def read_lines(run: Run) -> dict[tuple[str, int], tuple[int, ...]]:
    """The completions that are on disk, whole."""
    found = [one for file in run.folder.glob("generate/completions/*.jsonl") for one in read_completions(file)]
    return {(one.id, one.sample): one.tokens for one in found}
