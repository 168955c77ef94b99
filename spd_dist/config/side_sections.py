"""Settings beside the method's verbs: the mechanism test, the processes that share a run, and where numbers go."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from spd_dist.config.setting import setting


@dataclass(frozen=True)
class Mechanism:
    """Whether the subspace carries correctness: gold answers' likelihood under projections; nothing is sampled."""

    num_rows: int = setting(100, "held-out rows, the first of the test split that are not calibrated on", at_least=2)
    num_random: int = setting(20, "random subspaces of the same rank, that the subspace is ranked among", at_least=1)
    num_equal_energy: int = setting(5, "others that hold as much of the activations' energy", at_least=0)
    kinds: Literal["key", "value", "both"] = setting("key", "what is projected in the primary comparison")
    fraction: float | None = setting(None, "rank as a share of the width; the run's if not given", above=0, at_most=1)
    operator: Literal["hard", "soft", "blend"] = setting("hard", "as project.mode")
    rho: float = setting(0.0, "as project.rho", at_least=0, at_most=1)
    prompts: tuple[Literal["task", "bare"], ...] = setting(
        ("task", "bare"), "the primary form first; bare: no template"
    )
    controls: tuple[str, ...] = setting(("all",), "other subspaces: all, or names of docs/mechanism.md")
    other_subspace: str | None = setting(None, "another task's run folder or subspace.safetensors, as a control")
    explore: tuple[str, ...] = setting((), "further comparisons, as kinds=value@fraction=0.25; layers=15 is a layer")
    num_explored_rows: int = setting(40, "rows of these, and of further prompts", at_least=2)
    num_explored_random: int = setting(20, "random subspaces of these", at_least=1)
    doses: tuple[float, ...] = setting((0.25, 0.5), "shares of the projection, between none and all, that are drawn")
    num_generated: int = setting(0, "rows that are answered, too, to compare effects with accuracy", at_least=0)
    kl_positions: int = setting(16, "positions of prompt and of solution at which divergence is taken", at_least=1)
    batch_size: int = setting(8, "rows a pass", at_least=1)
    share_prefix: bool = setting(True, "run the layers below the lowest projected one once for all subspaces")
    in_run: bool = setting(False, "measure it at the end of a run, too")


@dataclass(frozen=True)
class Distributed:
    """The processes that share the run."""

    zero_stage: Literal[0, 1, 2, 3] = setting(3, "3 shards parameters in every stage; 0 to 2 in none")
    timeout_seconds: float = setting(1800.0, "a collective that takes longer fails the run", above=0)
    time_limit_seconds: float | None = setting(
        None, "stop so long after the start; the SLURM job's if not given", above=0
    )
    time_margin_seconds: float = setting(120.0, "before the limit: time for the last unit and its files", at_least=0)
    threads: int | None = setting(None, "CPU threads a rank; cores over local ranks if not given", at_least=1)
    interface: str | None = setting(None, "network interface for NCCL and gloo, as `ip address` names it")
    deepspeed: dict[str, Any] = setting({}, "DeepSpeed settings beside ours; a conflict is an error")


@dataclass(frozen=True)
class Metrics:
    """Where numbers go: JSONL always, Weights & Biases from rank 0."""

    wandb: Literal["auto", "online", "offline", "disabled"] = setting("auto", "auto: online if it can be, else offline")
    project: str = setting("spd", "W&B project")
    entity: str | None = setting(None, "W&B entity")
    experiment: str | None = setting(None, "name in front of the config hash; the run folder's if not given")
    progress_seconds: float = setting(30.0, "between two lines of progress in a log file; a terminal has bars", above=0)
