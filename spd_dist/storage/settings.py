"""The settings that results depend on, what differs between two configs, and which stage reads what."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from spd_dist.config import STAGES, engine_of
from spd_dist.storage.artifacts import content_hash
from spd_dist.types import Json

CHANGES_NO_RESULT = (
    "run_dir",
    "rounds",  # more rounds, arms or temperatures are more results, and each of them stays as it is
    "evaluate.arms",
    "evaluate.temperatures",
    "metrics",
    "model.cache_dir",
    "calibrate.batch_size",
    "calibrate.checkpointing",
    "generate.placement",
    "generate.batch_size",
    "generate.compile",
    "generate.num_tasks",
    "generate.task_index",
    "generate.vllm_python",
    "generate.tensor_parallel",
    "generate.pipeline_parallel",
    "generate.server",
    "generate.engine_timeout_seconds",
    "generate.max_empty_rate",
    "generate.max_repetition_rate",
    "generate.max_length_rate",
    "generate.max_unfinished_rate",
    "finetune.micro_batch_size",
    "finetune.checkpointing",
    "finetune.offload_activations",
    "finetune.checkpoint_every",
    "finetune.keep_checkpoints",
    "finetune.keep_every",
    "finetune.packing",
    "finetune.merge",
    "evaluate.allow_code_execution",
    "evaluate.batch_size",
    "evaluate.placement",
    "mechanism.batch_size",
    "mechanism.share_prefix",
    "mechanism.in_run",
    "distributed.zero_stage",
    "distributed.timeout_seconds",
    "distributed.time_limit_seconds",
    "distributed.time_margin_seconds",
    "distributed.threads",
    "distributed.interface",
)
"""Config keys, or whole sections, that change no result of any stage."""
OF_SOME_ARMS = ("finetune.divergence", "finetune.num_on_policy_iterations", "project.match_kl")
"""Keys that change results of the arms that read them, among whose stages' inputs they are."""
BESIDE_THE_METHOD = ("mechanism", "evaluate.num_coloured")
"""What changes results of stages beside the method alone, among whose inputs it is: no arm answers otherwise."""
MAY_CHANGE = (*CHANGES_NO_RESULT, *OF_SOME_ARMS, *BESIDE_THE_METHOD)
"""What may differ when a run goes on: no result depends on it, or the stages that read it are done again."""

ENGINE_KEYS = ("generate.engine", "generate.vllm_python", "generate.command")
"""What decides the engine; of these, the interpreter's path may change while the engine is the same."""
CUT = ("directions", "rank_rule", "rank", "fraction", "energy", "centered", "insertion")
"""Settings of `project` that shape the subspace; the others say what is done with it."""
READ_BY = {
    "project": ("model", "data", "calibrate", "sketch", "reduce", *(f"project.{name}" for name in CUT)),
    "generate": ("seed", "model", "data", "generate", "project"),
    "finetune": ("seed", "model", "data.thinking", "data.thinking_marks", "finetune"),
    "evaluate": ("seed", "model", "data", "choices", "evaluate"),
}
"""A stage's folder: the sections and keys of the config that its own work reads, in the order in which stages run."""


def result_settings(config: Mapping[str, Json]) -> dict[str, Json]:
    """The settings that results depend on, by dotted key.

    All but `CHANGES_NO_RESULT`; of these the engine that `auto` takes, and the batch size if it fixes the shapes.
    """
    return _all_but(CHANGES_NO_RESULT, config)


def fixed_settings(config: Mapping[str, Json]) -> dict[str, Json]:
    """The settings that stay the same when a run goes on: of those that results depend on, all but `MAY_CHANGE`."""
    return _all_but(MAY_CHANGE, config)


def _all_but(names: Iterable[str], config: Mapping[str, Json]) -> dict[str, Json]:
    flat = settings_by_key(config)
    if "generate.engine" in flat:
        engine, vllm_python, command = (_text(flat.get(key)) for key in ENGINE_KEYS)
        flat["generate.engine"] = engine_of(str(engine), vllm_python, command)
    if "evaluate.engine" in flat:
        flat["evaluate.engine"] = engine_of(str(flat["evaluate.engine"]), _text(flat.get(ENGINE_KEYS[1])), None)
    sections = [name for name in ("generate", "evaluate") if flat.get(f"{name}.batch_invariant")]
    shapes = [f"{name}.batch_size" for name in sections]
    return {key: value for key, value in flat.items() if key in shapes or not is_of(key, names)}


def _text(value: Json) -> str | None:
    return None if value is None else str(value)


def settings_hash(config: Mapping[str, Json], *names: str) -> str:
    """The hash that stages have among their inputs: of `fixed_settings`, these sections and keys (`project.rank`)."""
    settings = fixed_settings(config)
    return content_hash({key: value for key, value in settings.items() if is_of(key, names)})


def settings_by_key(config: Mapping[str, Json], prefix: str = "") -> dict[str, Json]:
    """Values by dotted key; tuples as lists, which is what YAML gives back."""
    flat: dict[str, Json] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            flat |= settings_by_key(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = list(value) if isinstance(value, tuple) else value
    return flat


def folder_of(stage: str) -> str:
    """The folder that a stage fills: the first four fill one."""
    return stage if stage in READ_BY else "project"


def is_of(key: str, names: Iterable[str]) -> bool:
    """Whether a dotted key is one of `names`, or in a section that is."""
    return any(key == name or key.startswith(f"{name}.") for name in names)


def changed(before: Mapping[str, Json], after: Mapping[str, Json]) -> dict[str, str]:
    """The keys whose values differ, each with a sentence that names both."""
    keys = sorted(before.keys() | after.keys())
    both = {key: (before.get(key), after.get(key)) for key in keys}
    return {key: f"{key} is {old!r} there and {new!r} now" for key, (old, new) in both.items() if old != new}


def first_reader(keys: Iterable[str]) -> str:
    """The first stage whose work reads one of the keys; the last one if none does."""
    keys = list(keys)
    found = (folder for folder, names in READ_BY.items() if any(is_of(key, names) for key in keys))
    folder = next(found, STAGES[-1])
    return STAGES[0] if folder == "project" else folder
