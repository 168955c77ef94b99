"""The doctor on two hosts: all is right; much is wrong on one of them; they cannot meet."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import pytest
from emulated import Run, link, run_on, start_on

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]


def examine(run: Run, folder: Path, *words: str, spoilt: tuple[str, ...] = (), cwd: Path | None = None) -> list[tuple]:
    """Exit code and output of both hosts; `spoilt` words and another working folder are node1's only."""
    (folder / "hostfile").write_text("node0 slots=1\nnode1 slots=1\n")
    address = ["--master_addr", "node0", "--master_port", "29513"]
    command = ["deepspeed", "--hostfile", folder / "hostfile", "--no_ssh", *address]
    sides = []
    for host in (0, 1):
        script = Path(cwd, "launchers/doctor.py") if cwd and host else "launchers/doctor.py"
        variables = {"PYTHONPATH": str(cwd)} if cwd and host else {}
        more = spoilt if host else ()
        arguments = ["--node_rank", str(host), script, *run.arguments(*words, *more)]
        sides.append(start_on(f"node{host}", *command, *arguments, **variables))
    outputs = [side.communicate(timeout=120)[0] for side in sides]
    return [(side.returncode, output) for side, output in zip(sides, outputs, strict=True)]


def lines(output: str, check: str) -> list[str]:
    """The rows of the table about one check, each as one line."""
    rows: list[str] = []
    for line in output.splitlines():
        cells = [cell.strip() for cell in line.split("│")[1:-1]]
        if len(cells) == 4 and cells[0]:
            rows.append(" | ".join(cells))
        elif len(cells) == 4:  # the rest of a long cell
            rows[-1] += f" {cells[-1]}"
    return [row for row in rows if row.split(" | ")[1] == check]


def test_two_hosts_are_right_and_it_takes_less_than_a_minute(run, tmp_path):
    began = time.monotonic()
    (code, output), (other, _) = examine(run, tmp_path, "--min-disk-gib", "0.1")
    assert (code, other) == (0, 0), output
    assert time.monotonic() - began < 60
    for check in ("code", "packages", "config", "shared folder", "all-reduce", "clock", "model", "test rows"):
        assert lines(output, check)[0].startswith(f"ok | {check} | all 2 hosts"), output
    assert "GB/s" in lines(output, "all-reduce")[0]
    assert "all is right" in output


def test_what_is_wrong_on_one_host_is_said_in_one_table(run, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    for name in ("spd_dist", "launchers", "configs"):
        shutil.copytree(name, elsewhere / name)
    (elsewhere / "spd_dist" / "more.py").write_text('"""A file that the other host lacks."""\n')
    model = Path(next(word for word in run.words if word.startswith("model.name=")).partition("=")[2])
    run.folder.mkdir()
    hidden = [run.folder, model]  # node1 gets small disks of its own there
    for folder in hidden:
        run_on("node1", "mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", folder)
    try:
        spoilt = ("finetune.num_epochs=7",)
        (code, output), (other, _) = examine(run, tmp_path, "--min-disk-gib", "0.1", spoilt=spoilt, cwd=elsewhere)
    finally:
        for folder in hidden:
            run_on("node1", "umount", folder)
    assert (code, other) == (1, 1), output
    for check in ("code", "config", "disk: run_dir", "model"):
        assert [row for row in lines(output, check) if row.startswith(f"WRONG | {check} | node1 | ")], output
    assert lines(output, "shared folder") == [
        "WRONG | shared folder | node0 | does not see what node1 wrote; run_dir must be on a disk that all share",
        "WRONG | shared folder | node1 | does not see what node0 wrote; run_dir must be on a disk that all share",
    ], output
    assert lines(output, "all-reduce")[0].startswith("ok")
    assert "6 checks failed" in output


def test_hosts_that_cannot_meet_are_named_in_time(run, tmp_path):
    link("node1", up=False)
    began = time.monotonic()
    try:
        (code, output), (other, theirs) = examine(run, tmp_path, "--min-disk-gib", "0.1", "--timeout-seconds", "8")
    finally:
        link("node1", up=True)
    assert (code, other) == (1, 1), output
    assert time.monotonic() - began < 60
    assert lines(output, "meeting")[0].startswith("WRONG | meeting | node1 | rank 1 runs, but not all ranks met at"), (
        output
    )
    assert "rank 1 on node1 cannot meet the others at node0:29513" in theirs
