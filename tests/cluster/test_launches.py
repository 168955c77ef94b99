"""Every way to launch the ranks of two hosts ends in the same run, also when launchers are asked to stop or killed."""

from __future__ import annotations

import os
import signal

import pytest
from emulated import ENVIRONMENT, Run, ended, processes, run_on, start_on, thaw, wait_for
from launching import differences, results

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]


@pytest.mark.slow
def test_torchrun_in_a_job_ends_in_the_same_run(run, undisturbed):
    ended(run.submit("--nodes=2", SPD_LAUNCHER="torchrun"), "COMPLETED", run)
    assert differences(results(run.folder), undisturbed) == []


def test_deepspeed_in_a_job_ends_in_the_same_run_also_after_a_request_to_stop(run, undisturbed):
    job = run.submit("--nodes=2", more=["generate.batch_size=1"], SPD_LAUNCHER="deepspeed")
    pids = run.freeze_when(run.has_completions)
    run_on("node0", "scancel", "--signal=USR1", "--batch", job)
    wait_for(lambda: "asked to stop by USR1" in run.log(), 30, run.log)
    thaw(pids)
    wait_for(lambda: "exits with return code = 75" in run.log(), 60, run.log)
    ended(job, "COMPLETED", run)
    assert run.log().count("start 2 on node[0-1]") == 1
    assert differences(results(run.folder), undisturbed) == []


def test_deepspeed_by_ssh_ends_in_the_same_run_also_after_a_kill_of_the_launcher(run, undisturbed, tmp_path):
    command = by_ssh(run, tmp_path)
    first = start_on("node0", *command, "generate.batch_size=1", DS_ENV_FILE=str(tmp_path / "environment"))
    pids = run.freeze_when(run.has_completions)
    (launcher,) = [pid for pid, words in processes() if "--hostfile" in words and words[1].endswith("/deepspeed")]
    os.kill(launcher, signal.SIGKILL)
    thaw(pids)
    wait_for(lambda: not run.ranks(), 30, lambda: str(run.ranks()))
    assert "its launcher was killed, so it ends, too" in first.communicate(timeout=30)[0]
    assert not (run.folder / "report.json").exists()
    before = run.checkpoints()  # within the second that its ranks notice it in, they may have come so far

    second = start_on("node0", *command, DS_ENV_FILE=str(tmp_path / "environment"))
    pids = run.freeze_when(lambda: run.checkpoints() - before)
    (run.folder / "PREEMPT").touch()
    thaw(pids)
    output, _ = second.communicate(timeout=120)
    assert second.returncode == 75, output
    assert "stopped on request after step" in output

    output = run_on("node0", *command, "distributed.interface=eth0", DS_ENV_FILE=str(tmp_path / "environment"))
    assert "finetune: goes on after step" in output
    assert differences(results(run.folder), undisturbed) == []


def by_ssh(run: Run, folder) -> list[str]:
    """The command of the README for two hosts, and the files that it reads."""
    (folder / "hostfile").write_text("node0 slots=1\nnode1 slots=1\n")
    names = ("PATH", "DS_ACCELERATOR", "OMP_NUM_THREADS", "TOKENIZERS_PARALLELISM", "HF_HUB_OFFLINE")
    (folder / "environment").write_text("".join(f"{name}={ENVIRONMENT[name]}\n" for name in names))
    return ["deepspeed", "--hostfile", str(folder / "hostfile"), "launchers/spd.py", *run.arguments()]
