import json
import sys

import pytest
from fake_wandb import ANSWERS, FakeWandb

from spd_dist.errors import ConfigError, DataError
from spd_dist.launch.wandb_tools import dashboard as main
from spd_dist.tracking.dashboard import SECTIONS, logged_metrics, plots, report, workspace
from spd_dist.tracking.metrics import MetricLogger

pytestmark = pytest.mark.seconds

PROJECT = {"project": "spd", "entity": "me"}


@pytest.fixture
def run_folder(tmp_path):
    with MetricLogger(tmp_path / "metrics") as metrics:
        metrics.log("finetune", {"loss": 1.0, "grad_norm": 2.0}, 1)
        metrics.labelled("psr").log("finetune", {"loss": 1.5}, 1)
        metrics.log("evaluate", {"base_accuracy": 0.5, "spd_accuracy": 0.75}, 8)
        metrics.log("project", {"layer3_key_singular_value": 2.0, "layer3_value_singular_value": 3.0}, 1)
    (tmp_path / "config.yaml").write_text("metrics: {project: lab}\n")
    return tmp_path


def lines(space):
    return {panel.title: panel for section in space.sections for panel in section.panels if hasattr(panel, "title")}


def test_every_arm_is_drawn_over_its_own_axis_and_sites_share_one(run_folder):
    axes = logged_metrics(run_folder)
    assert axes["finetune/psr_loss"] == "finetune/psr_step"
    shown = lines(workspace(axes, **PROJECT))
    ours, psr = shown["Loss (finetune)"], shown["Loss (finetune, psr)"]
    assert (ours.x, ours.y) == ("finetune/step", ["finetune/loss"])
    assert (psr.x, psr.y) == ("finetune/psr_step", ["finetune/psr_loss"])
    assert shown["Singular values of the gradients (project)"].y == [
        "project/layer3_key_singular_value", "project/layer3_value_singular_value",
    ]  # fmt: skip
    assert shown["Results by arm"].metrics == ["evaluate/base_accuracy", "evaluate/spd_accuracy"]


def test_a_metric_that_a_run_lacks_makes_no_panel(run_folder):
    assert "Learning rate (finetune)" not in lines(workspace(logged_metrics(run_folder), **PROJECT))
    for plot in (plot for panels in SECTIONS.values() for plot in plots(panels, {})):
        assert plot.panel.kind == "table"


def test_runs_are_grouped_and_a_sweep_is_one_experiment(run_folder):
    space = workspace(logged_metrics(run_folder), **PROJECT, experiment="ranks")
    (group,) = space.runset_settings.groupby
    assert group.name == "Group"
    assert "metrics.experiment" in str(space.runset_settings.filters)
    assert space.name.endswith(": ranks")
    draft = report(logged_metrics(run_folder), **PROJECT, experiment="ranks")
    grids = [block for block in draft.blocks if type(block).__name__ == "PanelGrid"]
    assert len(grids) == len(SECTIONS)
    assert all(grid.runsets[0].groupby == ["Group"] for grid in grids)


def test_the_launcher_prints_the_workspace_or_saves_it(run_folder, capsys, monkeypatch):
    assert main([str(run_folder), "--entity", "me", "--dry-run"]) == 0
    assert "finetune/psr_loss" in json.dumps(json.loads(capsys.readouterr().out))
    with FakeWandb() as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
        assert main([str(run_folder), "--entity", "me", "--report"]) == 0
    space, draft = server.views
    for view in (space, draft):
        assert "finetune/psr_loss" in json.dumps(view)
        assert view["projectName"] == "lab"
    assert (space["type"], draft["type"]) == ("project-view", "runs/draft")


def test_a_server_that_does_not_take_it_is_an_error_with_a_remedy(run_folder, capsys, monkeypatch):
    with FakeWandb() as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
        monkeypatch.setitem(ANSWERS, "ProjectInternalId", lambda *_: {"project": None})
        assert main([str(run_folder), "--entity", "me", "--report"]) == 2
    assert "error: W&B did not take the dashboard of project lab: " in capsys.readouterr().err


def test_no_metrics_and_no_package_are_said(tmp_path, run_folder, monkeypatch, capsys):
    with pytest.raises(DataError, match="holds no metrics; give the folder of a run that has logged some"):
        logged_metrics(tmp_path / "nothing")
    monkeypatch.setitem(sys.modules, "wandb_workspaces.workspaces", None)
    with pytest.raises(ConfigError, match=r"dashboards need wandb-workspaces, .* pip install -e '\.\[dashboard\]'"):
        workspace(logged_metrics(run_folder), **PROJECT)
    assert main([str(run_folder), "--dry-run"]) == 2
    assert "error: dashboards need wandb-workspaces" in capsys.readouterr().err
