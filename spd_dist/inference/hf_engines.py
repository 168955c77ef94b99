"""Engines that call the policy itself: our decode loop, and transformers' continuous batching (`generate_batch`).

The latter has one random state for all requests: a sample depends on what it is batched with. So it is chosen only by
name, and its silent failures are errors here.
"""

from __future__ import annotations

import functools
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig
from transformers.generation.continuous_batching.requests import GenerationOutput, RequestStatus

from spd_dist.errors import DataError
from spd_dist.inference.compiled_pass import CompiledPass
from spd_dist.inference.decode import decode
from spd_dist.inference.placement import Placement
from spd_dist.inference.requests import Contrast, Decoded, DecodeSettings, Request, half_batch, is_out_of_memory
from spd_dist.inference.sampling import Sampling
from spd_dist.models.policy import Policy
from spd_dist.projection.hooks import ProjectionMonitor, projected
from spd_dist.types import Projection

INSTRUCTIONS = {
    torch.bfloat16: ("avx512_bf16", "amx_bf16", "bf16"),
    torch.float16: ("avx512_fp16", "amx_fp16", "fp16_arith"),
}
"""By which a CPU computes in 16 bits, as torch names them."""
REQUESTS_A_CALL = 256  # what a kill loses at most: a call gives its completions at its end
PAGE_SIZE = 32


def is_slow_dtype(dtype: torch.dtype, device: torch.device, capabilities: Mapping[str, Any]) -> bool:
    """Whether this device only stores numbers of `dtype`, and computes in another: of `torch.cpu.get_capabilities`."""
    needed = INSTRUCTIONS.get(dtype, ())
    return device.type == "cpu" and bool(needed) and not any(capabilities.get(name) for name in needed)


@dataclass
class HFEngine:
    """Our decode loop on the Hugging Face model."""

    policy: Policy
    batch_size: int
    fixed_columns: int | None
    monitor: ProjectionMonitor | None
    placement: Placement
    section: str
    name: str = "hf"
    contrast: Contrast | None = None
    compiled: CompiledPass | None = None

    def complete(self, requests: Sequence[Request], sampling: Sampling) -> Generator[Decoded, None, None]:
        """Completions as they finish."""
        return decode(
            self.policy.model,
            requests,
            DecodeSettings(
                sampling,
                frozenset(self.policy.eos_token_ids),
                self.policy.pad_token_id,
                self.contrast,
                is_whole=self.placement == "replica",
                compiled=self.compiled,
            ),
            batch_size=self.batch_size,
            fixed_columns=self.fixed_columns,
            smaller=functools.partial(half_batch, section=self.section, in_step=self.placement == "layerwise"),
        )


@contextmanager
def held_to(
    policy: Policy, projection: Projection | None, apply_as: Literal["hook", "fold"]
) -> Generator[ProjectionMonitor | None]:
    """The policy under `projection`, as the config has it applied; undone on every way out."""
    with nullcontext() if projection is None else projected(policy.model, projection, apply_as) as monitor:
        yield monitor


@dataclass
class ContinuousBatchingEngine:
    """`generate_batch` of the policy's own model."""

    policy: Policy
    batch_size: int
    monitor: ProjectionMonitor | None
    section: str = "generate"
    name: str = "hf_cb"

    def complete(self, requests: Sequence[Request], sampling: Sampling) -> Generator[Decoded, None, None]:
        """Completions, call by call. Out of memory, what has no answer yet is asked again in half the batch.

        Raises:
            DataError: the engine can't run the model, or lost a request; memory that runs out for good.
        """
        waiting = list(requests)
        while waiting:
            part, waiting = waiting[:REQUESTS_A_CALL], waiting[REQUESTS_A_CALL:]
            answers = dict(zip(part, self._call(part, sampling), strict=True))
            yield from (self._decoded(request, answer) for request, answer in answers.items() if answer is not None)
            left = [request for request, answer in answers.items() if answer is None]
            if left:
                self.batch_size, waiting = half_batch(self.batch_size, section=self.section), left + waiting
                torch.cuda.empty_cache()

    def _call(self, requests: Sequence[Request], sampling: Sampling) -> list[GenerationOutput | None]:
        """An answer a request, None where memory ran out."""
        model: Any = self.policy.model  # transformers types no `generate_batch` of a PreTrainedModel
        attention = model.config._attn_implementation
        longest = max(len(request.tokens) for request in requests) + sampling.max_new_tokens
        blocks_a_row = -(-longest // PAGE_SIZE)
        batching = ContinuousBatchingConfig(
            page_size=PAGE_SIZE,
            num_blocks=self.batch_size * blocks_a_row,
            max_batch_tokens=max(longest, self.batch_size),
            seed=requests[0].seed % 2**32,
        )
        with torch.random.fork_rng(), torch.no_grad():
            try:
                found = model.generate_batch(
                    [list(request.tokens) for request in requests], pinned(sampling, self.policy), batching
                )
            except (ValueError, NotImplementedError) as error:
                raise self._cannot(str(error)) from error
            except RuntimeError as error:
                if not is_out_of_memory(str(error)):
                    raise
                model.set_attn_implementation(attention)  # a call changes it, and this one left it so
                return [None] * len(requests)
        if len(found) != len(requests):
            raise self._cannot(f"{len(requests) - len(found)} of {len(requests)} requests got no answer, see the log")
        return [None if is_out_of_memory(output.error or "") else output for output in found.values()]

    def _decoded(self, request: Request, output: GenerationOutput) -> Decoded:
        tokens = tuple(output.generated_tokens)
        if output.error is not None or output.status != RequestStatus.FINISHED or not tokens:
            raise self._cannot(f"prompt {request.id!r} failed: {output.error or output.status.name}")
        return Decoded(request, tokens, "stop" if tokens[-1] in self.policy.eos_token_ids else "length")

    def _cannot(self, reason: str) -> DataError:
        model = type(self.policy.model).__name__
        key = f"{self.section}.engine"
        return DataError(f"{key}=hf_cb cannot run {model}: {reason}; set {key}=hf")


def pinned(sampling: Sampling, policy: Policy) -> GenerationConfig:
    """Every setting that matters: nothing is inherited from the model."""
    is_drawn = sampling.temperature > 0
    return GenerationConfig(
        do_sample=is_drawn,
        max_new_tokens=sampling.max_new_tokens,
        repetition_penalty=sampling.repetition_penalty,
        eos_token_id=list(policy.eos_token_ids),
        pad_token_id=policy.pad_token_id,
        temperature=sampling.temperature if is_drawn else None,
        top_p=sampling.top_p if is_drawn else None,
        top_k=sampling.top_k if is_drawn else None,
        min_p=(sampling.min_p or None) if is_drawn else None,
    )
