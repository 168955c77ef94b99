"""Check every node before a run, launched as the run: `deepspeed launchers/doctor.py --config ... [key=value ...]`.

Within a minute it says in one table what is right, and what is wrong where: code, packages, config, devices, memory,
disks, the shared run folder, the all-reduce and its bandwidth, clocks, model and data.
Exit codes: 0 all is right, 1 something is wrong.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import os
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from spd_dist.config import Config
from spd_dist.errors import UserError
from spd_dist.launch import at_least, hide_secrets
from spd_dist.overrides import load_config, split_words
from spd_dist.process.launcher_watchdog import watch_launchers

if TYPE_CHECKING:
    from spd_dist.preflight import Facts, Finding, Needs

FOLDER = ".preflight"
SECONDS_OF_ONE_LAUNCH = 120
"""Reports in the folder that are older are of an earlier launch."""


def main() -> int:
    """Look at this host, meet the others, and say what is wrong."""
    hide_secrets()
    watch_launchers(os.environ)
    arguments = parse_arguments()
    try:
        config = load_config(arguments.config, arguments.overrides)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch|deepspeed")
    for library in ("DeepSpeed", "transformers", "datasets", "httpx"):
        logging.getLogger(library).setLevel(logging.ERROR)
    return examine(config, arguments)


def parse_arguments() -> argparse.Namespace:
    """The command line; `--local_rank` is what the deepspeed launcher adds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", nargs="+", action="extend", default=[], metavar="YAML", help="as for spd.py")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="as for spd.py")
    parser.add_argument("--min-disk-gib", type=at_least(0, float), default=5.0, metavar="G", help="free in run_dir")
    parser.add_argument(
        "--min-gb-per-second", type=at_least(0, float), default=0.0, metavar="B", help="of an all-reduce"
    )
    parser.add_argument("--max-skew-seconds", type=at_least(0, float), default=1.0, metavar="S", help="between clocks")
    parser.add_argument(
        "--timeout-seconds", type=at_least(1, float), default=40.0, metavar="S", help="for the ranks to meet"
    )
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_intermixed_args()
    arguments.config, arguments.overrides = split_words(arguments.config + arguments.overrides)
    return arguments


def examine(config: Config, arguments: argparse.Namespace) -> int:
    """Every check, on every rank; rank 0 prints the table, or each rank its part of it if they can't meet."""
    from spd_dist.distributed.collectives import gather_objects
    from spd_dist.distributed.world import join_world, leave_world, rendezvous
    from spd_dist.preflight import Facts, Needs, gather_facts, judge, meet
    from spd_dist.types import record_of

    os.environ |= rendezvous(os.environ)
    own = gather_facts(config, os.environ)
    needs = Needs(
        disk_gib=arguments.min_disk_gib,
        is_sharded=config.distributed.zero_stage == 3,
        gigabytes_per_second=arguments.min_gb_per_second,
        skew_seconds=arguments.max_skew_seconds,
    )
    leave_report(Path(config.run_dir) / FOLDER, own)
    hurried = dataclasses.replace(config.distributed, timeout_seconds=arguments.timeout_seconds)
    try:
        world = join_world(hurried)
        facts = [record_of(Facts, one) for one in gather_objects(dataclasses.asdict(own))]
        meeting = meet(Path(config.run_dir), world)
    except (RuntimeError, UserError) as error:
        return apart(config, own, needs, error)
    found = judge(facts, meeting, needs)
    if world.is_main:
        show(found, len({one.host for one in facts}))
    leave_world()
    return 1 if any(not one.is_right for one in found) else 0


def leave_report(folder: Path, own: Facts) -> None:
    """Put this rank's facts where rank 0 can read them if no message reaches it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"rank_{own.rank:05d}.json").write_text(json.dumps(dataclasses.asdict(own)), encoding="utf-8")
    except OSError:
        pass  # the table will say so


def apart(config: Config, own: Facts, needs: Needs, error: Exception) -> int:
    """The ranks can't meet: rank 0 shows what it knows of the others by the shared folder, the others why not."""
    from spd_dist.preflight import Finding, judge

    reason = str(error).strip().splitlines()[0]
    meeting_place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    if own.rank != 0:
        print(f"rank {own.rank} on {own.host} cannot meet the others at {meeting_place}: {reason}", file=sys.stderr)
        return 1
    facts = [own, *(one for one in reports(Path(config.run_dir) / FOLDER) if one.rank != 0)]
    found = judge(facts, None, needs)
    host_of = {one.rank: one.host for one in facts}
    for rank in range(int(os.environ["WORLD_SIZE"])):
        if rank not in host_of:
            what = f"rank {rank} has left no report in {config.run_dir}: not started, or another disk"
            found.append(Finding("meeting", False, "?", what))
        elif rank > 0:
            what = f"rank {rank} runs, but not all ranks met at {meeting_place}: a firewall, or distributed.interface"
            found.append(Finding("meeting", False, host_of[rank], what))
    found.append(Finding("meeting", False, own.host, reason))
    show(found, len(set(host_of.values())))
    return 1


def reports(folder: Path) -> Iterator[Facts]:
    """What the ranks of this launch left in the folder."""
    from spd_dist.preflight import Facts
    from spd_dist.types import record_of

    for file in sorted(folder.glob("rank_*.json")):
        if time.time() - file.stat().st_mtime < SECONDS_OF_ONE_LAUNCH:
            yield record_of(Facts, json.loads(file.read_text(encoding="utf-8")))


def show(found: Sequence[Finding], num_hosts: int) -> None:
    """The table: what is wrong first."""
    from rich.console import Console
    from rich.table import Table

    table = Table("", "check", "where", "what", title=f"{num_hosts} hosts" if num_hosts > 1 else None)
    for one in sorted(found, key=lambda one: one.is_right):
        table.add_row("ok" if one.is_right else "WRONG", one.check, one.where, one.what)
    Console(width=max(110, Console().width)).print(table, highlight=False)
    num_wrong = sum(not one.is_right for one in found)
    print(f"{num_wrong} checks failed" if num_wrong else "all is right", flush=True)
