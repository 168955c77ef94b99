"""Make the W&B dashboard of a run's project: `python launchers/dashboard.py RUN_DIR [--report] [--dry-run]`.

Its panels are those that the metrics of RUN_DIR fill: any finished run of the project will do. Runs are grouped by
configuration, seeds together. Needs `pip install -e '.[dashboard]'` and, but for --dry-run, a login.
Exit codes: 0 done, 2 a package or a name is missing, 3 the run is not there, 1 anything else.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from spd_dist.errors import UserError
from spd_dist.overrides import load_config


def main(words: Sequence[str] | None = None) -> int:
    """Parse, build, save or print, and turn the outcome into an exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="a run of the project")
    parser.add_argument("--entity", default="", help="whose project; metrics.entity or the account's own if not given")
    parser.add_argument("--experiment", help="show the runs with this metrics.experiment only: those of a sweep")
    parser.add_argument("--report", action="store_true", help="make a report, too")
    parser.add_argument("--dry-run", action="store_true", help="print the workspace as JSON")
    arguments = parser.parse_args(words)
    try:
        make(arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def make(arguments: argparse.Namespace) -> None:
    """Build what is asked for."""
    from spd_dist.tracking.dashboard import logged_metrics, report, save, workspace

    axes = logged_metrics(arguments.run_dir)
    metrics = load_config([arguments.run_dir / "config.yaml"]).metrics
    entity = arguments.entity or metrics.entity or ""
    space = workspace(axes, project=metrics.project, entity=entity, experiment=arguments.experiment)
    if arguments.dry_run:
        print(json.dumps(space._to_model().model_dump(by_alias=True, exclude_none=True), indent=2, default=str))
        return
    print(f"workspace: {save(space)}")
    if arguments.report:
        written = report(axes, project=metrics.project, entity=entity, experiment=arguments.experiment)
        print(f"report: {save(written, as_draft=True)}")
