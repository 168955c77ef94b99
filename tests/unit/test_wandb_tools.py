import dataclasses
import os

import pytest
from fake_wandb import FakeWandb

from spd_dist.config import Config, Generate, Metrics
from spd_dist.launch.wandb_tools import find_parts
from spd_dist.launch.wandb_tools import sync as main
from spd_dist.tracking.metrics import MetricLogger
from spd_dist.tracking.wandb_mirror import open_mirror


@pytest.fixture
def server(monkeypatch, tmp_path):
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    with FakeWandb() as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
        monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
        yield server


def write_part(folder, task, steps):
    folder.mkdir(exist_ok=True)
    config = Config(generate=Generate(num_tasks=2, task_index=task))
    mirror = open_mirror(Metrics(wandb="offline"), folder, dataclasses.asdict(config), job="generate")
    with MetricLogger(folder / "metrics", mirror=mirror) as metrics:
        for step in steps:
            metrics.log("generate", {"tokens_per_second": 2.0}, step)


@pytest.mark.seconds
def test_the_parts_of_an_array_are_uploaded_in_order_and_once(server, tmp_path, capsys, monkeypatch):
    run = tmp_path / "run"
    write_part(run, 1, [0, 1])
    write_part(run, 0, [0, 1])
    folder = run / "wandb" / find_parts(run)[1].folder.name
    second = folder.rename(folder.with_name(folder.name.replace(folder.name[12:20], "20200101")))  # started long before
    write_part(run, 1, [2, 3])
    assert [part.name for part in find_parts(run)] == ["generate-seed42"] + 2 * ["generate-seed42-task1"]
    assert find_parts(run)[1].folder == second

    assert main([str(run), "--dry-run", "--settled", "0"]) == 1
    assert capsys.readouterr().out.count("to be uploaded") == 3
    assert main([str(run), "--settled", "600"]) == 1
    assert capsys.readouterr().out.count("still written") == 3
    assert not server.runs

    assert main([str(run), "--settled", "0"]) == 0
    assert [server.runs[name].settings["displayName"] for name in server.order] == [
        "generate-seed42",
        "generate-seed42-task1",
    ]
    first, other = (server.runs[name] for name in server.order)
    assert [row["generate/step"] for row in first.history] == [0, 1]
    assert [row["generate/step"] for row in other.history] == [0, 1, 2, 3]
    assert main([str(run), "--settled", "0"]) == 0
    assert capsys.readouterr().out.count("was uploaded") == 3

    write_part(run, 1, [4])
    server.failing["*"] = 1000
    assert main([str(run), "--settled", "0", "--timeout", "2"]) == 1
    shown = capsys.readouterr()
    assert "timed out" in shown.out
    assert "1 not uploaded" in shown.err
