"""A config's model in numbers: read once, without weights, for any number of clusters."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from spd_dist.config import Config
from spd_dist.models.adapters import add_adapters
from spd_dist.models.dry_run import calibrate_peak, finetune_peak
from spd_dist.models.kv_sites import discover_sites
from spd_dist.models.meta import meta_model
from spd_dist.models.outline import Outline, outline_of
from spd_dist.models.policy import load_settings, resolve_dtype
from spd_dist.types import KVSite


@dataclass(frozen=True)
class Profile:
    """What the arithmetic of memory and seconds needs to know of the model."""

    name: str
    policy: Outline
    """Frozen, as the stages before fine-tuning have it."""
    student: Outline
    """As it is trained."""
    sites: tuple[KVSite, ...]
    element_bytes: int
    """Of a weight."""
    num_captured: int
    """Parameters that calibration's backward pass uses: those above the lowest site, and the output layer."""
    calibrate_peak: int
    """Bytes beside the weights while one micro-batch's gradients are captured."""
    finetune_peak: int
    """Bytes beside parameters, gradients and optimizer while one micro-batch is trained on."""

    @property
    def weight_bytes(self) -> int:
        """All of the policy's weights."""
        return self.policy.num_parameters * self.element_bytes


def profile_of(config: Config, device: torch.device | None = None) -> Profile:
    """The profile of `config.model`, whose config alone is read; `device` decides what `model.dtype=auto` is.

    Raises:
        UserError: no such model, or one whose memory can't be told without running it.
    """
    settings = load_settings(config.model)
    dtype = resolve_dtype(config.model.dtype, device or torch.device("cuda"))
    model = meta_model(settings, dtype)
    policy = outline_of(model)
    sites = tuple(discover_sites(model, config.calibrate.layers))
    num_above = policy.num_layers - min(site.layer for site in sites)
    student = model
    if config.finetune.mode == "lora":
        add_adapters(model, config.finetune, generator=torch.Generator())
    else:
        model.requires_grad_(True)
    sharded = {"is_sharded": config.distributed.zero_stage == 3}
    head = policy.vocabulary_size * policy.hidden_size
    in_layers = policy.num_multiplied - head
    return Profile(
        name=config.model.name,
        policy=policy,
        student=outline_of(student),
        sites=sites,
        element_bytes=dtype.itemsize,
        num_captured=head + in_layers * num_above // policy.num_layers,
        calibrate_peak=calibrate_peak(settings, config.calibrate, dtype, num_layers=num_above, **sharded),
        finetune_peak=finetune_peak(settings, config.finetune, dtype, **sharded),
    )
