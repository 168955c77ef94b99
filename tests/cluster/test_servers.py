"""A corpus by servers that the job starts itself, one a node."""

from __future__ import annotations

import sys

import pytest
from emulated import described, ended, run_on

from spd_dist.storage.completions import read_completions

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(900)]
SERVED = (
    "generate.engine=server", "generate.server.models.spd=folded", "generate.temperature=0",
    "generate.max_new_tokens=8", "generate.max_repetition_rate=1.0",
)  # fmt: skip


def test_a_job_starts_its_servers_waits_for_them_and_ends_them(run, words):
    ended(run.submit("--nodes=1", more=["--until", "project", *SERVED]), "COMPLETED", run)
    model = next(word.partition("=")[2] for word in words if word.startswith("model.name="))
    folded = run.folder.parent / "folded"
    run_on("node0", sys.executable, "launchers/export.py", run.folder, "--base", model, "--out", folded)
    serve = f"python tests/serving.py {folded} 8123"
    job = run.submit(
        "--nodes=2", script="slurm/serve_generate.sbatch", more=SERVED, SPD_SERVE=serve, SPD_SERVER_PORT="8123"
    )
    ended(job, "COMPLETED", run)
    assert "healthy servers at http://node0:8123/v1,http://node1:8123/v1" in run.log()
    assert len(read_completions(run.folder / "generate/completions/completions.jsonl")) == 10
    assert not run.ranks()


def test_a_server_that_ends_at_once_is_named(run):
    job = run.submit("--nodes=2", script="slurm/serve_generate.sbatch", SPD_SERVE="echo no such model; exit 4")
    ended(job, "FAILED", run)
    assert described(job)["ExitCode"] == "3:0"
    assert "error: a server ended before it was healthy: echo no such model; exit 4" in run.log()
