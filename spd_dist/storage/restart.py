"""A run done again from a stage on, perhaps under another config; and how a run stands, in `status.json`."""

from __future__ import annotations

import logging
import os
import shutil
import socket
import time
from collections.abc import Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from omegaconf import OmegaConf

from spd_dist.config import STAGES
from spd_dist.distributed.heartbeat import Heartbeat, is_alive, naming_lagging_ranks
from spd_dist.distributed.uneven_work import on_main
from spd_dist.errors import ConfigError, DataError, StopRequested
from spd_dist.redaction import redacted_data
from spd_dist.storage.artifacts import JsonlWriter, read_jsonl, replacing, write_text
from spd_dist.storage.manifests import finished_stages
from spd_dist.storage.records import read_record, write_record
from spd_dist.storage.run_folder import REPLACED, read_config, read_environment
from spd_dist.storage.settings import READ_BY, changed, first_reader, fixed_settings, folder_of, is_of

log = logging.getLogger(__name__)


State = Literal["running", "complete", "stopped", "failed"]


@dataclass(frozen=True)
class Status:
    """`status.json`: how a run stands."""

    state: State
    """A run that was killed stays `running`."""
    reason: str
    time: float
    """When this was written, in seconds since 1970."""
    until: str
    """The last stage that is asked for."""
    world_size: int
    host: str
    """Of rank 0, as `pid`."""
    pid: int
    slurm_job: str | None


def status_path(folder: Path, part: str = "") -> Path:
    """Where the status of a run is, or that of a job among several in its folder."""
    return folder / (f"status.{part}.json" if part else "status.json")


@contextmanager
def kept_status(path: Path, heartbeat: Heartbeat, last: str) -> Generator[None]:
    """Rank 0 writes `running`, and in the end `complete`, `stopped` or `failed`; a killed run stays `running`.

    A collective: no rank begins if the first state can't be written. Where it fails, the error says where ranks were.

    Raises:
        ConfigError: another process of this host is at the same work.
        DataError: the disk is full or may not be written.
    """
    world = heartbeat.world

    def write(state: State, reason: str = "") -> None:
        if world.is_main:
            write_record(
                path,
                Status(
                    state=state,
                    reason=reason,
                    time=time.time(),
                    until=last,
                    world_size=world.size,
                    host=socket.gethostname(),
                    pid=os.getpid(),
                    slurm_job=os.environ.get("SLURM_JOB_ID"),
                ),
            )

    def write_alone(state: State, reason: str) -> None:
        """Not a collective: other ranks may have failed elsewhere, or not at all."""
        with suppress(DataError, OSError):  # the disk may be what failed
            write(state, reason)

    with naming_lagging_ranks(heartbeat):
        on_main("looking for another process at work", lambda: refuse_beside(path))
        on_main("writing the status", lambda: write("running"))
        try:
            yield
        except StopRequested as stop:
            write_alone("stopped", str(stop))
            raise
        except BaseException as error:
            write_alone("failed", f"{type(error).__name__}: {error}")
            raise
        on_main("writing the status", lambda: write("complete"))


def refuse_beside(path: Path) -> None:
    """See that no other process of this host does the work whose status is at `path`; one that ends is waited for.

    A status that cannot be read says nothing of any process, and is written anew.

    Raises:
        ConfigError: one does.
    """
    deadline = time.monotonic() + SECONDS_TO_END
    while path.exists():
        try:
            status = read_record(path, Status)
        except DataError:
            return
        is_ours = status.host == socket.gethostname() and status.pid != os.getpid()
        if status.state != "running" or not is_ours or not is_alive(status.pid, since=status.time):
            return
        if time.monotonic() > deadline:
            raise ConfigError(
                f"run_dir: {path.parent} is at work: process {status.pid} of this host does the same since "
                f"{time.strftime('%H:%M:%S', time.localtime(status.time))}; wait for it, stop it (touch "
                f"{path.parent / 'PREEMPT'}), or name another run_dir"
            )
        time.sleep(0.2)


def read_status(run_dir: Path) -> Status | None:
    """The status of a run; None if it was never started.

    Raises:
        DataError: it is of another version, or no status.
    """
    path = status_path(run_dir)
    return read_record(path, Status) if path.exists() else None


SECONDS_TO_END = 10.0
"""A process that was stopped may still be about to end."""
FRESH_SECONDS = 60
"""A run whose heartbeat is younger may still be at work."""


def restart(path: Path, stage: str, config: Mapping[str, Any]) -> None:
    """Move what `stage` and all later ones made out of the way, and give the folder the new config. A collective.

    `stage` is the first that is to be done again.

    Raises:
        ConfigError: there is no run, a finished stage before `stage` reads what changed, or the run may be at work.
    """
    on_main(f"restarting from {stage}", lambda: _restart(path, stage, config))


def _restart(path: Path, stage: str, config: Mapping[str, Any]) -> None:
    file, plain = path / "config.yaml", OmegaConf.create(redacted_data(dict(config)))
    ours: Any = OmegaConf.to_container(plain)
    if not file.exists():
        raise ConfigError(f"--restart-from {stage}: {path} holds no run yet; leave it out")
    read_environment(path)
    changes = changed(fixed_settings(read_config(file)), fixed_settings(ours))
    refuse_stale_stages(path, stage, changes)
    refuse_while_running(path, stage)
    target = path / REPLACED / time.strftime("%Y%m%d-%H%M%S")
    for one in made_from(path, stage):
        if one.exists():
            (target / one.relative_to(path)).parent.mkdir(parents=True, exist_ok=True)
            one.rename(target / one.relative_to(path))
    first = STAGES[0] if folder_of(stage) == "project" else stage
    forget_metrics(path / "metrics", target / "metrics", STAGES[STAGES.index(first) :])
    write_text(file, OmegaConf.to_yaml(plain))
    where = f"what it and later stages had made is in {target}" if target.exists() else "nothing was made of it yet"
    log.info("--restart-from %s: %s", stage, where)


def refuse_stale_stages(path: Path, stage: str, changes: Mapping[str, str]) -> None:
    """See that what is kept does not depend on what changed.

    Raises:
        ConfigError: a finished stage before `stage` reads a key that changed.
    """
    order = list(READ_BY)
    done = {part for one in finished_stages(path) for part in one.relative_to(path).parts}
    kept = [folder for folder in order[: order.index(folder_of(stage))] if folder in done]
    stale = {key: words for key, words in changes.items() if any(is_of(key, READ_BY[folder]) for folder in kept)}
    if stale:
        raise ConfigError(
            f"--restart-from {stage}: earlier stages read what changed ({'; '.join(stale.values())}); "
            f"take --restart-from {first_reader(stale)}, or set the keys back"
        )


def made_from(path: Path, stage: str) -> Iterator[Path]:
    """What a run folder holds of `stage` and of all later ones, later ones first."""
    yield from (path / name for name in ("report.json", "report.html", "rounds", "jobs"))
    if folder_of(stage) in ("project", "generate"):
        yield path / "token_effects"
    if folder_of(stage) == "project":
        yield path / "mechanism"
    order = list(READ_BY)
    for folder in reversed(order[order.index(folder_of(stage)) :]):
        yield path / folder
        yield from sorted((path / "arms").glob(f"*/{folder}"))


def refuse_while_running(path: Path, stage: str) -> None:
    """See that no process is at work in the folder.

    Raises:
        ConfigError: its status is `running`, and a rank was seen within a minute.
    """
    status = read_status(path)
    if status is None or status.state != "running":
        return
    seen = [file.stat().st_mtime for file in (path / "heartbeat").rglob("*.json")]
    age = time.time() - max(seen, default=0.0)
    if age < FRESH_SECONDS:
        raise ConfigError(
            f"--restart-from {stage}: {path} may be at work, a rank was seen {age:.0f} s ago; stop it (touch "
            f"{path / 'PREEMPT'}), or start this command again once it has been silent for {FRESH_SECONDS} s"
        )


def forget_metrics(folder: Path, target: Path, stages: Iterable[str]) -> None:
    """Keep the rows of the other stages alone, and all rows beside: curves must not join two trainings."""
    stages = set(stages)
    for file in sorted(folder.glob("*.jsonl")):
        rows = read_jsonl(file)
        kept = [row for row in rows if row.get("stage") not in stages]
        if len(kept) == len(rows):
            continue
        target.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, target / file.name)
        with replacing(file) as partial:
            partial.touch()
            writer = JsonlWriter(partial)
            for row in kept:
                writer.write(row)
            writer.close()
