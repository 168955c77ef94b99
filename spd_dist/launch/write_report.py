"""Write a finished run's page again: `python launchers/report.py RUN_DIR [--against RUN_DIR] [--out FILE]`.

The page is made of what RUN_DIR holds; nothing is computed, and no model is loaded. --against puts another run beside
it: the arms that both have, example by example, the settings that differ, and what both wrote to the same prompts.
Exit codes: 0 done, 2 the config is wrong, 3 a run is not finished or cannot be compared, 1 anything else.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from spd_dist.launch import launcher
from spd_dist.overrides import load_config


@launcher
def main(words: Sequence[str] | None = None) -> int:
    """Parse and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="a run that is complete")
    parser.add_argument("--against", type=Path, metavar="RUN_DIR", help="another one, of the same test set")
    parser.add_argument("--out", type=Path, metavar="FILE", help="where to write it; RUN_DIR/report.html if not given")
    arguments = parser.parse_args(words)
    print(write(arguments))
    return 0


def write(arguments: argparse.Namespace) -> Path:
    """Write the page, and give its file.

    Raises:
        UserError: what the user can put right.
    """
    from spd_dist.analysis.report import read_report
    from spd_dist.arms import chosen
    from spd_dist.data.sources import load_rows
    from spd_dist.data.tasks import find_task
    from spd_dist.reports.page import Questions, write_page

    report = read_report(arguments.run_dir)
    config = load_config([arguments.run_dir / "config.yaml"])
    task = find_task(config.data.task)

    def train() -> dict[str, str]:
        rows = load_rows(task, "train", config.data) if any(arm.writes for arm in chosen(report.arms)) else []
        return {row["id"]: task.prompt(row) for row in rows}

    questions = Questions({row["id"]: task.prompt(row) for row in load_rows(task, "test", config.data)}, train)
    return write_page(arguments.run_dir, report, questions, against=arguments.against, out=arguments.out)
