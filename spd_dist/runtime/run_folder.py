"""A run's folder: one config, a manifest a stage, written last. What is complete is skipped, what is stale redone.

A stage is named by its folder: `generate`, or `arms/psr/generate` for another arm. Rank 0 looks and writes, and every
rank hears what it found: all methods but `folder` are collectives.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from spd_dist.distributed.collectives import any_rank, on_main
from spd_dist.distributed.world import World
from spd_dist.errors import ConfigError
from spd_dist.runtime.artifacts import content_hash, corrupt, missing, read_json, sha256_of, write_json, write_text
from spd_dist.runtime.environment import environment

MANIFEST = "manifest.json"
STARTED = "started.json"
"""The inputs that the unfinished work in a stage's folder was made from."""

MAY_CHANGE = (
    "run_dir",
    "rounds",
    "metrics",
    "model.cache_dir",
    "calibrate.batch_size",
    "calibrate.checkpointing",
    "generate.placement",
    "generate.batch_size",
    "generate.num_tasks",
    "generate.task_index",
    "generate.vllm_python",
    "finetune.micro_batch_size",
    "finetune.checkpointing",
    "finetune.checkpoint_every",
    "finetune.keep_checkpoints",
    "finetune.keep_every",
    "finetune.packing",
    "finetune.merge",
    "evaluate.allow_code_execution",
    "evaluate.batch_size",
    "evaluate.placement",
    "distributed.zero_stage",
    "distributed.timeout_seconds",
    "distributed.threads",
    "distributed.interface",
)
"""Config keys, or whole sections, that do not change results: they may differ when a run goes on."""

log = logging.getLogger(__name__)


class RunFolder:
    """The folder of one run, as it was opened by all ranks."""

    def __init__(self, path: str | Path, config: Mapping[str, Any], world: World) -> None:
        """Open or make the folder, and write `config.yaml` and `environment.json`.

        Raises:
            ConfigError: the folder holds a run of another config, or is not a folder.
        """
        self.path = Path(path)
        self.world = world
        described = environment(world)
        on_main("opening the run folder", lambda: self._open(config, described))

    def folder(self, stage: str) -> Path:
        """Where a stage's files are."""
        return self.path / stage

    def is_complete(self, stage: str, inputs: Mapping[str, str]) -> bool:
        """Whether the stage was finished from these inputs and its outputs are untouched; if not, the log says why."""
        reason = on_main(f"checking {stage}", lambda: self._why_not_complete(stage, inputs))
        if reason is None:
            log.info("%s: complete, skipped", stage)
        elif self._is_known(stage):
            log.info("%s: done again, since %s", stage, reason)
        return reason is None

    def start(self, stage: str, inputs: Mapping[str, str]) -> Path:
        """The stage's folder, ready to work in: unfinished work of the same inputs is kept, other work removed."""
        on_main(f"starting {stage}", lambda: self._start(stage, inputs))
        return self.folder(stage)

    def finish(
        self,
        stage: str,
        inputs: Mapping[str, str],
        outputs: Iterable[str | Path],
        *,
        seconds: float,
        extra: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Wait for every rank, then write the manifest, last.

        Args:
            stage: The stage's folder.
            inputs: Name and hash of everything that the outputs depend on.
            outputs: Files, or folders of them, inside the stage's folder.
            seconds: Wall-clock time of the stage.
            extra: Any plain data that is worth keeping beside.

        Raises:
            DataError: an output is missing.
        """
        paths = [self.folder(stage) / output for output in outputs]
        if self.world.size > 1:
            any_rank(False)  # outputs of the other ranks are whole from here on

        def write() -> dict[str, Any]:
            manifest = {
                "stage": stage,
                "inputs": dict(inputs),
                "outputs": self._described(stage, paths),
                "seconds": round(seconds, 3),
                "world_size": self.world.size,
                "finished_at": datetime.now(UTC).isoformat(timespec="seconds"),
                "extra": dict(extra or {}),
            }
            write_json(self.folder(stage) / MANIFEST, manifest)
            (self.folder(stage) / STARTED).unlink(missing_ok=True)
            return manifest

        return on_main(f"finishing {stage}", write)

    def manifest(self, stage: str) -> dict[str, Any]:
        """What `finish` wrote.

        Raises:
            DataError: the stage is not finished.
        """
        return on_main(f"reading the manifest of {stage}", lambda: read_json(self.folder(stage) / MANIFEST))

    def output_hash(self, stage: str) -> str:
        """One hash of all outputs of a finished stage: the input of the stages after it."""
        return content_hash(self.manifest(stage)["outputs"])

    def _open(self, config: Mapping[str, Any], described: Mapping[str, Any]) -> None:
        if self.path.exists() and not self.path.is_dir():
            raise ConfigError(f"run_dir: {self.path} is a file; name a folder")
        plain = OmegaConf.create(dict(config))
        file = self.path / "config.yaml"
        if file.exists():
            _refuse_another_config(self.path, _read_yaml(file), OmegaConf.to_container(plain))
        write_text(file, OmegaConf.to_yaml(plain))
        earlier = []
        if (self.path / "environment.json").exists():
            last = read_json(self.path / "environment.json")
            earlier = [*last.pop("earlier", []), last]
        write_json(self.path / "environment.json", {**described, "earlier": earlier})

    def _is_known(self, stage: str) -> bool:
        return (self.folder(stage) / MANIFEST).exists() or (self.folder(stage) / STARTED).exists()

    def _why_not_complete(self, stage: str, inputs: Mapping[str, str]) -> str | None:
        file = self.folder(stage) / MANIFEST
        if not file.exists():
            return "it was not finished"
        manifest = read_json(file)
        before = manifest["inputs"]
        changed = [name for name in sorted(inputs.keys() | before.keys()) if inputs.get(name) != before.get(name)]
        if changed:
            return f"its input {', '.join(changed)} changed"
        for name, output in manifest["outputs"].items():
            path = self.folder(stage) / name
            if not path.exists():
                return f"its output {name} is gone"
            if path.stat().st_size != output["bytes"] or sha256_of(path) != output["sha256"]:
                return f"its output {name} was changed"
        return None

    def _start(self, stage: str, inputs: Mapping[str, str]) -> None:
        folder = self.folder(stage)
        started = folder / STARTED
        other_inputs = started.exists() and read_json(started) != dict(inputs)
        if other_inputs or (folder / MANIFEST).exists():
            stale = folder.with_name(f".{folder.name}.stale")
            shutil.rmtree(stale, ignore_errors=True)
            folder.rename(stale)  # at once: a kill here leaves nothing that looks like this stage
            shutil.rmtree(stale)
        write_json(started, dict(inputs))

    def _described(self, stage: str, paths: Iterable[Path]) -> dict[str, dict[str, Any]]:
        """Size and hash of every file, by its name inside the stage's folder."""
        described = {}
        for path in paths:
            if not path.exists():
                raise missing(path)
            for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
                if file.is_file():
                    name = file.relative_to(self.folder(stage)).as_posix()
                    described[name] = {"bytes": file.stat().st_size, "sha256": sha256_of(file)}
        return described


def result_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that results depend on, by dotted key: all but `MAY_CHANGE`."""
    return {key: value for key, value in settings_by_key(config).items() if not _may_change(key)}


def settings_hash(config: Mapping[str, Any], *sections: str) -> str:
    """The hash of the settings in `sections` that results depend on; a top-level key (`seed`) is a section, too."""
    settings = result_settings(config)
    return content_hash({key: value for key, value in settings.items() if key.partition(".")[0] in sections})


def _refuse_another_config(path: Path, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    before, after = result_settings(old), result_settings(new)
    differing = [
        f"{key}: {before.get(key)!r} -> {after.get(key)!r}"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key)
    ]
    if differing:
        raise ConfigError(
            f"run_dir: {path} holds a run of another config ({'; '.join(differing)}); "
            "give this run a run_dir of its own, or set the keys back"
        )


def settings_by_key(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Values by dotted key; tuples as lists, which is what YAML gives back."""
    flat = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            flat |= settings_by_key(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = list(value) if isinstance(value, tuple) else value
    return flat


def _may_change(key: str) -> bool:
    return any(key == free or key.startswith(f"{free}.") for free in MAY_CHANGE)


def _read_yaml(file: Path) -> dict[str, Any]:
    try:
        return OmegaConf.to_container(OmegaConf.load(file))
    except (YAMLError, OmegaConfBaseException) as error:
        raise corrupt(file, error) from error
