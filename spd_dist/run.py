"""A run in motion: its folder, its data, its policy, and the rule by which a stage is done once."""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable, Generator, Hashable, Iterable, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from spd_dist.arms import Arm, Scope
from spd_dist.card_facts import student_facts
from spd_dist.config import Config, Data
from spd_dist.data.prompts import TestSet, make_test_set
from spd_dist.data.readers import fetch_from_hub, use_files
from spd_dist.data.sources import hub_keys, load_rows
from spd_dist.data.tasks import Task, find_task, said_by_file
from spd_dist.data.tasks.protocol import Row, Split
from spd_dist.distributed.collectives import gather_objects, max_over_ranks, together
from spd_dist.distributed.heartbeat import Heartbeat, naming_lagging_ranks, telling_of_silence
from spd_dist.distributed.memory import give_back_free_memory, peak_bytes, reset_peak_memory
from spd_dist.distributed.uneven_work import on_each_host, on_main
from spd_dist.distributed.world import World
from spd_dist.errors import DataError, named_path
from spd_dist.inference.external.vllm_process import EnginePool
from spd_dist.inference.placement import load_to_answer
from spd_dist.judging import able_to_judge, other_test
from spd_dist.models.checkpoint_files import sampled_hash
from spd_dist.models.policy import Policy, load_policy, load_tokenizer, prepare_model
from spd_dist.overrides import config_of_arm
from spd_dist.process.signals import StopSignals, task_name
from spd_dist.process.stopping import Stopping
from spd_dist.redaction import settings_of
from spd_dist.stages.context import StageContext
from spd_dist.storage.artifacts import content_hash
from spd_dist.storage.attempts import AttemptClock, stage_cost
from spd_dist.storage.manifests import MANIFEST, hash_of, read_manifest
from spd_dist.storage.restart import kept_status, status_path
from spd_dist.storage.run_folder import RunFolder
from spd_dist.storage.settings import result_settings, settings_hash
from spd_dist.tracking.metrics import MetricLogger
from spd_dist.tracking.progress import Progress, ProgressReports, RunEstimate
from spd_dist.tracking.stage_outputs import job_type, product_of, show_stage
from spd_dist.tracking.wandb_mirror import open_mirror

log = logging.getLogger(__name__)
T = TypeVar("T")

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


class Run:
    """What the stages of one run share. Every method but `progress` is a collective."""

    def __init__(
        self,
        config: Config,
        world: World,
        signals: StopSignals,
        scope: Scope,
        *,
        rounds_before: Sequence[Path] = (),
    ) -> None:
        """Open the run folder and the metrics for a part of a run.

        `rounds_before` are the folders of earlier rounds, if this is a later one.

        Raises:
            ConfigError: the folder holds a run of another config, `data.task` is unknown, or it is scored by running
                programs and that isn't allowed, or no sandbox holds on this machine.
        """
        self.config, self.world, self.scope = config, world, scope
        self.job = scope.job or job_type(scope.first, scope.last)
        self.plain = settings_of(config)
        self.folder = RunFolder(config.run_dir, self.plain, world, job=scope.job, others=scope.others)
        self.task_index = config.generate.task_index if config.generate.num_tasks > 1 else None
        self.stopping = Stopping(signals, self.folder.workplace(""), self.task_index, config.distributed)
        with together("finding the task"):
            self.task = find_task(config.data.task)
            if scope.last == "evaluate":
                self.task = able_to_judge(self.task, allowed=config.evaluate.allow_code_execution)
        self.part = scope.job or ("" if self.task_index is None else task_name(self.task_index))
        prefix, metrics = f"{self.part}_" if self.part else "", self.folder.path / "metrics"
        opening = functools.partial(open_mirror, config.metrics, self.folder.path, self.plain, job=self.job)
        self.metrics = MetricLogger(metrics, world.rank, opening=opening if world.is_main else None, prefix=prefix)
        self.heartbeat = Heartbeat(self.folder.path / "heartbeat" / self.part, world)
        self.engines = EnginePool(self.folder.workplace("") / "engines" / f"rank-{world.rank:05d}")
        self._rows: dict[Split, Sequence[Row]] = {}
        self._policy: Policy | None = None
        self._holds_student = False
        self.rounds_before = tuple(rounds_before)
        self._named = on_main("reading the files that the config names", self._hash_named)
        self._memoized: dict[Hashable, Any] = {}
        self.estimate = RunEstimate()

    @contextmanager
    def opened(self) -> Generator[None]:
        """Run stages in here: a collective that fails or hangs says where ranks are."""
        telling = telling_of_silence(self.heartbeat, self.config.distributed.timeout_seconds)
        with self.metrics, telling, naming_lagging_ranks(self.heartbeat), self.engines.closed_at_the_end():
            yield

    def kept_status(self) -> AbstractContextManager[None]:
        """Within, `status.json` says how the run up to its last stage stands; each of several jobs has its own."""
        return kept_status(status_path(self.folder.path, self.part), self.heartbeat, self.scope.last)

    def rows(self, split: Split) -> Sequence[Row]:
        """The rows of a split, the same on every rank.

        Raises:
            DataError: they can't be read.
        """
        if split not in self._rows:
            self._rows[split] = read_together(self.task, split, self.config.data)
        return self._rows[split]

    def _hash_named(self) -> dict[str, str]:
        """Of what words of the config name, by its section: a task's file, and a model's, or the round's before."""
        found = {section: content_hash(said) for section, said in said_by_file(self.task).items()}
        path = named_path(self.config.model.name)
        if self.rounds_before:
            found["model"] = hash_of(read_manifest(self.rounds_before[-1] / "finetune"))
        elif path.exists():
            found["model"] = sampled_hash(path)
        return found

    def memoize(self, key: Hashable, make: Callable[[], T]) -> T:
        """What `make` gave when it was first called with this key: for work that several stages of this run share."""
        if key not in self._memoized:
            self._memoized[key] = make()
        return self._memoized[key]

    def config_of(self, arm: Arm) -> Config:
        """The config as one arm has it."""
        return self.memoize(arm, lambda: config_of_arm(self.config, arm))

    def earlier(self, stage: str) -> list[tuple[int, Path]]:
        """The folders of a stage in the rounds before, by their numbers; of those that did it."""
        folders = enumerate((path / stage for path in self.rounds_before), 1)
        return [(number, folder) for number, folder in folders if (folder / MANIFEST).exists()]

    def test_set(self, other: str | None = None) -> TestSet:
        """The held-out examples, as every arm is asked them; of a word of `evaluate.also`, if one is given.

        Raises:
            UserError: rows or tokenizer can't be read, or a row can't be asked.
        """
        prepare_model(self.config.model)
        task, rows = (self.task, self.rows("test")) if other is None else self.other_test(other)
        with together("rendering the test prompts"):
            return make_test_set(rows, task, load_tokenizer(self.config.model), self.config)

    def other_test(self, word: str) -> tuple[Task, Sequence[Row]]:
        """The task and the rows of a word of `evaluate.also`."""
        with together(f"reading the rows of {word}"):
            return self.memoize(("also", word), lambda: other_test(word, self.config))

    def policy(self) -> Policy:
        """The untouched policy, frozen: sharded under ZeRO-3, loaded once for the stages that only read it."""
        if self._policy is None or self._holds_student:
            self.release_policy()
            self._policy = load_policy(self.config.model, self.config.distributed, self.world)
        return self._policy

    def hold_student(self, load: Callable[[], Policy]) -> Policy:
        """A student, in the place of the untouched policy until that one is asked for again."""
        self.release_policy()
        self._policy, self._holds_student = load(), True
        return self._policy

    def release_policy(self) -> None:
        """Forget the policy, for a stage that changes weights or needs the memory."""
        if self._policy is not None:
            self._policy.release()
        self._policy, self._holds_student = None, False

    def policy_of(self, arm: Arm, test_set: TestSet) -> Policy:
        """The policy that answers for an arm: the untouched one, or its student, whole on every rank if that fits."""
        if not arm.trains:
            return self.policy()
        config, world, student = self.config, self.world, self.folder.folder(arm.stage("finetune"))
        if self.config_of(arm).finetune.mode == "lora":
            adapter, longest = student / "adapter", test_set.longest
            return self.hold_student(lambda: load_to_answer(config, world, adapter=adapter, longest=longest))
        model = dataclasses.replace(config.model, name=str(student / "model"), revision=None)
        return self.hold_student(lambda: load_policy(model, config.distributed, world))

    def run_stage(
        self,
        stage: str,
        inputs: dict[str, str],
        outputs: Iterable[str],
        work: Callable[[Path], DataclassInstance | None],
        *,
        wanted: bool = True,
    ) -> None:
        """Run a stage in its folder, and write its manifest: unless it is complete, made from the same inputs.

        Raises:
            DataError: it is not complete, and not among the stages that were asked for.
            StopRequested: between two stages, if the run was asked to stop.
        """
        if self.folder.is_complete(stage, inputs):
            self.estimate.finish(stage)
            self._show(stage, is_input=True)
            return
        if not wanted:
            verb = stage.split("/")[-1]
            raise DataError(f"{self.folder.folder(stage)} is not complete; run that stage first: --from {verb}")
        self.stopping.stop_if_asked()
        self.heartbeat.beat(f"{stage}, its start", now=True)
        reset_peak_memory(self.world)
        self.estimate.now = stage
        folder = self.folder.start(stage, inputs)
        with AttemptClock(folder, self.world, self.task_index):
            result = work(folder)
            give_back_free_memory()
        self.estimate.finish(stage)
        described = {} if result is None else dataclasses.asdict(result)
        if not described.get("is_complete", True):
            log.info("%s: this task of the array is done, others are not", stage)
            return
        more = described | {"peak_memory_gib": round(max_over_ranks(peak_bytes(self.world)) / 2**30, 3)}
        cost = on_main(f"adding up {stage}", lambda: stage_cost(folder))
        self.folder.finish(stage, inputs, outputs, seconds=cost.seconds, device_seconds=cost.device_seconds, extra=more)
        self._show(stage, is_input=False)
        log.info("%s: complete, %.1f s", stage, cost.seconds)

    def _show(self, stage: str, *, is_input: bool) -> None:
        """Show what a stage made; or that this job goes on from it, unless it is one that makes everything."""
        metrics = self.metrics_of(stage.split("/")[1] if stage.startswith("arms/") else "spd")

        def show() -> None:
            if not is_input:
                show_stage(metrics, self.folder.path, stage)
            product = product_of(self.folder.path, stage)
            if product is not None and not (is_input and self.job == "pipeline"):
                self.metrics.product(product, is_input=is_input)

        on_main(f"showing what {stage} made", show)

    def settings(self, *names: str, arm: Arm | None = None) -> str:
        """The hash of what an arm's results depend on of these sections and keys, and of the files that they name."""
        found = settings_hash(self.plain if arm is None else settings_of(self.config_of(arm)), *names)
        named = [self._named[name] for name in names if name in self._named]
        return content_hash([found, *named]) if named else found

    def progress(self, stage: str, total: int | None, unit: str, arm: Arm | None = None) -> Progress:
        """A counter whose lines and metrics carry the stage's name, and the arm's."""
        self.heartbeat.beat(f"{stage}, before its first unit", now=True)
        unit, metrics = (unit, self.metrics) if arm is None else (f"{unit} of {arm.name}", self.metrics_of(arm.name))
        seconds = self.config.metrics.progress_seconds
        return Progress(stage, total, unit, ProgressReports(metrics, seconds, self.heartbeat.beat, self.estimate))

    def metrics_of(self, arm: str) -> MetricLogger:
        """The metrics; names of other arms than the method's own carry the arm's name."""
        return self.metrics if arm == "spd" else self.metrics.labelled(arm)

    def context(self, folder: Path, arm: Arm | None = None, progress: Progress | None = None) -> StageContext:
        """What a stage is told of this run; of the arm that it works for, if it is one arm's alone."""
        return StageContext(
            folder=folder,
            seed=self.config.seed,
            world=self.world,
            distributed=self.config.distributed,
            should_stop=self.stopping.should_stop,
            stop_if_asked=self.stopping.stop_if_asked,
            stop_alone=self.stopping.stop_alone,
            progress=progress,
            metrics=self.metrics if arm is None else self.metrics_of(arm.name),
            progress_seconds=self.config.metrics.progress_seconds,
            estimate=self.estimate,
            facts={} if arm is None else self.facts_of(arm),
            heartbeat=self.heartbeat,
            arm="spd" if arm is None else arm.name,
            generate=self.config.generate,
            engines=self.engines,
        )

    def facts_of(self, arm: Arm) -> dict[str, str]:
        """What a student's model card says of the run that it comes from."""
        settings = content_hash([result_settings(settings_of(self.config_of(arm))), self._named.get("model")])
        return student_facts(arm, self.config_of(arm)) | {"task": self.task.name, "config hash": settings[:16]}


def read_together(task: Task, split: Split, config: Data) -> Sequence[Row]:
    """The rows of a split on every rank; of a data set of the hub, one rank a host asks. A collective.

    Raises:
        DataError: they can't be read.
    """
    with together(f"looking for the {split} rows"):
        keys = hub_keys(task, split, config)
    if any(gather_objects(bool(keys))):  # a folder of that name may be on one host
        use_files(on_each_host(f"fetching the {split} rows", lambda: fetch_from_hub(keys)))
    with together(f"reading the {split} rows"):
        return load_rows(task, split, config)
