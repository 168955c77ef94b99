"""A run in motion: its folder, its data, its policy, and the rule by which a stage is done once."""

from __future__ import annotations

import dataclasses
import logging
import os
import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, TypeVar

from spd_dist.arms import Arm
from spd_dist.config import Config
from spd_dist.data.controls import ended
from spd_dist.data.held_out import TestSet, make_test_set
from spd_dist.data.prompts import make_references
from spd_dist.data.sources import load_rows
from spd_dist.data.tasks import Task, find_task, refusal, runs_code, with_execution
from spd_dist.data.tasks.protocol import Row, Split
from spd_dist.distributed.collectives import any_rank, gather_objects, on_main, together
from spd_dist.distributed.heartbeat import Heartbeat, naming_lagging_ranks, telling_of_silence
from spd_dist.distributed.world import World
from spd_dist.errors import DataError, StopRequested
from spd_dist.models.policy import Policy, load_policy, load_replica, load_tokenizer
from spd_dist.overrides import config_of_arm
from spd_dist.runtime.artifacts import content_hash, read_json
from spd_dist.runtime.completions import read_completions
from spd_dist.runtime.manifests import MANIFEST
from spd_dist.runtime.metrics import MetricLogger
from spd_dist.runtime.progress import Progress
from spd_dist.runtime.run_folder import RunFolder, settings_hash
from spd_dist.runtime.sandbox import open_sandbox
from spd_dist.runtime.status import kept_status
from spd_dist.runtime.wandb_mirror import open_mirror
from spd_dist.signals import STOP_FILE, StopSignals, stop_file
from spd_dist.types import Completion

log = logging.getLogger(__name__)
T = TypeVar("T")


class Run:
    """What the stages of one run share. Every method but `progress` is a collective."""

    def __init__(
        self,
        config: Config,
        world: World,
        signals: StopSignals,
        *,
        judges: bool = False,
        job: str = "",
        others: Sequence[Path] = (),
        rounds_before: Sequence[Path] = (),
    ) -> None:
        """Open the run folder and the metrics, and make sure that answers can be judged, if this run `judges` any.

        Args:
            config: Its whole config.
            world: This process among all.
            signals: Requests to stop.
            judges: Whether it scores answers: programs need leave and a sandbox.
            job: As of `RunFolder`: what this process is called, if several share the folder.
            others: As of `RunFolder`: runs whose finished stages are as good as one's own.
            rounds_before: The folders of earlier rounds, if this is a later one.

        Raises:
            ConfigError: the folder holds a run of another config, `data.task` is unknown, or it is scored by running
                programs and that isn't allowed, or no sandbox holds on this machine.
        """
        self.config, self.world, self.signals = config, world, signals
        self.plain = dataclasses.asdict(config)
        self.folder = RunFolder(config.run_dir, self.plain, world, job=job, others=others)
        self.task_index = config.generate.task_index if config.generate.num_tasks > 1 else None
        self.stop_files = [self.folder.workplace("") / name for name in (STOP_FILE, stop_file(self.task_index))]
        on_main("removing the request to stop", lambda: [file.unlink(missing_ok=True) for file in self.stop_files])
        distributed = config.distributed
        signals.limit(os.environ, distributed.time_limit_seconds, distributed.time_margin_seconds)
        with together("finding the task"):
            self.task = find_task(config.data.task)
            if judges:
                self.task = able_to_judge(self.task, allowed=config.evaluate.allow_code_execution)
        kind = {"job": job} if job else {}
        mirror = open_mirror(config.metrics, self.folder.path, self.plain, **kind) if world.is_main else None
        self.part = job or ("" if self.task_index is None else f"task-{self.task_index:05d}")
        prefix = f"{self.part}_" if self.part else ""
        self.metrics = MetricLogger(self.folder.path / "metrics", world.rank, mirror, prefix=prefix)
        self.heartbeat = Heartbeat(self.folder.path / "heartbeat" / self.part, world)
        self._rows: dict[Split, list[Row]] = {}
        self._policy: Policy | None = None
        self.rounds_before = tuple(rounds_before)
        self._student_before = on_main("reading the round before", self._hash_of_student_before)
        self._once: dict[Hashable, Any] = {}

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Run stages in here: a collective that fails or hangs says where ranks are."""
        naming = naming_lagging_ranks(self.heartbeat)
        telling = telling_of_silence(self.heartbeat, self.config.distributed.timeout_seconds)
        with self.metrics, naming, telling:
            yield

    def kept_status(self, last: str) -> AbstractContextManager[None]:
        """Within, `status.json` says how the run up to stage `last` stands; each of several jobs has its own."""
        name = f"status.{self.part}.json" if self.part else "status.json"
        return kept_status(self.folder.path / name, self.world, last)

    def rows(self, split: Split) -> list[Row]:
        """The rows of a split, the same on every rank.

        Raises:
            DataError: they can't be read.
        """
        if split not in self._rows:
            with together(f"reading the {split} rows"):
                self._rows[split] = load_rows(self.task, split, self.config.data)
        return self._rows[split]

    def _hash_of_student_before(self) -> str | None:
        if not self.rounds_before:
            return None
        return content_hash(read_json(self.rounds_before[-1] / "finetune" / MANIFEST)["outputs"])

    def once(self, key: Hashable, make: Callable[[], T]) -> T:
        """What `make` gave when it was first called with this key: for work that several stages of this run share."""
        if key not in self._once:
            self._once[key] = make()
        return self._once[key]

    def config_of(self, arm: Arm) -> Config:
        """The config as one arm has it."""
        return self.once(arm, lambda: config_of_arm(self.config, arm))

    def earlier(self, stage: str) -> list[tuple[int, Path]]:
        """The folders of a stage in the rounds before, by their numbers; of those that did it."""
        folders = [(number, path / stage) for number, path in enumerate(self.rounds_before, 1)]
        return [(number, folder) for number, folder in folders if (folder / MANIFEST).exists()]

    def corpus(self, arm: Arm, policy: Policy) -> list[Completion]:
        """What an arm's student learns from: its own completions, or the reference answers of the calibration set."""
        config, rows = self.config_of(arm), self.rows("calibration")
        with together("reading what the student learns from"):
            ends = policy.eos_token_ids
            if arm.learns_from == "references":
                rows = rows[: config.calibrate.num_examples]
                return make_references(rows, self.task, policy.tokenizer, config.data, eos_token_ids=ends)
            own = read_completions(self.folder.folder(arm.stage("generate")) / "completions")
            if arm.learns_from == "itself, ended":
                return ended(own, policy.tokenizer.decode, eos_token_ids=ends)
            return own

    def questions(self) -> dict[str, str]:
        """What the arms are asked, by example id."""
        return {row["id"]: self.task.prompt(row) for row in self.rows("test")}

    def test_set(self) -> TestSet:
        """The held-out examples, as every arm is asked them.

        Raises:
            UserError: rows or tokenizer can't be read, or a row can't be asked.
        """
        rows, config = self.rows("test"), self.config
        with together("rendering the test prompts"):
            return make_test_set(rows, self.task, load_tokenizer(config.model), config.data, config.calibrate)

    def policy(self) -> Policy:
        """The untouched policy, frozen: sharded under ZeRO-3, loaded once for the stages that only read it."""
        if self._policy is None:
            self._policy = load_policy(self.config.model, self.config.distributed, self.world)
        return self._policy

    def release_policy(self) -> None:
        """Forget the policy, for a stage that changes weights or needs the memory."""
        if self._policy is not None:
            self._policy.release()
            self._policy = None

    def policy_of(self, arm: Arm) -> Policy:
        """The policy that answers for an arm: its student whole on every rank, or the untouched policy."""
        if not arm.trains:
            return self.policy()
        self.release_policy()
        student = self.folder.folder(arm.stage("finetune"))
        if self.config_of(arm).finetune.mode == "lora":
            return load_replica(self.config.model, self.config.distributed, self.world, adapter=student / "adapter")
        model = dataclasses.replace(self.config.model, name=str(student / "model"), revision=None)
        return load_policy(model, self.config.distributed, self.world)

    def do(
        self,
        stage: str,
        inputs: dict[str, str],
        outputs: Iterable[str],
        work: Callable[[Path], dict[str, Any] | None],
        *,
        wanted: bool = True,
    ) -> None:
        """Run a stage in its folder, and write its manifest: unless it is complete, made from the same inputs.

        Raises:
            DataError: it is not complete, and not among the stages that were asked for.
            StopRequested: between two stages, if the run was asked to stop.
        """
        if self.folder.is_complete(stage, inputs):
            return
        if not wanted:
            verb = stage.split("/")[-1]
            raise DataError(f"{self.folder.folder(stage)} is not complete; run that stage first: --from {verb}")
        self.stop_if_asked()
        self.heartbeat.beat(f"{stage}, its start", now=True)
        began = time.monotonic()
        folder = self.folder.start(stage, inputs)
        extra = work(folder)
        if extra is not None and not extra.get("is_complete", True):
            log.info("%s: this task of the array is done, others are not", stage)
            return
        seconds = time.monotonic() - began
        self.folder.finish(stage, inputs, outputs, seconds=seconds, extra=extra)
        log.info("%s: complete, %.1f s", stage, seconds)

    def settings(self, *names: str, arm: Arm | None = None) -> str:
        """The hash of the settings of these sections and keys that results depend on, as an arm has them.

        Of a later round's model, the path says nothing: it is the student of the round before.
        """
        found = settings_hash(self.plain if arm is None else dataclasses.asdict(self.config_of(arm)), *names)
        return content_hash([found, self._student_before]) if "model" in names and self._student_before else found

    def progress(self, stage: str, total: int | None, unit: str) -> Progress:
        """A counter whose lines and metrics carry the stage's name. Where ranks decode, it heeds requests to stop."""
        stops_alone = stage in ("generate", "evaluate")

        def after_unit(place: str) -> None:
            self.heartbeat.beat(place)
            if stops_alone:
                self.stop_alone()

        self.heartbeat.beat(f"{stage}, before its first unit", now=True)
        every_seconds = self.config.metrics.progress_seconds
        return Progress(stage, total, unit, self.metrics, every_seconds=every_seconds, check=after_unit)

    def metrics_of(self, arm: Arm) -> MetricLogger:
        """The metrics; names of other arms than the method's own carry the arm's name."""
        return self.metrics if arm.name == "spd" else self.metrics.labelled(arm.name)

    def facts_of(self, arm: Arm) -> dict[str, str]:
        """What a student's model card says of the run that it comes from."""
        settings = self.settings(*(name for name in self.plain if name not in ("run_dir", "rounds", "metrics")))
        return {"arm": f"{arm.name}: {arm.sentence}", "task": self.task.name, "config hash": settings[:16]}

    def should_stop(self) -> bool:
        """Whether any rank was asked to stop: all ranks hear the same, so that they stop at the same unit."""
        return self._request_to_stop() is not None

    def _request_to_stop(self) -> str | None:
        """The first rank's reason, on every rank."""
        own = self.signals.reason(*self.stop_files)
        return next(filter(None, gather_objects(own))) if any_rank(own is not None) else None

    def stop_alone(self) -> None:
        """Raise `StopRequested` on this rank if it was asked to stop, and ask the others: not within a collective."""
        reason = self.signals.reason(*self.stop_files)
        if reason is not None:
            self.stop_files[-1].write_text(f"{reason}\n")
            raise StopRequested(f"stopped on request ({reason}); start the same command again to go on")

    def stop_if_asked(self) -> None:
        """Raise `StopRequested` on every rank if any was asked to stop."""
        reason = self._request_to_stop()
        if reason is not None:
            stop = StopRequested(f"stopped on request ({reason}); start the same command again to go on")
            stop.is_shared = True
            raise stop


def able_to_judge(task: Task, *, allowed: bool) -> Task:
    """The task, with a sandbox on this machine if it is scored by running programs.

    Raises:
        ConfigError: that isn't allowed, or no sandbox holds on this machine.
    """
    if not runs_code(task):
        return task
    if not allowed:
        raise refusal(task.name)
    return with_execution(task, open_sandbox().passes)
