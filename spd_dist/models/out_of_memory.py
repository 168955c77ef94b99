"""Memory that runs out while a batch decodes: how it shows, and what is tried next."""

from __future__ import annotations

import logging

from spd_dist.errors import DataError

SIGNS = ("out of memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED")
"""What torch says on accelerators, on the CPU, and where a library of the accelerator allocates by itself."""

log = logging.getLogger(__name__)


def is_out_of_memory(message: str) -> bool:
    """Whether an error says that an allocation failed."""
    return any(sign in message for sign in SIGNS)


def half_batch(batch_size: int, *, section: str = "generate", in_step: bool = False, is_fixed: bool = False) -> int:
    """Half of a batch that memory ran out for.

    Args:
        batch_size: Rows of it.
        section: The config's that it is from.
        in_step: Whether other ranks take part in its passes: they can't be told between two gathers.
        is_fixed: Whether samples depend on the batch's shape.

    Raises:
        DataError: no smaller batch may be tried, with what to do instead.
    """
    key, shorter = f"{section}.batch_size", f"{section}.max_new_tokens or data.max_prompt_tokens"
    if is_fixed:
        remedy = (
            f"{section}.batch_invariant=true makes the batch a part of the result: lower {key} in a run_dir of its "
            f"own, or {shorter}"
        )
    elif in_step:
        remedy = f"ranks in step (layerwise) cannot halve it: lower {key}, {shorter}, or take more ranks"
    elif batch_size == 1:
        remedy = f"lower {shorter}, or shard the weights: distributed.zero_stage=3, {section}.placement=layerwise"
    else:
        log.warning("%s: out of memory; going on with %s=%d", section, key, batch_size // 2)
        return batch_size // 2
    raise DataError(f"out of memory with {key}={batch_size}; {remedy}")
