"""The mirror of rank 0's metrics on Weights & Biases. What fails there only warns; the run and its JSONL go on."""

from __future__ import annotations

import hashlib
import importlib
import json
import logging
import os
import re
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

from spd_dist.config import Metrics
from spd_dist.storage.artifacts import content_hash
from spd_dist.storage.settings import BESIDE_THE_METHOD, is_of, result_settings
from spd_dist.tracking.metrics import Product, Value
from spd_dist.tracking.wandb_server import FINISH_SECONDS, ServerLimits, modes, waiting_while_it_answers

log = logging.getLogger(__name__)

QUIET: dict[str, Any] = {
    "silent": True,
    "console": "off",
    "disable_git": True,
    "disable_code": True,
    "disable_job_creation": True,
    "x_disable_meta": True,
    "x_transaction_log_flush_interval": 0.5,  # a killed run loses half a second, not 15
    "finish_timeout_raises": True,  # so that it is told
}


OFFLINE = "W&B: offline%s; to upload it later: python launchers/wandb_sync.py %s; metrics.wandb=disabled leaves it out"
_offline: set[Path] = set()
"""The run folders of which this process has said so: a run opens one W&B run after the other."""


class WandbMirror:
    """One W&B run, written by one process."""

    def __init__(
        self, wandb: Any, run: Any, failures: tuple[type[Exception], ...], folder: Path, limits: ServerLimits | None
    ) -> None:
        """Adopt an open run of a folder; `failures` are the exceptions that only warn, `limits` those of a server."""
        self._wandb, self._run, self._failures, self._folder, self._limits = wandb, run, failures, folder, limits
        self._defined: set[str] = set()
        self._ill: set[str] = set()
        """What failed once: it is not tried again, and told once."""

    def log(self, row: Mapping[str, Value]) -> None:
        """Show a row; each stage of it has its own step axis, so that a resumed run's points fall in place."""
        self._try("logging", lambda: self._log(row))

    def table(self, key: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
        """Show a table."""
        data = [list(row) for row in rows]
        self._try("logging a table", lambda: self._run.log({key: self._wandb.Table(columns=list(columns), data=data)}))

    def histogram(self, key: str, values: Sequence[float]) -> None:
        """Show how values are distributed."""
        self._try("logging a histogram", lambda: self._run.log({key: self._wandb.Histogram(list(values))}))

    def product(self, product: Product, *, is_input: bool) -> None:
        """Show an artifact as an output of this run, or as its input; the same files are the same version."""
        self._try("logging an artifact", lambda: self._product(product, is_input))

    def finish(self, exit_code: int) -> None:
        """Close the run with `exit_code`; what the server does not take in time stays in the run's folder."""
        with waiting_while_it_answers(self._limits):
            self._try("finishing", lambda: self._run.finish(exit_code=exit_code))
            # Waits for its service, which may still be writing an offline run.
            self._try("closing", lambda: self._wandb.teardown(exit_code))
        if self._limits is not None:  # an offline run has said it at its start
            log.info("W&B: to upload what the server has not: python launchers/wandb_sync.py %s", self._folder)

    def _product(self, product: Product, is_input: bool) -> None:
        name = re.sub(r"[^\w.-]", "-", f"{self._run.group.rpartition('-')[0]}-{product.name}", flags=re.ASCII)
        artifact = self._wandb.Artifact(name, type=product.kind, metadata=dict(product.metadata))
        for path in product.paths:
            for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
                name = file.relative_to(path.parent).as_posix()
                if file.is_dir():
                    continue
                if product.is_copied:
                    artifact.add_file(str(file), name=name, policy="immutable")  # not copied beside the run, too
                else:
                    artifact.add_reference(file.resolve().as_uri(), name=name)
        if is_input:
            # As `use_artifact` does with a draft; but that refuses to work offline, and waits for the server.
            self._run._log_artifact(artifact, is_user_created=True, use_after_commit=True)
        else:
            self._run.log_artifact(artifact, aliases=["latest", f"seed{self._run.config['seed']}"])

    def _log(self, row: Mapping[str, Value]) -> None:
        axis, *names = row
        stage, _, last = axis.partition("/")
        # A name of its own goes before a glob, so another arm's `finetune/psr_loss` leaves the axis of `finetune/*`.
        for name in (axis, *([f"{stage}/*"] if last == "step" else names)):
            if name not in self._defined:
                self._defined.add(name)
                self._run.define_metric(name, hidden=name == axis or None, step_metric=None if name == axis else axis)
        self._run.log(dict(row))

    def _try(self, doing: str, action: Callable[[], Any]) -> None:
        if doing in self._ill:
            return
        try:
            action()
        except self._failures as error:
            self._ill.add(doing)
            log.warning("W&B: %s failed, no more of that is sent; all is in the run's folder: %s", doing, error)


@contextmanager
def _service_files() -> Generator[None]:
    """Where W&B's own files were moved, its service logs there as well, and not beside the user's caches."""
    moved = os.environ.get("WANDB_DATA_DIR")
    if moved is None or "XDG_CACHE_HOME" in os.environ:
        yield
        return
    os.environ["XDG_CACHE_HOME"] = moved
    try:
        yield
    finally:
        del os.environ["XDG_CACHE_HOME"]


@_service_files()
def open_mirror(
    config: Metrics,
    run_folder: str | Path,
    settings: Mapping[str, Any],
    *,
    job: str = "pipeline",
    init_seconds: float = 60.0,
    finish_seconds: float = FINISH_SECONDS,
) -> WandbMirror | None:
    """The W&B run of `metrics.wandb`, or None if there is none to have: then a line of the log says why.

    Runs are grouped by experiment and config, seeds of one config together. The id follows from group, folder and job:
    a run that goes on after a kill has the id that it had.

    Args:
        config: The metrics section.
        run_folder: W&B's files go to its `wandb/`.
        settings: The whole config as plain data, shown with the run.
        job: `job_type` of the run.
        init_seconds: How long the server has to answer.
        finish_seconds: How long it has at the end, to take what it has not taken yet.
    """
    if config.wandb == "disabled":
        return None
    try:
        import wandb  # 0.5 s, and optional
    except ImportError:
        log.info("W&B: not installed; metrics are in %s/metrics", run_folder)
        return None
    failures = _failures(wandb)
    try:
        server = os.environ.get("WANDB_BASE_URL") or wandb.setup().settings.base_url
    except failures as error:
        log.warning("W&B: cannot start: %s; metrics are in %s/metrics", error, run_folder)
        return None
    limits = ServerLimits(server, init_seconds, finish_seconds)
    folder = Path(run_folder).resolve()
    identity = _identity(config, folder, settings, job)
    order, reason = modes(config.wandb, server)
    for mode in order:
        try:
            run = _init(wandb, config, settings, identity, mode, limits)
        except failures as error:
            log.warning("W&B: %s does not work: %s", mode, error)
            wandb.teardown()  # or its service holds the id that the next mode wants
            continue
        if mode == "online":
            log.info("W&B: online, %s", run.url)
        elif folder not in _offline:
            _offline.add(folder)
            level = logging.WARNING if config.wandb == "online" else logging.INFO
            log.log(level, OFFLINE, f", since {reason}" if reason else "", folder)
        return WandbMirror(wandb, run, failures, folder, limits if mode == "online" else None)
    return None


class _Identity(NamedTuple):
    folder: Path
    job: str
    group: str
    id: str
    name: str


def _init(
    wandb: Any,
    config: Metrics,
    settings: Mapping[str, Any],
    identity: _Identity,
    mode: Literal["online", "offline"],
    limits: ServerLimits,
) -> Any:
    """The W&B run of this identity, open; what it is stands in its `wandb/NAME.json`, for the upload later on."""
    quiet = {name: value for name, value in QUIET.items() if name in wandb.Settings.model_fields}
    times = {"init_timeout": limits.init_seconds, "finish_timeout": limits.finish_seconds, "base_url": limits.server}
    run = wandb.init(
        project=config.project,
        entity=config.entity,
        dir=identity.folder,
        config=dict(settings),
        mode=mode,
        resume="allow",
        job_type=identity.job,
        tags=_tags(settings),
        settings=wandb.Settings.model_validate({**times, **quiet}),
        group=identity.group,
        id=identity.id,
        name=identity.name,
    )
    if mode == "online":
        _ask_at_once(run)
    described = {"group": identity.group, "id": identity.id, "name": identity.name, "mode": mode}
    described["task_index"] = settings.get("generate", {}).get("task_index", 0)
    (identity.folder / "wandb" / f"{identity.name}.json").write_text(json.dumps(described), encoding="utf-8")
    return run


def _ask_at_once(run: Any) -> None:
    """Let W&B log in now, and not ask its server anything when an artifact or a table is logged.

    It would ask each time whether the type is the one that the name had before, and wait 19 s for a server that is
    slow; ours have one type a name. What is logged is sent in the background.
    """
    run._public_api()  # it is kept
    run._assert_can_log_artifact = lambda artifact: None


def _identity(config: Metrics, folder: Path, settings: Mapping[str, Any], job: str) -> _Identity:
    """Group, id and name of a run, from what it is and never from a clock."""
    apart = ("seed", *BESIDE_THE_METHOD)  # what is measured beside a run stands in its group
    of_group = {key: value for key, value in result_settings(settings).items() if not is_of(key, apart)}
    group = f"{config.experiment or folder.name}-{content_hash(of_group)[:8]}"
    seed, task = settings.get("seed"), settings.get("generate", {}).get("task_index", 0)
    identity = f"{group}|{folder}|{job}|{seed}|{task}"
    name = f"{job}-seed{seed}" + (f"-task{task}" if task else "")
    return _Identity(folder, job, group, hashlib.blake2b(identity.encode(), digest_size=6).hexdigest(), name)


def _tags(settings: Mapping[str, Any]) -> list[str]:
    """Model and task, to find a run by."""
    names = [Path(settings.get("model", {}).get("name", "")).name, settings.get("data", {}).get("task", "")]
    return [name[:64] for name in names if name]


def _failures(wandb: Any) -> tuple[type[Exception], ...]:
    """What W&B raises: its own errors, those of its private plumbing, and bare ones out of settings and asyncio."""
    plumbing = vars(importlib.import_module("wandb.sdk.mailbox.mailbox_handle")) | vars(wandb.sdk.mailbox)
    private = [item for item in plumbing.values() if isinstance(item, type) and issubclass(item, Exception)]
    return (wandb.errors.Error, OSError, TimeoutError, RuntimeError, ValueError, TypeError, *private)
