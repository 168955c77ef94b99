"""A small corpus to be made in many ways: it must always be the same."""

from __future__ import annotations

import random
from pathlib import Path

import torch

from spd_dist.config import Distributed, Generate, Model
from spd_dist.distributed.world import World
from spd_dist.errors import DataError
from spd_dist.models.policy import Policy, load_policy
from spd_dist.stages.context import StageContext
from spd_dist.stages.generate import CorpusSummary, generate
from spd_dist.types import KVSite, Projection, Prompt, SiteOperator

CONFIG = Generate(max_new_tokens=12, batch_size=4, temperature=1.0, num_samples=2)
SEED = 7
ALONE = World(0, 1, torch.device("cpu"))
PROGRAM = """
import json, sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()
if sys.argv[4:] and sys.argv[4]:
    from peft import PeftModel
    model = PeftModel.from_pretrained(model, sys.argv[4]).eval()
with open(sys.argv[3], "w") as output:
    for line in open(sys.argv[2]):
        row = json.loads(line)
        tokens = torch.tensor([row["prompt_tokens"]])
        made = model.generate(tokens, do_sample=False, max_new_tokens=row["max_new_tokens"], pad_token_id=0,
                              eos_token_id=row["eos_token_ids"])[0, tokens.shape[1]:].tolist()
        print(json.dumps({"id": row["id"], "sample": row["sample"], "tokens": made}), file=output, flush=True)
"""
"""A program of the user's: greedy, prompt by prompt, with an adapter if one is named last."""


def prompts(count: int = 9) -> list[Prompt]:
    """Of unequal lengths, whose answers end at different steps."""
    rng = random.Random(5)
    tokens = [tuple(rng.randrange(3, 259) for _ in range(rng.randrange(2, 30))) for _ in range(count)]
    return [Prompt(f"p{index:02d}", "", row) for index, row in enumerate(tokens)]


def some_projection(layer: int = 2, *, keep: float = 0.0) -> Projection:
    """Half of the width, at random; with keep 1 it changes nothing."""
    generator = torch.Generator().manual_seed(3)
    operators = {}
    for kind, module in (("key", "k_proj"), ("value", "v_proj")):
        site = KVSite(layer, kind, f"model.layers.{layer}.self_attn.{module}", ((0, 16),), 2)
        basis_DR = torch.linalg.qr(torch.randn(16, 8, generator=generator))[0]
        operators[site] = SiteOperator(keep, basis_DR, torch.full((8,), 1 - keep))
    return Projection(operators)


def policy_of(
    folder: Path,
    world: World = ALONE,
    zero_stage: int = 0,
    dtype: str = "auto",
    distributed: Distributed | None = None,
) -> Policy:
    """The tiny policy, with more tokens that end a sequence: a random model seldom says one."""
    settings = distributed or Distributed(zero_stage=zero_stage)
    policy = load_policy(Model(str(folder), dtype=dtype), settings, world)
    policy.eos_token_ids = tuple(range(2, 259, 17))
    return policy


def merged(folder: Path, summary: CorpusSummary) -> bytes:
    """The corpus of a stage's folder: nothing else is left beside it."""
    assert summary.is_complete, summary
    assert [path.name for path in (folder / "completions").iterdir()] == ["completions.jsonl"]
    return (folder / "completions" / "completions.jsonl").read_bytes()


def corpus(model: Path, folder: Path, config: Generate = CONFIG, dtype: str = "auto") -> bytes | None:
    """The corpus as one process makes it; None if it is not complete yet."""
    context = StageContext(folder, SEED, ALONE)
    summary = generate(policy_of(model, dtype=dtype), prompts(), some_projection(), config, context)
    return merged(folder, summary) if summary.is_complete else None


class StoppingAfter:
    """A progress that fails after some completions, as a full disk would."""

    def __init__(self, count: int) -> None:
        self.count = count

    def begin(self, total: int, skipped: int) -> None:
        """The work is planned."""

    def advance(self, units: int = 1, tokens: int = 0) -> None:
        """One more is written."""
        self.count -= units
        if self.count <= 0:
            raise DataError("the disk is full")
