"""A run's folder: one config, a manifest a stage, written last. What is complete is skipped, what is stale redone.

A stage is named by its folder: `generate`, or `arms/psr/generate` for another arm. Rank 0 looks and writes, and every
rank hears what it found: all methods but `folder` are collectives.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from spd_dist.distributed.collectives import any_rank
from spd_dist.distributed.lock import alone_in
from spd_dist.distributed.uneven_work import on_main, wait_for_all_ranks
from spd_dist.distributed.world import World
from spd_dist.errors import ConfigError, MissingError
from spd_dist.process.environment import Environment, environment
from spd_dist.storage.artifacts import corrupt, read_json, write_json, write_text
from spd_dist.storage.attempts import forget_attempts
from spd_dist.storage.manifests import (
    MANIFEST,
    STARTED,
    Manifest,
    described,
    find_finished,
    finished_stages,
    hash_of,
    inode_of,
    publish,
    read_manifest,
    set_aside,
    take_over,
    wait_until_seen,
    why_not_complete,
)
from spd_dist.storage.records import check_schema, read_record, write_record
from spd_dist.storage.settings import changed, first_reader, fixed_settings
from spd_dist.types import Json
from spd_dist.yaml_files import load_yaml

log = logging.getLogger(__name__)

ENVIRONMENT = "environment.json"
"""What the run's attempts ran on; it has the version of the folder."""
REPLACED = "replaced"
"""Where a restart moves what it replaces."""


class RunFolder:
    """The folder of one run, as it was opened by all ranks."""

    def __init__(
        self,
        path: str | Path,
        config: Mapping[str, Any],
        world: World,
        *,
        job: str = "",
        others: Sequence[Path] = (),
    ) -> None:
        """Open or make the folder, and write `config.yaml` and `environment.json`.

        Args:
            path: Where it is.
            config: The run's, as plain data.
            world: This process among all.
            job: A name, if several jobs share the folder and may run at the same time: each works in `jobs/NAME`, and
                publishes what it has finished.
            others: Runs whose finished stages are as good as one's own, if they have the same inputs.

        Raises:
            ConfigError: the folder holds finished stages of another config, or is not a folder.
        """
        self.path = Path(path)
        self.world = world
        self.job, self.others = job, tuple(others)
        machine = environment(world)
        on_main("opening the run folder", lambda: self._open(config, machine))

    def folder(self, stage: str) -> Path:
        """Where a finished stage's files are."""
        return self.path / stage

    def workplace(self, stage: str) -> Path:
        """Where a stage is at work: in its folder, unless jobs share the run."""
        return self.path / "jobs" / self.job / stage if self.job else self.folder(stage)

    def is_complete(self, stage: str, inputs: Mapping[str, str]) -> bool:
        """Whether the stage was finished from these inputs and its outputs are untouched; if not, the log says why.

        What another arm or another run has finished from the same inputs is copied, and is as good.
        """
        folder = self.folder(stage)
        reason = on_main(f"checking {stage}", lambda: why_not_complete(folder, inputs))
        source = folder if reason is None else on_main(f"looking for {stage}", lambda: self._take_over(stage, inputs))
        if source == folder:
            log.info("%s: complete, skipped", stage)
        elif source is not None:
            log.info("%s: complete, taken from %s", stage, source)
        elif any((folder / name).exists() for name in (MANIFEST, STARTED)):
            log.info("%s: done again, since %s", stage, reason)
        return source is not None

    def start(self, stage: str, inputs: Mapping[str, str]) -> Path:
        """The stage's folder, ready to work in: unfinished work of the same inputs is kept, other work removed."""
        on_main(f"starting {stage}", lambda: self._start(stage, inputs))
        return self.workplace(stage)

    def finish(
        self,
        stage: str,
        inputs: Mapping[str, str],
        outputs: Iterable[str | Path],
        *,
        seconds: float,
        device_seconds: float | None = None,
        extra: Mapping[str, Any] | None = None,
    ) -> Manifest:
        """Wait for every rank, then write the manifest, last; if another task of an array was first, its own stays.

        Args:
            stage: The stage's folder.
            inputs: Name and hash of everything that the outputs depend on.
            outputs: Files, or folders of them, inside the stage's folder.
            seconds: Wall-clock time of the stage.
            device_seconds: Of all ranks of all attempts, if they are not what `seconds` and the ranks give.
            extra: Any plain data that is worth keeping beside.

        Raises:
            DataError: an output is missing.
        """
        folder = self.workplace(stage)
        if self.world.size > 1:
            any_rank(False)  # outputs of the other ranks are whole from here on

        def write() -> Manifest:
            manifest = Manifest(
                stage=stage,
                inputs=dict(inputs),
                outputs=described(folder, [folder / output for output in outputs]),
                seconds=round(seconds, 3),
                device_seconds=round(seconds * self.world.size if device_seconds is None else device_seconds, 3),
                world_size=self.world.size,
                finished_at=datetime.now(UTC).isoformat(timespec="seconds"),
                extra=dict(extra or {}),
            )
            write_record(folder / MANIFEST, manifest)
            return manifest

        def finish() -> Manifest:
            with alone_in(folder):
                is_complete = why_not_complete(folder, inputs) is None
                manifest = read_manifest(folder) if is_complete else write()
                (folder / STARTED).unlink(missing_ok=True)
                forget_attempts(folder)
                if self.job:
                    publish(folder, self.folder(stage))
                return manifest

        return on_main(f"finishing {stage}", finish)

    def manifest(self, stage: str) -> Manifest:
        """What `finish` wrote; every rank sees the files that it names from here on. A collective.

        Raises:
            DataError: the stage is not finished, or a host does not see what it wrote.
        """
        folder = self.folder(stage)
        found = on_main(f"reading the manifest of {stage}", lambda: read_manifest(folder))
        is_late = not all((folder / name).exists() for name in found.outputs)
        if any_rank(is_late) if self.world.size > 1 else is_late:
            with wait_for_all_ranks(f"waiting for what {stage} wrote"):
                wait_until_seen(folder, found.outputs)
        return found

    def output_hash(self, stage: str, *files: str) -> str:
        """One hash of all outputs of a finished stage, or of some: the input of the stages after it."""
        return hash_of(self.manifest(stage), *files)

    def _open(self, config: Mapping[str, Any], machine: Environment) -> None:
        if self.path.exists() and not self.path.is_dir():
            raise ConfigError(f"run_dir: {self.path} is a file; name a folder")
        plain = OmegaConf.create(dict(config))
        file, last = self.path / "config.yaml", read_environment(self.path)
        if file.exists():
            new: Any = OmegaConf.to_container(plain)
            self._accept(read_config(file), new)
        if last is not None:
            machine = replace(machine, earlier=(*last.earlier, replace(last, earlier=())))
        write_record(self.path / ENVIRONMENT, machine)
        write_text(file, OmegaConf.to_yaml(plain))

    def _accept(self, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
        """See that the folder may go on under the new config: nothing is finished, or what is finished stays true."""
        changes = changed(fixed_settings(old), fixed_settings(new))
        if changes and finished_stages(self.path):
            raise ConfigError(
                f"run_dir: {self.path} holds a run of another config ({'; '.join(changes.values())}); give this run a "
                "folder of its own by run_dir=FOLDER, or do the stages that read these keys again by spd.py "
                f"--restart-from {first_reader(changes)}, which moves what they made to {self.path / REPLACED}; or set "
                "the keys back"
            )
        if changes:
            words = "; ".join(changes.values())
            log.info("%s: nothing was finished there, so this config takes it over: %s", self.path, words)

    def _take_over(self, stage: str, inputs: Mapping[str, str]) -> Path | None:
        """Where the stage was found and taken from: its own folder, if another job has published it meanwhile."""
        source, target = find_finished((self.path, *self.others), inputs), self.folder(stage)
        if source is None or source == target:
            return source
        return source if take_over(source, target, stage) else None

    def _start(self, stage: str, inputs: Mapping[str, str]) -> None:
        folder = self.workplace(stage)
        started = folder / STARTED
        with alone_in(folder):
            found = inode_of(folder)
            try:
                other_inputs = read_json(started) != dict(inputs)
            except MissingError:
                other_inputs = False
            # Another task of an array may have finished the stage since `is_complete` looked: that is no stale work.
            is_stale = (folder / MANIFEST).exists() and (self.job or why_not_complete(folder, inputs))
            if other_inputs or is_stale:
                set_aside(folder, found)
            write_json(started, dict(inputs))


def read_environment(path: Path) -> Environment | None:
    """What the attempts at a run ran on; None if the folder holds no run yet.

    Raises:
        DataError: the folder holds a run of another version.
    """
    try:
        return read_record(path / ENVIRONMENT, Environment)
    except MissingError:
        if (path / "config.yaml").exists():  # it is written after the environment, which has the version
            check_schema(path, {})
        return None


def read_config(file: Path) -> Mapping[str, Json]:
    """The config of a run folder, as plain data.

    Raises:
        DataError: it is not YAML, or no config.
    """
    try:
        config: Any = OmegaConf.to_container(load_yaml(file))
        if not isinstance(config, dict):
            raise ValueError("a list, where a config has sections")
        return cast("dict[str, Json]", config)
    except (YAMLError, ValueError, OmegaConfBaseException) as error:  # text that is not UTF-8 is a ValueError
        raise corrupt(file, error) from error
