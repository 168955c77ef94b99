"""Memory, and the share of the accelerator's peak that a step used."""

from __future__ import annotations

import math

from torch import nn

from spd_dist.distributed.memory import peak_bytes, peak_flops
from spd_dist.distributed.world import World
from spd_dist.distributed.zero import whole_shape


class Speedometer:
    """What a training's steps cost on this hardware."""

    def __init__(self, model: nn.Module, world: World) -> None:
        self.world = world
        num_elements = {True: 0, False: 0}
        for parameter in model.parameters():
            num_elements[parameter.requires_grad] += math.prod(whole_shape(parameter))
        # 2 a weight and token forward, 2 for the gradient of its input, 2 for its own; attention is left out.
        self.flops_per_token = 4 * num_elements[False] + 6 * num_elements[True]
        self.peak_flops = peak_flops(world)

    def measure(self, num_tokens: int, seconds: float) -> dict[str, float]:
        """Peak memory of this rank so far, and the model FLOPs utilisation where the accelerator's peak is known."""
        measured = {"peak_memory_gib": peak_bytes(self.world) / 2**30}
        if self.peak_flops is not None:
            measured["mfu_fraction"] = num_tokens * self.flops_per_token / (seconds * self.peak_flops * self.world.size)
        return measured
