"""Dashboards as code: a W&B workspace and a report, made of the panels that a run's metrics fill."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from spd_dist.errors import ConfigError, DataError
from spd_dist.tracking.metrics import read_metrics


@dataclass(frozen=True)
class Panel:
    """A plot, or a table that the run's summary holds."""

    title: str
    patterns: tuple[str, ...]
    kind: Literal["curve", "bars", "table"] = "curve"
    is_logarithmic: bool = False


@dataclass(frozen=True)
class Plot:
    """A panel as one run fills it: metrics of one axis."""

    panel: Panel
    metrics: tuple[str, ...]
    axis: str | None = None


SECTIONS: Mapping[str, tuple[Panel, ...]] = {
    "Arms": (
        Panel("Results by arm", ("evaluate/*accuracy", "evaluate/*nll"), "bars"),
        Panel("Paired differences", ("evaluate/*_difference",), "bars"),
        Panel("Arms", ("evaluate/arms",), "table"),
        Panel("Answers side by side", ("evaluate/answers",), "table"),
        Panel("Lengths of answers", ("evaluate/spd_length_tokens", "evaluate/*_length_tokens"), "table"),
    ),
    "Subspace": (
        Panel("Singular values of the gradients", ("project/*_singular_value",), is_logarithmic=True),
        Panel("Energy in the directions so far", ("project/*_energy_fraction",)),
        Panel("Certificates", ("project/certificates",), "table"),
    ),
    "Corpus": (
        Panel("Rates", ("generate/*_rate",), "bars"),
        Panel(
            "Tokens a completion", ("generate/*mean_tokens", "generate/*median_tokens", "generate/*max_tokens"), "bars"
        ),
        Panel("Lengths of completions", ("generate/length_tokens", "generate/*_length_tokens"), "table"),
        Panel("Completions", ("generate/samples", "generate/*_samples"), "table"),
    ),
    "Fine-tuning": (
        Panel("Loss", ("finetune/*loss",)),
        Panel("Gradient norm", ("finetune/*grad_norm",), is_logarithmic=True),
        Panel("Learning rate", ("finetune/*learning_rate",)),
    ),
    "Cost": (
        Panel("Tokens a second", ("*/*tokens_per_second",)),
        Panel("Peak memory, and share of the peak FLOPs", ("finetune/*peak_memory_gib", "finetune/*mfu_fraction")),
        Panel("Device hours of each stage", ("cost/*_device_hours",), "bars"),
        Panel("Seconds of each stage", ("cost/*_seconds",), "bars"),
        Panel("Peak memory of each stage", ("cost/*_peak_memory_gib",), "bars"),
        Panel("Stages", ("cost/stages",), "table"),
        Panel("Work done", ("*/*done_count",)),
        Panel("Time taken", ("*/*elapsed_seconds",)),
    ),
}


def logged_metrics(run_folder: Path) -> dict[str, str]:
    """Every number that rank 0 of a run logged, by name, and the axis that it is drawn over.

    Raises:
        DataError: the run logged nothing.
    """
    axes: dict[str, str] = {}
    for row in read_metrics(run_folder / "metrics"):
        label = f"{row['label']}_" if "label" in row else ""
        axes |= {name: f"{row['stage']}/{label}step" for name in row if "/" in name}
    if not axes:
        raise DataError(f"{run_folder}/metrics holds no metrics; give the folder of a run that has logged some")
    return axes


def plots(panels: Iterable[Panel], axes: Mapping[str, str]) -> Iterator[Plot]:
    """The panels as a run with these metrics fills them, one plot an axis."""
    for panel in panels:
        if panel.kind == "table":
            yield from (Plot(panel, (name,)) for name in _tables(panel, axes))
            continue
        found = [name for name in axes if any(fnmatchcase(name, pattern) for pattern in panel.patterns)]
        if panel.kind == "bars":
            yield from [Plot(panel, tuple(found))] if found else []
            continue
        for axis in dict.fromkeys(axes[name] for name in found):
            yield Plot(panel, tuple(name for name in found if axes[name] == axis), axis)


def _tables(panel: Panel, axes: Mapping[str, str]) -> Iterator[str]:
    """Names of tables, which metrics do not tell of; `*` stands for the arms that have an axis in that stage."""
    for pattern in panel.patterns:
        stage = pattern.partition("/")[0]
        ends = (axis.removeprefix(f"{stage}/").removesuffix("step") for axis in axes.values() if axis.startswith(stage))
        arms = [label.rstrip("_") for label in dict.fromkeys(ends) if label]
        yield from (pattern.replace("*", arm) for arm in arms) if "*" in pattern else [pattern]


TITLE = "Self-policy distillation"
EXPLANATION = (
    "Runs are grouped by experiment and configuration, so that seeds of one configuration share a line; a sweep is the "
    "groups of one experiment. Every stage has a step axis of its own."
)


def workspace(axes: Mapping[str, str], *, project: str, entity: str, experiment: str | None = None) -> Any:
    """The workspace for a project; `save()` puts it on the server.

    With `experiment`, the runs of that one only.

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


def save(view: Any, *, as_draft: bool = False) -> str:
    """Put a workspace, or a report as a draft, on the server; gives its address.

    Raises:
        ConfigError: W&B does not take it.
    """
    wandb = importlib.import_module("wandb")
    try:
        if as_draft:
            view.save(draft=True)
        else:
            view.save()
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
    axis = plot.axis or ""
    arm = axis.rpartition("/")[2].removesuffix("step").rstrip("_")
    stage = axis.partition("/")[0]
    title = f"{panel.title} ({stage}{f', {arm}' if arm else ''})"
    return reports.LinePlot(title=title, x=axis, y=list(plot.metrics), log_y=panel.is_logarithmic)


def _package(name: str) -> ModuleType:
    try:
        return importlib.import_module(f"wandb_workspaces.{name}")
    except ImportError as error:
        raise ConfigError(
            "dashboards need wandb-workspaces, which is not installed: pip install -e '.[dashboard]'"
        ) from error
