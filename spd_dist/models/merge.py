"""A student as a model of its own: the policy with an adapter merged into its weights, whole or sharded by ZeRO-3."""

from __future__ import annotations

import shutil
from pathlib import Path

from spd_dist.distributed.collectives import together
from spd_dist.distributed.world import World
from spd_dist.models.adapters import load_adapter, merged_tensors, remove_adapters
from spd_dist.models.policy import Policy
from spd_dist.models.save import save_model


def write_merged(policy: Policy, adapter: Path, folder: Path, world: World) -> None:
    """Write `policy` with `adapter` merged in, as transformers reads it; `policy` is as it was, but released.

    Weights are gathered and written one at a time, so that no rank holds the whole model. A collective.

    Raises:
        DataError: the disk is full.
    """
    policy.release()
    partial = folder.with_name(f"{folder.name}.partial")
    with together("loading the adapter"):
        adapted = load_adapter(policy.model, adapter)
        if world.is_main:
            shutil.rmtree(partial, ignore_errors=True)
    save_model(policy.model, merged_tensors(adapted), partial, world=world)
    remove_adapters(adapted)
    with together(f"saving {folder}"):
        if world.is_main:
            policy.tokenizer.save_pretrained(partial)
            partial.rename(folder)
