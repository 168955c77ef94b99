"""Memory, and the share of the accelerator's peak that a step used."""

from __future__ import annotations

from spd_dist.distributed.memory import peak_bytes, peak_flops
from spd_dist.distributed.world import World
from spd_dist.models.outline import Outline


class Speedometer:
    """What a training's steps cost on this hardware."""

    def __init__(self, outline: Outline, world: World) -> None:
        self.world = world
        self.flops_per_token = outline.training_flops  # without attention's, as is usual
        self.peak_flops = peak_flops(world)

    def measure(self, num_tokens: int, seconds: float) -> dict[str, float]:
        """Peak memory of this rank so far, and the model FLOPs utilisation where the accelerator's peak is known."""
        measured = {"peak_memory_gib": peak_bytes(self.world) / 2**30}
        if self.peak_flops is not None:
            measured["mfu_fraction"] = num_tokens * self.flops_per_token / (seconds * self.peak_flops * self.world.size)
        return measured
