"""Dashboards as code: a W&B workspace and a report, made of the panels that a run's metrics fill."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from types import ModuleType
from typing import Any

from spd_dist.errors import ConfigError
from spd_dist.runtime.panels import SECTIONS, Plot, plots

TITLE = "Self-policy distillation"
EXPLANATION = (
    "Runs are grouped by experiment and configuration, so that seeds of one configuration share a line; a sweep is the "
    "groups of one experiment. Every stage has a step axis of its own."
)


def workspace(axes: Mapping[str, str], *, project: str, entity: str, experiment: str | None = None) -> Any:
    """The workspace for a project; `save()` puts it on the server.

    Args:
        axes: Metrics and their axes, by `logged_metrics`.
        project: Where the runs are.
        entity: Whose project.
        experiment: Show the runs of this one only.

    Raises:
        ConfigError: wandb-workspaces is not installed.
    """
    spaces = _package("workspaces")
    sections = [
        spaces.Section(name=name, is_open=True, panels=[_panel(plot) for plot in plots(panels, axes)])
        for name, panels in SECTIONS.items()
    ]
    filters = [] if experiment is None else [spaces.Config("metrics.experiment") == experiment]
    runs = spaces.RunsetSettings(groupby=[spaces.Metric("Group")], filters=filters)
    name = TITLE if experiment is None else f"{TITLE}: {experiment}"
    return spaces.Workspace(entity=entity, project=project, name=name, sections=sections, runset_settings=runs)


def report(axes: Mapping[str, str], *, project: str, entity: str, experiment: str | None = None) -> Any:
    """The same as a report to write between the plots of; `save()` puts it on the server as a draft.

    Raises:
        ConfigError: wandb-workspaces is not installed.
    """
    reports = _package("reports.v2")
    filters = "" if experiment is None else f"Config('metrics.experiment') = '{experiment}'"
    blocks: list[Any] = [reports.P(EXPLANATION), reports.TableOfContents()]
    for name, panels in SECTIONS.items():
        shown = [_panel(plot) for plot in plots(panels, axes)]
        runs = reports.Runset(entity=entity, project=project, filters=filters, groupby=["Group"])
        blocks += [reports.H1(name), reports.PanelGrid(runsets=[runs], panels=shown)]
    title = TITLE if experiment is None else f"{TITLE}: {experiment}"
    return reports.Report(project=project, entity=entity, title=title, blocks=blocks)


def save(view: Any, **options: Any) -> str:
    """Put a workspace or report on the server; gives its address.

    Raises:
        ConfigError: W&B does not take it.
    """
    wandb = importlib.import_module("wandb")
    try:
        view.save(**options)
    except (ValueError, OSError, wandb.errors.Error) as error:
        raise ConfigError(
            f"W&B did not take the dashboard of project {view.project}: {error}; log in (`wandb login`), and see that "
            "metrics.project and metrics.entity name a project with runs"
        ) from error
    return view.url


def _panel(plot: Plot) -> Any:
    reports = _package("reports.v2")
    panel = plot.panel
    if panel.kind == "table":
        return reports.WeavePanelSummaryTable(table_name=plot.metrics[0])
    if panel.kind == "bars":
        return reports.BarPlot(title=panel.title, metrics=list(plot.metrics))
    arm = plot.axis.rpartition("/")[2].removesuffix("step").rstrip("_")
    stage = plot.axis.partition("/")[0]
    title = f"{panel.title} ({stage}{f', {arm}' if arm else ''})"
    return reports.LinePlot(title=title, x=plot.axis, y=list(plot.metrics), log_y=panel.is_logarithmic)


def _package(name: str) -> ModuleType:
    try:
        return importlib.import_module(f"wandb_workspaces.{name}")
    except ImportError as error:
        raise ConfigError(
            "dashboards need wandb-workspaces, which is not installed: pip install -e '.[dashboard]'"
        ) from error
