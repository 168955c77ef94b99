from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from ranks import run_on_ranks
from tiny import tiny_model

from spd_dist.config import Calibrate, Distributed, Sketch
from spd_dist.distributed.collectives import gather_objects
from spd_dist.distributed.world import World
from spd_dist.distributed.zero import frozen_engine
from spd_dist.errors import StopRequested
from spd_dist.models.kv_sites import discover_sites
from spd_dist.stages.calibrate import calibrate
from spd_dist.stages.sketch import Unfinished, sketch
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


class Stop:
    """Asks to stop before a round, on every rank: with an error if it is not the same round on all of them."""

    def __init__(self, last_round):
        self.rounds, self.last_round = 0, last_round

    def __call__(self):
        assert set(gather_objects(self.rounds)) == {self.rounds}
        if self.rounds == self.last_round:
            stop = StopRequested("stopped")
            stop.is_shared = True
            raise stop
        self.rounds += 1


def attempt(folder, is_sharded, last_round=None):
    """Calibrate and sketch, from what an earlier attempt left; the moments of every shard that this rank owns."""
    world = World(dist.get_rank(), dist.get_world_size(), dist.get_rank(), torch.device("cpu"))
    model = tiny_model()
    sites = discover_sites(model)
    engine = frozen_engine(model, Distributed(), torch.float32) if is_sharded else None
    policy = SimpleNamespace(model=model, engine=engine, pad_token_id=0)
    config = Calibrate(num_shards=3, batch_size=2)
    with Unfinished(folder, config.num_shards, world) as left:
        stop = Stop(last_round)
        gradients = calibrate(policy, examples(11), sites, config, world, taken=left.num_taken, stop_if_asked=stop)
        given = {"num_shards": config.num_shards, "planned_rank": lambda width: width // 2, "world": world}
        sketches = sketch(gradients, sites, Sketch(), initial=left.shards, keep=left.keep, **given)
    if engine is not None:
        engine.destroy()
    moments = {(shard, str(site)): state[site].gram_DD for shard, state in sketches.items() for site in sites}
    return {key: value for part in gather_objects(moments) for key, value in part.items()}, stop.rounds


def stop_and_go_on(folder, is_sharded):
    whole, num_rounds = attempt(folder / "whole", is_sharded)
    with pytest.raises(StopRequested, match="stopped"):
        attempt(folder / "stopped", is_sharded, last_round=1)
    assert any((folder / "stopped").iterdir())
    again, num_left = attempt(folder / "stopped", is_sharded)
    assert num_left == num_rounds - 1
    assert not (folder / "stopped").exists()
    assert again.keys() == whole.keys()
    assert all(torch.equal(again[key], value) for key, value in whole.items())


@pytest.mark.parametrize(("world_size", "is_sharded"), [(2, True), (4, False)])
def test_all_ranks_stop_before_the_same_round_and_go_on_bit_for_bit(world_size, is_sharded, tmp_path):
    run_on_ranks(world_size, tmp_path / "store", stop_and_go_on, tmp_path, is_sharded)
