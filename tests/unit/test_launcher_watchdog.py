"""Which processes above a rank are its launchers, and that a rank ends soon after one of them was killed."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from spd_dist.process.launcher_watchdog import Process, is_running, launchers_above, read_process, watch_launchers

pytestmark = pytest.mark.seconds

RANK = ("python", "-u", "launchers/spd.py")
LAUNCH = ("python", "-u", "-m", "deepspeed.launcher.launch", "--world_info=x")
RUNNER = ("/venv/bin/python", "/venv/bin/deepspeed", "launchers/spd.py")
TREES = {  # from the rank upwards, and how many above it are its launchers
    "deepspeed in a terminal": ([RANK, LAUNCH, RUNNER, ("-bash",), ("sshd: me@pts/0",)], 2),
    "deepspeed in a batch script under srun": ([RANK, LAUNCH, RUNNER, ("slurmstepd: [7.0]",), ("slurmd",)], 3),
    "by pdsh, from sshd": ([RANK, LAUNCH, ("sshd: me@notty",), ("sshd: me [priv]",)], 2),
    "by pdsh, from a shell of sshd": ([RANK, LAUNCH, ("bash", "-c", "cd x"), ("sshd: me@notty",)], 2),
    "torchrun under nohup": ([RANK, ("python", "/venv/bin/torchrun", "--nnodes"), ("bash",), ("sshd: me@pts/0",)], 1),
    "srun": ([RANK, ("slurmstepd: [7.0]",), ("slurmd",)], 1),
    "a shell that is a launcher itself": ([RANK, ("bash", "ranks.sh"), ("bash",)], 1),
}


def test_by_pdsh_from_this_host_pdsh_and_its_runner_are_launchers():
    remote = (*LAUNCH, "--master_addr=10.0.0.1", "--master_port=29500")
    mine = ("pdsh", "-w", "a,b", "cd /x; " + " ".join(remote))
    others = ("pdsh", "-w", "a,b", "cd /x; " + " ".join((*LAUNCH, "--master_addr=10.0.0.1", "--master_port=29501")))
    table = [
        Process(100, 99, 1, RANK), Process(99, 98, 1, remote), Process(98, 1, 1, ("sshd: me@notty",)),
        Process(50, 49, 1, mine), Process(49, 48, 1, RUNNER), Process(48, 1, 1, ("-bash",)), Process(51, 47, 1, others),
    ]  # fmt: skip
    chain = launchers_above(100, {one.pid: one for one in table}.get, table)
    assert [one.pid for one in chain] == [99, 98, 50, 49]


@pytest.mark.parametrize(("tree", "num_launchers"), TREES.values(), ids=TREES)
def test_launchers_are_told_from_shells_that_a_run_may_outlive(tree, num_launchers):
    pids = [100 - index for index in range(len(tree))]
    found = {pid: Process(pid, pid - 1, pid, words) for pid, words in zip(pids, tree, strict=True)}
    chain = launchers_above(100, found.get, [])
    assert [one.words for one in chain] == (
        [*tree[1:num_launchers], tree[3]] if tree[2][:2] == ("bash", "-c") else tree[1 : num_launchers + 1]
    )


def test_a_process_is_running_until_it_is_dead_and_a_zombie_is_dead():
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    found = read_process(process.pid)
    assert found.parent == os.getpid()
    assert is_running(found)
    assert not is_running(found._replace(started=found.started - 1))  # another one that was given its number
    process.kill()
    while is_running(found):
        time.sleep(0.01)
    process.communicate()
    assert read_process(process.pid) is None


def test_without_a_launcher_nothing_is_watched():
    before = threading.active_count()
    watch_launchers({"PATH": "x"})
    assert threading.active_count() == before


CHILD = """
import os, time
from spd_dist.process.launcher_watchdog import watch_launchers
watch_launchers(os.environ)
print(os.getpid(), flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("levels", [1, 2], ids=["its parent", "the parent of that"])
def test_a_rank_ends_when_a_launcher_above_it_is_killed(levels, tmp_path):
    rank = tmp_path / "rank.py"
    rank.write_text(CHILD)
    launch, runner = tmp_path / "torchrun", tmp_path / "deepspeed"
    launch.write_text(f"import subprocess, sys; subprocess.run([sys.executable, {str(rank)!r}])")
    runner.write_text(f"import subprocess, sys; subprocess.run([sys.executable, {str(launch)!r}])")
    environment = os.environ | {"RANK": "0"}
    command = [sys.executable, str(launch if levels == 1 else runner)]
    above = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    found = read_process(int(above.stdout.readline()))
    assert is_running(found)
    os.kill(above.pid, signal.SIGKILL)
    _, errors = above.communicate(timeout=10)  # ends when the last holder of the pipes closes them, as it ends
    deadline = time.monotonic() + 5
    while is_running(found):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert "rank 0: its launcher was killed, so it ends, too" in errors
