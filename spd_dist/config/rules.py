"""Rules of the config that tie several fields together; each error names the keys, and what to set instead."""

from __future__ import annotations

from spd_dist.config.sections import Generate, engine_of
from spd_dist.config.whole import Config
from spd_dist.errors import ConfigError


def check_across_fields(config: Config) -> None:
    """Refuse what does not go together.

    Raises:
        ConfigError: two fields that are each valid, and not together.
    """
    if config.project.rank_rule == "fixed" and config.project.rank is None:
        raise ConfigError("project.rank: None is not valid with project.rank_rule=fixed; set project.rank=N")
    if config.evaluate.num_samples > 1 and config.evaluate.temperature == 0:
        raise ConfigError(
            f"evaluate.num_samples: {config.evaluate.num_samples} is not valid with evaluate.temperature=0, since all "
            "of them would be the same; set evaluate.temperature=0.8"
        )
    if config.data.template == "plain" and (config.data.system is not None or config.data.template_options):
        rule = "not valid with data.template=plain; set data.template=chat"
        raise ConfigError(f"data.system, data.template_options: {rule}")
    if not config.finetune.validation_fraction and (config.finetune.keep_best or config.finetune.patience is not None):
        raise ConfigError(
            "finetune.keep_best, finetune.patience: not valid with finetune.validation_fraction=0, since they follow "
            "the validation loss; set finetune.validation_fraction=0.05"
        )
    if (config.finetune.keep_every or 0) % config.finetune.checkpoint_every:
        raise ConfigError(
            f"finetune.keep_every: {config.finetune.keep_every} is not valid; it must be a multiple of "
            f"finetune.checkpoint_every={config.finetune.checkpoint_every}"
        )
    if len(config.data.thinking_marks) not in (0, 2) or "" in config.data.thinking_marks:
        raise ConfigError(
            f"data.thinking_marks: {list(config.data.thinking_marks)} is not valid; give the two marks of a thought, "
            "as in ['<think>','</think>']"
        )
    if not config.calibrate.layers:
        raise ConfigError("calibrate.layers: an empty list is not valid; name at least one layer, as in [middle,last]")
    _check_generate(config.generate)


def _check_generate(generate: Generate) -> None:
    """Rules that tie two fields of the section together."""
    if generate.task_index >= generate.num_tasks:
        raise ConfigError(
            f"generate.task_index: {generate.task_index} is out of bounds; "
            f"it must be below generate.num_tasks={generate.num_tasks}"
        )
    engine = engine_of(generate.engine, generate.vllm_python, generate.command)
    if generate.batch_invariant and engine != "hf":
        raise ConfigError(
            f"generate.batch_invariant: true is not valid with generate.engine={engine}, whose batches are its own; "
            "set generate.engine=hf, or generate.batch_invariant=false"
        )
    for section, needs in {"vllm": "vllm_python", "command": "command"}.items():
        if generate.engine == section and getattr(generate, needs) is None:
            raise ConfigError(
                f"generate.{needs}: None is not valid with generate.engine={section}; set generate.{needs}"
            )
