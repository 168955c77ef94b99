"""Two hosts and a cable between them, which is cut: an error on both sides in time, and nothing written is lost."""

from __future__ import annotations

import subprocess
import time

import pytest
from emulated import Run, link, start_on, thaw
from launching import differences, results

from spd_dist.storage.completions import read_completions

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]

TIMEOUT_SECONDS = 10
SECONDS_TO_END = 25
"""After the timeout: until each rank has printed its error and the launcher has ended."""


def launch(run: Run, folder, *more: str) -> dict[str, subprocess.Popen]:
    """Both hosts' launchers, each started on its host: no ssh."""
    (folder / "hostfile").write_text("node0 slots=1\nnode1 slots=1\n")
    address = ["--master_addr", "node0", "--master_port", "29512"]
    words = ["launchers/spd.py", *run.arguments(f"distributed.timeout_seconds={TIMEOUT_SECONDS}", *more)]
    command = ["deepspeed", "--hostfile", str(folder / "hostfile"), "--no_ssh", *address]
    return {f"node{k}": start_on(f"node{k}", *command, "--node_rank", str(k), *words) for k in (0, 1)}


def both_fail(started: dict[str, subprocess.Popen]) -> dict[str, str]:
    """What each side printed; both must end in time, with an error that says where the other was seen last."""
    began = time.monotonic()
    outputs = {host: side.communicate(timeout=120)[0] for host, side in started.items()}
    assert time.monotonic() - began < TIMEOUT_SECONDS + SECONDS_TO_END, text_of(outputs)
    for host, side in started.items():
        assert side.returncode == 1, outputs[host]
        assert "A rank that failed or lags is the likely cause. Last seen:" in outputs[host]
        other = {"node0": "rank 1 on node1: silent for", "node1": "rank 0 on node0: silent for"}[host]
        assert other in outputs[host]
    return outputs


def text_of(outputs: dict[str, str]) -> str:
    """All of it: pytest shortens whatever is no text."""
    return "\n".join(f"on {host}:\n{output}" for host, output in outputs.items())


def test_a_cut_link_fails_both_sides_in_time_and_the_run_goes_on(run, undisturbed, tmp_path):
    started = launch(run, tmp_path, "generate.batch_size=1")
    pids = run.freeze_when(run.has_completions)
    link("node1", up=False)
    thaw(pids)
    both_fail(started)
    link("node1", up=True)
    lines = completions(run)
    assert lines

    started = launch(run, tmp_path)
    pids = run.freeze_when(run.checkpoints)
    assert lines.items() <= completions(run).items()
    checkpoints = run.checkpoints()
    link("node1", up=False)
    thaw(pids)
    both_fail(started)
    link("node1", up=True)
    assert checkpoints <= run.checkpoints()

    started = launch(run, tmp_path)
    outputs = {host: side.communicate(timeout=240)[0] for host, side in started.items()}
    assert [side.returncode for side in started.values()] == [0, 0], text_of(outputs)
    assert "finetune: goes on after step" in outputs["node0"]
    assert differences(results(run.folder), undisturbed) == []


def completions(run: Run) -> dict[tuple[str, int], tuple[int, ...]]:
    found = [one for file in run.folder.glob("generate/completions/*.jsonl") for one in read_completions(file)]
    return {(one.id, one.sample): one.tokens for one in found}
