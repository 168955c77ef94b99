import dataclasses
import json
import logging
import os
import socket
import subprocess
import sys
import time

import pytest
from fake_wandb import FakeWandb
from wandb_log import read_offline_run

from spd_dist.config import Config, Metrics
from spd_dist.tracking.metrics import MetricLogger, Product, read_metrics
from spd_dist.tracking.wandb_mirror import open_mirror

pytestmark = pytest.mark.seconds

SETTINGS = dataclasses.asdict(Config())


@pytest.fixture(autouse=True)
def no_account(monkeypatch, tmp_path):
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))


def run_in(folder, wandb, **changes):
    mirror = open_mirror(Metrics(wandb=wandb), folder, SETTINGS | changes)
    with MetricLogger(folder / "metrics", mirror=mirror) as metrics:
        metrics.log("calibrate", {"loss": 1.5}, 0)
        metrics.log("calibrate", {"loss": 1.25}, 8)
        metrics.log("finetune", {"loss": 0.5}, 1)
        metrics.labelled("psr").log("finetune", {"loss": 0.75}, 4)
        metrics.table("generate", "samples", ["id", "text"], [["p1", "four"], ["p2", "five"]])
    return read_offline_run(folder)


def test_an_offline_run_holds_config_metrics_step_axes_tables_and_exit_code(tmp_path):
    folder = tmp_path / "demo"
    folder.mkdir()
    run = run_in(folder, "offline")
    rows = [{key: value for key, value in row.items() if "/" in key} for row in run.history]
    assert rows[:4] == [
        {"calibrate/step": 0, "calibrate/loss": 1.5},
        {"calibrate/step": 8, "calibrate/loss": 1.25},
        {"finetune/step": 1, "finetune/loss": 0.5},
        {"finetune/psr_step": 4, "finetune/psr_loss": 0.75},
    ]
    assert run.step_metrics["calibrate/*"] == "calibrate/step"
    assert run.step_metrics["finetune/*"] == "finetune/step"
    assert run.step_metrics["finetune/psr_loss"] == "finetune/psr_step"
    (table,) = folder.glob("wandb/offline-run-*/files/media/table/generate/*.json")
    assert json.loads(table.read_text())["data"] == [["p1", "four"], ["p2", "five"]]
    assert run.config["generate"]["top_p"] == 0.9
    assert (run.job_type, run.exit_code) == ("pipeline", 0)
    assert run.group.startswith("demo-")


def test_the_id_follows_from_the_run_and_seeds_share_a_group(tmp_path):
    folders = [tmp_path / name / "demo" for name in "abc"]
    for folder in folders:
        folder.mkdir(parents=True)
    runs = [run_in(folder, "offline", seed=seed) for folder, seed in zip(folders, (1, 2, 2), strict=True)]
    assert len({run.group for run in runs}) == 1
    assert len({run.id for run in runs}) == 3
    for file in list(folders[0].rglob("*.wandb")):
        file.unlink()
    assert run_in(folders[0], "offline", seed=1).id == runs[0].id


def test_a_group_is_of_one_loss_and_whatever_is_measured_beside_the_method(tmp_path):
    folder = tmp_path / "demo"
    folder.mkdir()

    def identity(section, **changes):
        mirror = open_mirror(Metrics(wandb="offline"), folder, SETTINGS | {section: SETTINGS[section] | changes})
        with MetricLogger(folder / "metrics", mirror=mirror):
            pass
        (file,) = (folder / "wandb").glob("*.json")
        described = json.loads(file.read_text())
        return described["group"], described["id"]

    own = identity("finetune")
    assert identity("finetune", micro_batch_size=1) == own
    assert identity("mechanism", num_rows=50) == identity("evaluate", num_coloured=0) == own
    others = [
        identity("finetune", divergence="js"),
        identity("finetune", num_on_policy_iterations=2),
        identity("project", match_kl=True),
    ]
    assert len({own, *others}) == 4
    assert len({group for group, _ in (own, *others)}) == 4


def test_auto_without_a_key_is_offline_and_says_so(tmp_path, caplog):
    caplog.set_level(logging.INFO, "spd_dist")
    run = run_in(tmp_path, "auto")
    assert len(run.history) == 5
    assert "W&B: offline, since there is no key" in caplog.text
    assert "launchers/wandb_sync.py" in caplog.text


def test_a_server_that_does_not_answer_means_offline_at_once(tmp_path, caplog, monkeypatch):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{closed.getsockname()[1]}")
        monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
        started = time.monotonic()
        run = run_in(tmp_path, "online")
    assert len(run.history) == 5
    assert time.monotonic() - started < 10
    assert any(record.levelname == "WARNING" and "does not answer" in record.message for record in caplog.records)


@pytest.fixture
def server(monkeypatch):
    with FakeWandb() as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
        yield server


def go_on(folder, steps, disturb=None, finish_seconds=120.0):
    """A run of some steps; `disturb` happens in the middle of it."""
    mirror = open_mirror(Metrics(wandb="online"), folder, SETTINGS, init_seconds=3.0, finish_seconds=finish_seconds)
    with MetricLogger(folder / "metrics", mirror=mirror) as metrics:
        for step in steps:
            metrics.log("finetune", {"loss": 1.0}, step)
            if disturb is not None and step == steps[len(steps) // 2]:
                disturb()


def test_a_run_that_is_started_again_goes_on_as_the_same_run(tmp_path, server):
    go_on(tmp_path, range(3))
    go_on(tmp_path, range(3, 5))
    (run,) = server.runs.values()
    assert [row["finetune/step"] for row in run.history] == [0, 1, 2, 3, 4]
    assert (run.settings["jobType"], run.exit_code) == ("pipeline", 0)
    assert run.settings["tags"] == ["SmolLM2-135M-Instruct", "arithmetic"]
    described = json.loads((tmp_path / "wandb" / "pipeline-seed42.json").read_text())
    assert (described["id"], described["group"]) == (run.name, run.settings["groupName"])
    assert not server.unknown


def test_a_server_that_fails_means_offline_after_the_time_it_was_given(tmp_path, caplog, server):
    server.failing["*"] = 1000
    mirror = open_mirror(Metrics(wandb="auto"), tmp_path, SETTINGS, init_seconds=1.0)
    mirror.log({"calibrate/step": 1, "calibrate/loss": 2.0})
    mirror.finish(3)
    assert "W&B: online does not work" in caplog.text
    assert read_offline_run(tmp_path).exit_code == 3


def test_a_server_that_stumbles_gets_everything_in_the_end(tmp_path, server):
    go_on(tmp_path, range(4), disturb=lambda: server.failing.update(file_stream=1))
    (run,) = server.runs.values()
    assert server.operations["file_stream"] >= 2
    assert [row["finetune/step"] for row in run.history] == [0, 1, 2, 3]


@pytest.mark.parametrize("illness", ["refuses", "is slow", "answers 500"])
def test_a_run_goes_on_when_the_server_falls_ill(illness, tmp_path, server):
    cures = {
        "refuses": server.refuse,
        "is slow": lambda: vars(server).update(delay_seconds=60.0),
        "answers 500": lambda: server.failing.update({"*": 1000, "file_stream": 1000}),
    }
    started = time.monotonic()
    go_on(tmp_path, range(4), disturb=cures[illness], finish_seconds=2.0)
    assert time.monotonic() - started < 30
    assert [row["step"] for row in read_metrics(tmp_path / "metrics")] == [0, 1, 2, 3]
    (log,) = tmp_path.glob("wandb/run-*/*.wandb")  # all of it, for `wandb sync`
    assert log.stat().st_size > 0


def test_a_slow_server_costs_the_time_that_it_was_given_once(tmp_path, caplog, server):
    server.delay_seconds = 60.0
    started = time.monotonic()
    go_on(tmp_path, range(2))
    assert time.monotonic() - started < 30
    assert "W&B: online does not work" in caplog.text
    assert len(read_offline_run(tmp_path).history) == 2


def test_no_table_and_no_artifact_asks_the_server_anything_that_a_run_would_wait_for(tmp_path, server):
    """What is asked is counted when it comes in, so the answers need not be waited for."""
    (tmp_path / "weights").write_text("weights")
    mirror = open_mirror(Metrics(wandb="online"), tmp_path, SETTINGS, init_seconds=3.0, finish_seconds=2.0)
    asked = server.operations["Viewer"] + server.operations["ViewerFull"]
    server.delay_seconds = 60.0
    mirror.table("generate/samples", ["id"], [["a"], ["b"]])
    mirror.product(Product("adapter", "adapter", (tmp_path / "weights",), {}), is_input=False)
    mirror.product(Product("subspace", "subspace", (tmp_path / "weights",), {}), is_input=True)
    assert server.operations["Viewer"] + server.operations["ViewerFull"] == asked
    assert server.operations["ArtifactType"] == 0
    mirror.finish(0)


def test_what_the_server_did_not_take_in_time_is_told(tmp_path, caplog, server):
    go_on(tmp_path, range(4), disturb=lambda: vars(server).update(delay_seconds=60.0), finish_seconds=1.0)
    assert "W&B: finishing failed, no more of that is sent; all is in the run's folder: Timed out" in caplog.text


def test_what_stages_make_are_artifacts_with_lineage(tmp_path):
    (tmp_path / "adapter").mkdir()
    for name in ("subspace.safetensors", "adapter/weights", "corpus.jsonl"):
        (tmp_path / name).write_text(name)
    mirror = open_mirror(Metrics(wandb="offline", experiment="lab/one"), tmp_path, SETTINGS, job="finetune")
    with MetricLogger(tmp_path / "metrics", mirror=mirror) as metrics:
        subspace = Product("subspace", "subspace", (tmp_path / "subspace.safetensors",), {"inputs": {"x": "hash"}})
        corpus = Product("corpus", "corpus", (tmp_path / "corpus.jsonl",), {}, is_copied=False)
        metrics.product(subspace, is_input=True)
        metrics.product(corpus, is_input=True)
        metrics.product(Product("adapter", "adapter", (tmp_path / "adapter",), {}), is_input=False)
    one, two, made = read_offline_run(tmp_path).artifacts
    assert (one.name, one.kind, one.files, one.is_input) == (
        "lab-one-subspace", "subspace", ("subspace.safetensors",), True,
    )  # fmt: skip
    assert one.metadata == {"inputs": {"x": "hash"}}
    assert (two.files, two.references, two.is_input) == ((), ("corpus.jsonl",), True)
    assert (made.files, made.is_input) == (("adapter/weights",), False)
    assert set(made.aliases) == {"latest", "seed42"}


def test_disabled_writes_nothing_and_so_does_the_environments_disabled(tmp_path, monkeypatch):
    assert open_mirror(Metrics(wandb="disabled"), tmp_path, SETTINGS) is None
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert open_mirror(Metrics(wandb="auto"), tmp_path, SETTINGS) is None
    assert not (tmp_path / "wandb").exists()


def test_without_wandb_installed_the_metrics_stay_in_the_folder(tmp_path, caplog, monkeypatch):
    caplog.set_level(logging.INFO, "spd_dist")
    monkeypatch.setitem(sys.modules, "wandb", None)  # what an import of a package that is not there meets
    assert open_mirror(Metrics(wandb="online"), tmp_path, SETTINGS) is None
    assert "W&B: not installed" in caplog.text


DYING = """
import logging, os, signal, subprocess, sys
from pathlib import Path
from spd_dist.config import Metrics
from spd_dist.tracking.metrics import MetricLogger
from spd_dist.tracking.wandb_mirror import open_mirror
logging.basicConfig()
folder = Path(sys.argv[1])
with MetricLogger(folder / "metrics", mirror=open_mirror(Metrics(wandb="offline"), folder, {})) as metrics:
    metrics.log("finetune", {"loss": 1.0}, 1)
    for pid in subprocess.run(["pgrep", "-P", str(os.getpid())], capture_output=True, text=True).stdout.split():
        if "wandb-core" in Path(f"/proc/{pid}/cmdline").read_text():
            os.kill(int(pid), signal.SIGKILL)
    for step in range(2, 6):
        metrics.log("finetune", {"loss": 0.5}, step)
"""


def test_a_run_outlives_the_death_of_wandb_with_a_warning_of_each_kind(tmp_path):
    child = subprocess.run([sys.executable, "-c", DYING, tmp_path], capture_output=True, text=True, check=False)
    assert child.returncode == 0, child.stderr
    assert len(read_metrics(tmp_path / "metrics")) == 5
    for doing in ("logging", "finishing", "closing"):  # whichever notices
        assert child.stderr.count(f"W&B: {doing} failed, no more of that is sent") <= 1
    assert "failed, no more of that is sent" in child.stderr
