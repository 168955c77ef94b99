"""A config's model in numbers: parameters, sites, and what its passes hold in memory."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch

from spd_dist.arms import chosen
from spd_dist.config import Config
from spd_dist.models.kv_sites import discover_sites
from spd_dist.models.lora import BYTES_OF_FOUR_BITS, add_adapters, quantised_sizes, reads_inputs
from spd_dist.models.model_stats import Outline, meta_model, outline_of
from spd_dist.models.policy import load_settings, resolve_dtype
from spd_dist.planner.dry_run import calibrate_peak, finetune_peak, inputs_peak, score_peak
from spd_dist.stages.score_tokens import rows_of_length
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
    """Of a weight, as passes use it."""
    num_captured: int
    """Parameters that calibration's backward pass uses: those above the lowest site, and the output layer."""
    calibrate_peak: int
    """Bytes beside the weights while one micro-batch's gradients are captured."""
    finetune_peak: int
    """Bytes beside parameters, gradients and optimizer while one micro-batch is trained on."""
    keeps_weights: bool
    """Whether a student all of whose weights are trained keeps the first ones for its teacher."""

    score_peak: int
    """Bytes beside the weights while a batch of completions is read for its tokens' effects."""

    four_bits: tuple[int, ...] = ()
    """Elements of each weight that is stored in 4 bits."""

    @property
    def weight_bytes(self) -> int:
        """All of the policy's weights, as they are stored."""
        saved = sum(self.four_bits) * (self.element_bytes - BYTES_OF_FOUR_BITS)
        return round(self.policy.num_parameters * self.element_bytes - saved)


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
    four_bits = quantised_sizes(model) if config.model.quantization != "none" else ()
    if config.finetune.mode == "lora":
        add_adapters(model, config.finetune, generator=torch.Generator())
    else:
        model.requires_grad_(True)
    is_sharded = config.distributed.zero_stage == 3
    distils = any(arm.distils(config.finetune.loss) for arm in chosen(config.evaluate.arms))
    finetune = dataclasses.replace(config.finetune, loss="distil" if distils else "cross_entropy")
    looking = inputs_peak(settings, config.finetune, dtype) if reads_inputs(config.finetune) else 0
    head = policy.vocabulary_size * policy.hidden_size
    in_layers = policy.num_multiplied - head
    longest = config.data.max_prompt_tokens + config.generate.max_new_tokens
    rows = rows_of_length(longest)
    num_targets = rows * config.generate.max_new_tokens
    return Profile(
        name=config.model.name,
        policy=policy,
        student=outline_of(student),
        sites=sites,
        element_bytes=dtype.itemsize,
        four_bits=four_bits,
        num_captured=head + in_layers * num_above // policy.num_layers,
        calibrate_peak=calibrate_peak(settings, config.calibrate, dtype, num_layers=num_above, is_sharded=is_sharded),
        finetune_peak=max(looking, finetune_peak(settings, finetune, dtype, is_sharded=is_sharded)),
        keeps_weights=distils and config.finetune.mode == "full",
        score_peak=score_peak(settings, dtype, batch=(rows, longest), num_targets=num_targets),
    )
