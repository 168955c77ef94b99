"""Ranks that generate together: the corpus of one rank, and no rank waits for one that fails."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path

import pytest
import torch
from ranks import run_on_ranks
from tiny import save_tiny_model

from spd_dist.config import Distributed, Generate, Model
from spd_dist.distributed.world import World
from spd_dist.errors import DataError
from spd_dist.models.policy import Policy, load_policy
from spd_dist.stages.generate import generate
from spd_dist.types import KVSite, Projection, Prompt, SiteOperator

CONFIG = Generate(max_new_tokens=12, batch_size=4, temperature=1.0)
SEED = 7


def prompts(count: int = 11) -> list[Prompt]:
    """Of unequal lengths, that end at different steps."""
    rng = random.Random(5)
    tokens = [tuple(rng.randrange(3, 259) for _ in range(rng.randrange(2, 30))) for _ in range(count)]
    return [Prompt(f"p{index:02d}", "", row) for index, row in enumerate(tokens)]


def some_projection(layer: int = 2) -> Projection:
    """Half of the width, at random."""
    generator = torch.Generator().manual_seed(3)
    operators = {}
    for kind, module in (("key", "k_proj"), ("value", "v_proj")):
        site = KVSite(layer, kind, f"model.layers.{layer}.self_attn.{module}", ((0, 16),), 2)
        basis_DR = torch.linalg.qr(torch.randn(16, 8, generator=generator))[0]
        operators[site] = SiteOperator(0.0, basis_DR, torch.ones(8))
    return Projection(operators)


def policy_of(folder: Path, world: World, zero_stage: int) -> Policy:
    """The tiny policy, with more tokens that end a sequence: a random model seldom says one."""
    policy = load_policy(Model(str(folder)), Distributed(zero_stage=zero_stage), world)
    policy.eos_token_ids = tuple(range(2, 259, 17))
    return policy


def world_of_this_process() -> World:
    """As `join_world` would give it."""
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    return World(rank, size, rank, torch.device("cpu"))


def corpus(model: Path, folder: Path, config: Generate = CONFIG, zero_stage: int = 3) -> bytes:
    """Generate on this process's ranks and give the merged file."""
    world = world_of_this_process()
    policy = policy_of(model, world, zero_stage)
    summary = generate(policy, prompts(), some_projection(), config, seed=SEED, folder=folder, world=world)
    assert summary["is_complete"], summary
    assert min(summary["hook_calls"].values()) >= 1, summary
    assert summary["leakage"] < 1e-5, summary
    return (folder / "completions" / "completions.jsonl").read_bytes()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def expected(model: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The corpus of one process with the whole model."""
    world = World(0, 1, 0, torch.device("cpu"))
    policy = policy_of(model, world, 0)
    folder = tmp_path_factory.mktemp("one")
    generate(policy, prompts(), some_projection(), CONFIG, seed=SEED, folder=folder, world=world)
    return (folder / "completions" / "completions.jsonl").read_bytes()


def the_corpus_is_the_same(model: Path, folder: Path, expected: bytes) -> None:
    for placement in ("replica", "layerwise"):
        for apply_as in ("hook", "fold"):
            config = dataclasses.replace(CONFIG, placement=placement, apply_as=apply_as)
            found = corpus(model, folder / f"{placement}-{apply_as}", config)
            if apply_as == "hook":
                assert found == expected


@pytest.mark.parametrize("world_size", [2, 4])
def test_the_corpus_is_the_same_on_any_number_of_ranks(model: Path, expected: bytes, tmp_path: Path, world_size: int):
    run_on_ranks(world_size, tmp_path / "store", the_corpus_is_the_same, model, tmp_path, expected)
