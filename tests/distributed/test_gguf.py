"""A GGUF file is converted once a cache, whoever of the ranks comes first."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch.distributed as dist
from ranks import run_on_ranks
from tiny import tiny_model
from tiny_gguf import SHAPE, write_tiny_gguf

from spd_dist.config import Distributed, Model
from spd_dist.distributed.world import join_world
from spd_dist.distributed.zero import weights_fingerprint
from spd_dist.models.policy import load_policy


def let_rank_1_first(cache: Path) -> None:
    """Hold rank 0 back until another rank has begun."""
    deadline = time.monotonic() + 60
    while dist.get_rank() == 0 < dist.get_world_size() - 1 and not (cache.is_dir() and any(cache.iterdir())):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def load_from_an_empty_cache(gguf: Path, cache: Path, zero_stage: int) -> None:
    world = join_world(Distributed())
    let_rank_1_first(cache)
    policy = load_policy(Model(str(gguf), cache_dir=str(cache)), Distributed(zero_stage=zero_stage), world)
    assert policy.fingerprint == weights_fingerprint(tiny_model(**SHAPE))


@pytest.mark.parametrize(("world_size", "zero_stage"), [(1, 3), (2, 3), (4, 0)])
def test_a_gguf_file_is_loaded_from_an_empty_cache(tmp_path, world_size, zero_stage):
    gguf = write_tiny_gguf(tmp_path / "tiny.gguf", whole=True)
    run_on_ranks(world_size, tmp_path / "store", load_from_an_empty_cache, gguf, tmp_path / "cache", zero_stage)
