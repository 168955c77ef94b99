import dataclasses
import json
import logging
import os
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from wandb_log import read_offline_run

from spd_dist.config import Config, Metrics
from spd_dist.runtime.metrics import MetricLogger, read_metrics
from spd_dist.runtime.wandb_mirror import open_mirror

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


def test_auto_without_a_key_is_offline_and_says_so(tmp_path, caplog):
    caplog.set_level(logging.INFO, "spd_dist")
    run = run_in(tmp_path, "auto")
    assert len(run.history) == 5
    assert "W&B: offline, since there is no key" in caplog.text
    assert "wandb sync" in caplog.text


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


class Broken(BaseHTTPRequestHandler):
    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"] or 0))
        self.send_error(500)

    def log_message(self, *args):
        pass


def test_a_server_that_fails_means_offline_after_the_time_it_was_given(tmp_path, caplog, monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Broken)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    try:
        mirror = open_mirror(Metrics(wandb="auto"), tmp_path, SETTINGS, init_seconds=1.0)
        mirror.log({"calibrate/step": 1, "calibrate/loss": 2.0})
        mirror.finish(3)
    finally:
        server.shutdown()
        server.server_close()
    assert "W&B: online does not work" in caplog.text
    assert read_offline_run(tmp_path).exit_code == 3


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
from spd_dist.runtime.metrics import MetricLogger
from spd_dist.runtime.wandb_mirror import open_mirror
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


def test_a_run_outlives_the_death_of_wandb_with_one_warning(tmp_path):
    child = subprocess.run([sys.executable, "-c", DYING, tmp_path], capture_output=True, text=True, check=False)
    assert child.returncode == 0, child.stderr
    assert len(read_metrics(tmp_path / "metrics")) == 5
    assert child.stderr.count("failed, no more is sent") == 1
