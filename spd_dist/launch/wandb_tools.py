"""Weights & Biases beside a run: the dashboard of a project, and offline runs uploaded where there is a network."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from spd_dist.launch import at_least, launcher
from spd_dist.overrides import load_config
from spd_dist.redaction import redacted

DASHBOARD = """\
Make the W&B dashboard of a run's project: `python launchers/dashboard.py RUN_DIR [--report] [--dry-run]`.

Its panels are those that the metrics of RUN_DIR fill: any finished run of the project will do. Runs are grouped by
configuration, seeds together. Needs `pip install -e '.[dashboard]'` and, but for --dry-run, a login.
Exit codes: 0 done, 2 a package or a name is missing, 3 the run is not there, 1 anything else.
"""

SYNC = """\
Upload offline W&B runs, in order: `python launchers/wandb_sync.py RUN_DIR [RUN_DIR ...]`, where there is a network.

The tasks of an array come by their index, and the parts of a run that was started again by their time: W&B joins those
of one id in the order in which they arrive. What is uploaded once is not uploaded again.
Exit codes: 0 all is uploaded, 1 something is not; start the same command again.
"""


@launcher
def dashboard(words: Sequence[str] | None = None) -> int:
    """Parse, build, and save or print."""
    parser = argparse.ArgumentParser(description=DASHBOARD, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="a run of the project")
    parser.add_argument("--entity", default="", help="whose project; metrics.entity or the account's own if not given")
    parser.add_argument("--experiment", help="show the runs with this metrics.experiment only: those of a sweep")
    parser.add_argument("--report", action="store_true", help="make a report, too")
    parser.add_argument("--dry-run", action="store_true", help="print the workspace as JSON")
    arguments = parser.parse_args(words)
    make_dashboard(arguments)
    return 0


def make_dashboard(arguments: argparse.Namespace) -> None:
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


@dataclass(frozen=True)
class Part:
    """What one process wrote of a W&B run."""

    folder: Path
    name: str
    """Of the W&B run: `generate-seed42-task3`."""
    task_index: int

    @property
    def log(self) -> Path:
        """The file that is uploaded; it refers to the others."""
        return next(self.folder.glob("run-*.wandb"))

    @property
    def is_uploaded(self) -> bool:
        """Whether W&B marked it so."""
        return self.log.with_name(f"{self.log.name}.synced").exists()


def sync(words: Sequence[str] | None = None) -> int:
    """Parse, upload one part after the other, and turn the outcome into an exit code."""
    parser = argparse.ArgumentParser(description=SYNC, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_dirs", nargs="+", type=Path, metavar="RUN_DIR", help="rounds and sweeps in it are found")
    parser.add_argument("--dry-run", action="store_true", help="say what would be uploaded, in order")
    parser.add_argument("--timeout", type=at_least(1, float), default=900.0, metavar="SECONDS", help="of one part")
    parser.add_argument(
        "--settled",
        type=at_least(0, float),
        default=30.0,
        metavar="SECONDS",
        help="leave out what was written to later than that",
    )
    arguments = parser.parse_args(words)
    left = []
    for part in [part for run_dir in arguments.run_dirs for part in find_parts(run_dir)]:
        outcome = handled(part, arguments)
        print(f"{part.name:<32} {outcome:<16} {part.folder}", flush=True)
        left += [part] if outcome not in ("uploaded", "was uploaded") else []
    if left and not arguments.dry_run:
        print(f"{len(left)} not uploaded; start the same command again", file=sys.stderr)
    return int(bool(left))


def find_parts(run_dir: Path) -> list[Part]:
    """All parts under a run's folder, in the order in which they belong on the server."""
    places = (Path(place) for place, _, _ in os.walk(run_dir))  # passes by what a run removes meanwhile
    folders = [place for place in places if place.parent.name == "wandb" and place.name.startswith("offline-run-")]
    parts = [Part(folder, *name_and_task(folder)) for folder in folders if any(folder.glob("run-*.wandb"))]
    return sorted(parts, key=lambda part: (part.folder.parent, part.task_index, part.folder.name))


def name_and_task(folder: Path) -> tuple[str, int]:
    """The run's name and its task's index, as it wrote them beside its parts; else the folder's name, and 0."""
    run_id = folder.name.rpartition("-")[2]
    found = map(_described, sorted(folder.parent.glob("*.json")))
    own = next((described for described in found if described.get("id") == run_id), {})
    name, index = own.get("name"), own.get("task_index")
    return name if isinstance(name, str) else folder.name, index if isinstance(index, int) else 0


def _described(file: Path) -> Mapping[str, object]:
    """What a run wrote beside its parts; nothing where it is cut or something else."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def handled(part: Part, arguments: argparse.Namespace) -> str:
    """Upload a part, unless there is a reason not to; what became of it."""
    if part.is_uploaded:
        return "was uploaded"
    if time.time() - part.log.stat().st_mtime < arguments.settled:
        return "still written"
    if arguments.dry_run:
        return "to be uploaded"
    command = [sys.executable, "-m", "wandb", "sync", str(part.folder)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=arguments.timeout, check=False)
    except subprocess.TimeoutExpired:
        return "timed out"
    if not part.is_uploaded:  # W&B's exit code is 0 also when it failed
        print(redacted(done.stderr.strip() or done.stdout.strip()), file=sys.stderr)
        return "failed"
    return "uploaded"
