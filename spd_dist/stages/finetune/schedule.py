"""The learning rate, as a function of the step: nothing to save, nothing to restore."""

from __future__ import annotations

import math


def learning_rate_fraction(step: int, *, num_steps: int, num_warmup_steps: int) -> float:
    """Share of the peak at zero-based `step`: linear warm-up from zero, then half a cosine down to zero.

    The same numbers as `transformers.get_cosine_schedule_with_warmup`.
    """
    if step < num_warmup_steps:
        return step / num_warmup_steps
    done = (step - num_warmup_steps) / max(1, num_steps - num_warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * done))
