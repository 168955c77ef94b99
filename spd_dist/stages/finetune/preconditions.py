"""What must hold before a student is trained: its loss, what it begins as, and the weights that it begins from."""

from __future__ import annotations

from pathlib import Path

from spd_dist.config import Distributed, Finetune
from spd_dist.distributed.collectives import together
from spd_dist.distributed.frozen_weights import check_one_copy
from spd_dist.distributed.zero import weights_fingerprint
from spd_dist.errors import ConfigError, DataError
from spd_dist.models.lora import adapted_modules, check_subspace
from spd_dist.models.policy import Policy
from spd_dist.types import Projection, Subspace


def check_teacher(config: Finetune, projection: Projection | None, distributed: Distributed) -> None:
    """See that there is what a teacher is made of, where there is one, and nothing of it elsewhere.

    Raises:
        ConfigError: it is not so.
    """
    if (config.loss == "distil") != (projection is not None):
        found = "no projection was" if projection is None else "a projection was"
        raise ConfigError(
            f"finetune.loss: {config.loss} is not valid where {found} given, which is what a teacher is made of; "
            f"{'give one, or set finetune.loss=cross_entropy' if projection is None else 'set finetune.loss=distil'}"
        )
    if config.loss == "distil" and config.mode == "full":
        check_one_copy(distributed)


def check_start(policy: Policy, config: Finetune, start: Path | Subspace | None) -> None:
    """See that adapters can begin as they should: as a saved one, in a subspace, or anew.

    Raises:
        ConfigError: they cannot.
    """
    begins_in_subspace = config.mode == "lora" and config.lora_init == "spd"
    if not isinstance(start, Path) and begins_in_subspace != isinstance(start, Subspace):
        found, remedy = ("a subspace was", "give none")
        if start is None:
            found, remedy = "no subspace was", "give one, or set finetune.lora_init=default"
        raise ConfigError(
            f"finetune.lora_init: {config.lora_init} is not valid with finetune.mode={config.mode} where {found} "
            f"given, to begin in; {remedy}"
        )
    if isinstance(start, Path) and config.mode == "full":
        raise ConfigError(f"finetune.mode: full is not valid from the adapter {start}; set finetune.mode=lora")
    if isinstance(start, Subspace):
        check_subspace(start, adapted_modules(policy.model, config), config)


def check_untouched(policy: Policy) -> None:
    """See that the weights are as they were loaded. A collective.

    Raises:
        DataError: they are not.
    """
    policy.release()
    found = weights_fingerprint(policy.model)
    with together("checking the base weights"):
        if found != policy.fingerprint:
            raise DataError(
                f"model.name: the weights of {policy.name} changed since they were loaded, and fine-tuning starts from "
                "the untouched ones; load the policy again"
            )
