"""The engines by name: how each is checked and opened. To add one: its class, and its row in `ENGINES`."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

from spd_dist.config import Generate, Model, planned_rows
from spd_dist.distributed.uneven_work import on_main, wait_for_all_ranks
from spd_dist.distributed.world import World
from spd_dist.errors import ConfigError
from spd_dist.inference.compiled_pass import CompiledPass, stays_plain
from spd_dist.inference.engine_probes import References
from spd_dist.inference.external.external_engine import ExternalEngine, command_of, environment_of
from spd_dist.inference.external.server_engine import ServerEngine, check_server
from spd_dist.inference.external.vllm_engine import VLLMEngine, check_vllm, vllm_environment, vllm_settings
from spd_dist.inference.external.vllm_process import EnginePool
from spd_dist.inference.hf_engines import ContinuousBatchingEngine, HFEngine
from spd_dist.inference.placement import Placement
from spd_dist.inference.requests import Contrast, Decoded, Request
from spd_dist.inference.sampling import Sampling
from spd_dist.models.policy import Policy
from spd_dist.models.save_weights import save_model, stored_parameters, whole_tensors
from spd_dist.projection.hooks import ProjectionMonitor, projected
from spd_dist.types import Projection


class Engine(Protocol):
    """The seam: prompts in, completions out as they finish."""

    name: str

    def complete(self, requests: Sequence[Request], sampling: Sampling) -> Generator[Decoded, None, None]:
        """Answer the requests, in any order. To close it ends what is at work."""
        ...


class Idle:
    """The engine of a rank that has nothing to ask: of one whose device serves another rank's engine."""

    def __init__(self, name: str) -> None:
        self.name = name

    def complete(self, requests: Sequence[Request], sampling: Sampling) -> Generator[Decoded, None, None]:
        """Nothing: there is no request."""
        assert not requests
        yield from ()


@dataclass(frozen=True)
class EngineWork:
    """What an engine is opened for."""

    requests: Sequence[Request]
    """This rank's; some are its probes. A rank without any starts no engine."""
    longest: Request
    """That with the longest prompt of the whole corpus."""
    scratch: Path
    """A folder for the files of an engine with a process of its own; removed at the end."""
    section: str = "generate"
    """The config's that asks for it, for messages."""
    arm: str = "spd"
    """For which it works: a server has a name for each."""
    pool: EnginePool | None = None
    """Where an engine that later work can use, too, is kept; without it, it ends with this work."""


class Opened(NamedTuple):
    """An engine that runs the projected policy."""

    engine: Engine
    placement: str
    monitor: ProjectionMonitor | None
    """Calls and leakage of the projection: in the engine itself, or in the reference that it agreed with."""
    num_starts: int = 0
    """Processes that were started for it on this rank."""
    batch_size: int = 0
    """Rows that are decoded together at most; 0 of an engine that decides by itself."""

    def projection_seen(self) -> tuple[dict[str, int], float | None]:
        """How often each site was projected, and the largest leakage; nothing without a projection.

        In vLLM it is tokens; what compiled passes project is not counted.

        Raises:
            DataError: an engine that left the projection out of some tokens.
        """
        if isinstance(self.engine, VLLMEngine) and self.engine.projection is not None:
            return self.engine.seen()
        if self.monitor is None:
            return {}, None
        return {str(site): count for site, count in self.monitor.calls.items()}, self.monitor.leakage()


@dataclass(frozen=True)
class EngineSetup:
    """What an engine is made of."""

    policy: Policy
    """In this process: held to the projection already, where `in_process` says so."""
    projection: Projection | None
    config: Generate
    """The section, with the engine's name."""
    world: World
    work: EngineWork
    placement: Placement
    expected: References
    """Answers of the projected policy, to compare with; none yet when the setup is checked."""
    monitor: ProjectionMonitor | None = None
    """Of the policy in this process; else of the reference."""

    @property
    def label(self) -> str:
        """The setting that asks for it, for messages."""
        return f"{self.work.section}.engine={self.config.engine}"

    @property
    def max_length(self) -> int:
        """Of a prompt with its completion, in tokens."""
        return len(self.work.longest.tokens) + self.config.max_new_tokens

    @property
    def folder(self) -> Path:
        """For this rank's files."""
        return self.work.scratch / f"rank-{self.world.rank:05d}"

    def opened(self, engine: Engine, num_starts: int = 0) -> Opened:
        """The engine as the stages take it."""
        if ENGINES[self.config.engine].in_process:
            return Opened(engine, self.placement, self.monitor, num_starts, planned_rows(self.config.batch_size))
        return Opened(engine, "external", self.monitor, num_starts)


def _nothing(setup: EngineSetup) -> None:
    """Nothing to do."""


class EngineKind(NamedTuple):
    """A row of `ENGINES`."""

    open: Callable[[EngineSetup, ExitStack], Opened]
    """Opens it; the stack closes what it needs. A collective, but for what one rank alone does within it."""
    repeats: str
    """What a second run of it repeats."""
    in_process: bool = False
    """It calls the policy itself, which the projection is put on for it."""
    check: Callable[[EngineSetup], None] = _nothing
    """Refuses settings that can't be met, before anything is done."""
    prepare: Callable[[EngineSetup], None] = _nothing
    """Begins what may go on while the policy answers the probes."""


def _open_hf(setup: EngineSetup, stack: ExitStack) -> Opened:
    fixed_columns, beta = setup.max_length if setup.config.batch_invariant else None, setup.config.contrast
    held = setup.monitor if beta != 1 else None
    compiled = CompiledPass(setup.policy.model) if setup.config.compile and setup.placement == "replica" else None
    if compiled is not None:
        stack.callback(compiled.close)
    elif setup.config.compile:
        stays_plain("the weights come from shards, layer by layer")
    return setup.opened(
        HFEngine(
            setup.policy,
            planned_rows(setup.config.batch_size),
            fixed_columns,
            setup.monitor,
            setup.placement,
            setup.work.section,
            contrast=None if held is None else Contrast(beta, held.paused),
            compiled=compiled,
        )
    )


def _open_hf_cb(setup: EngineSetup, stack: ExitStack) -> Opened:
    engine = ContinuousBatchingEngine(
        setup.policy, planned_rows(setup.config.batch_size), setup.monitor, setup.work.section
    )
    return setup.opened(engine)


def _check_hf_cb(setup: EngineSetup) -> None:
    if setup.placement == "layerwise":
        raise ConfigError(f"{setup.label} needs whole weights on each rank; set {setup.work.section}.placement=replica")


def _open_server(setup: EngineSetup, stack: ExitStack) -> Opened:
    stack.enter_context(wait_for_all_ranks("the server at work"))
    engine = ServerEngine(setup.policy, setup.config, setup.work.arm, setup.world, setup.label)
    engine.verify(setup.expected)
    return setup.opened(engine)


def _check_server(setup: EngineSetup) -> None:
    check_server(setup.config.server, setup.work.arm, setup.projection)


def _open_command(setup: EngineSetup, stack: ExitStack) -> Opened:
    policy = setup.policy
    model = policy.origin
    if model is None or policy.adapter is None:
        model = _exported_model(setup, stack)
    stack.enter_context(wait_for_all_ranks("command at work"))
    if not setup.work.requests:
        return setup.opened(Idle("command"))
    command = command_of(setup.config.command, model.name, policy.adapter)
    return setup.opened(ExternalEngine(setup.label, command, policy, setup.folder, environment_of(setup.world)))


def _check_command(setup: EngineSetup) -> None:
    command_of(setup.config.command, setup.work.scratch, setup.policy.adapter)


def _open_vllm(setup: EngineSetup, stack: ExitStack) -> Opened:
    policy, config, world = setup.policy, setup.config, setup.world
    model = policy.origin
    held = setup.projection if config.apply_as == "hook" and model is not None else None
    if model is None or (policy.adapter is None and setup.projection is not held):
        model = _exported_model(setup, stack)
    stack.enter_context(wait_for_all_ranks("vllm at work"))
    if not setup.work.requests:
        return setup.opened(Idle("vllm"))
    pool = setup.work.pool or stack.enter_context(EnginePool().closed_at_the_end())
    settings = vllm_settings(policy, model, held, config, pool, setup.max_length)
    process = pool.of(config, settings, setup.folder, vllm_environment(config, world))
    return setup.opened(VLLMEngine(process, policy, held, setup.label), pool.new_starts())


def _prepare_vllm(setup: EngineSetup) -> None:
    if setup.work.pool is not None and setup.work.requests:
        setup.work.pool.prepare(setup.config, setup.folder, vllm_environment(setup.config, setup.world))


def _check_vllm(setup: EngineSetup) -> None:
    check_vllm(setup.config, setup.policy, setup.world)


def _exported_model(setup: EngineSetup, stack: ExitStack) -> Model:
    folder = exported(setup.policy, setup.projection, setup.work.scratch / "model", setup.world)
    return Model(str(stack.enter_context(folder)))


@contextmanager
def exported(policy: Policy, projection: Projection | None, folder: Path, world: World) -> Generator[Path]:
    """The projected policy as a model folder that any engine loads, removed at the end. A collective."""
    on_main("making room for the exported policy", lambda: shutil.rmtree(folder.parent, ignore_errors=True))
    tensors = whole_tensors(stored_parameters(policy.model))
    if projection is None:
        save_model(policy.model, tensors, folder, world=world)
    else:
        with projected(policy.model, projection, "fold"):
            save_model(policy.model, tensors, folder, world=world)
    on_main("saving the tokenizer", lambda: policy.tokenizer.save_pretrained(folder))
    try:
        yield folder
    finally:
        if world.is_main:
            shutil.rmtree(folder, ignore_errors=True)


ENGINES: Mapping[str, EngineKind] = {
    "hf": EngineKind(
        _open_hf,
        "each its own, by its seed: in float32 the same in every batch, in 16 bits with generate.batch_invariant",
        in_process=True,
    ),
    "hf_cb": EngineKind(
        _open_hf_cb, "drawn together: the same in distribution only", in_process=True, check=_check_hf_cb
    ),
    "vllm": EngineKind(
        _open_vllm,
        "each its own, by its seed: the same up to how the engine rounds in a batch",
        check=_check_vllm,
        prepare=_prepare_vllm,
    ),
    "server": EngineKind(
        _open_server,
        "each its own, by its seed: the same up to how the server rounds in a batch",
        check=_check_server,
    ),
    "command": EngineKind(_open_command, "as the program draws them", check=_check_command),
}
"""By what `generate.engine` calls it (`config/engines.py`), but `auto`, which takes one of them."""
