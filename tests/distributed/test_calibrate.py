from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from ranks import run_on_ranks
from tiny import tiny_model

from spd_dist.config import Calibrate, Distributed
from spd_dist.distributed.world import World
from spd_dist.distributed.zero import frozen_engine
from spd_dist.models.kv_sites import discover_sites
from spd_dist.stages.calibrate import calibrate
from spd_dist.types import SupervisedExample


def examples(count):
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(6, 24, (count,), generator=generator).tolist()
    return [
        SupervisedExample(
            str(i), tuple(torch.randint(3, 259, (n,), generator=generator).tolist()), (n - 3, n - 1), i % 3
        )
        for i, n in enumerate(lengths)
    ]


def rows_by_shard(policy, given, sites, config, world):
    """All ranks' rows, as their sums by shard: what the sketches see."""
    moments = {}
    for batch in calibrate(policy, given, sites, config, world):
        for site, grad_ND in batch.grad_ND.items():
            key = (batch.shard, str(site))
            moments[key] = moments.get(key, 0) + grad_ND.double().T @ grad_ND.double()
    every = [None] * world.size
    dist.all_gather_object(every, moments)
    return {key: value for part in every for key, value in part.items()}


def check(num_examples):
    world = World(dist.get_rank(), dist.get_world_size(), dist.get_rank(), torch.device("cpu"))
    alone = World(0, 1, 0, torch.device("cpu"))
    model = tiny_model()
    sites = discover_sites(model)
    config = Calibrate(num_shards=3, batch_size=2)
    whole = SimpleNamespace(model=model, engine=None, pad_token_id=0)
    given = examples(num_examples)
    expected = {}
    for batch in calibrate(whole, given, sites, config, alone):
        for site, grad_ND in batch.grad_ND.items():
            key = (batch.shard, str(site))
            expected[key] = expected.get(key, 0) + grad_ND.double().T @ grad_ND.double()
    engine = frozen_engine(
        model, Distributed(deepspeed={"zero_optimization": {"stage3_param_persistence_threshold": 0}}), torch.float32
    )
    assert discover_sites(engine.module) == sites
    sharded = SimpleNamespace(model=engine.module, engine=engine, pad_token_id=0)
    found = rows_by_shard(sharded, given, sites, config, world)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=0, atol=1e-5 * value.abs().max().item())
    engine.destroy()


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_sharded_ranks_find_the_gradients_of_one_whole_model(world_size, tmp_path):
    run_on_ranks(world_size, tmp_path / "store", check, 7)
