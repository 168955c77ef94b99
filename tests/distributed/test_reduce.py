"""What ranks do together must equal, bit for bit, what one rank does alone."""

import hashlib
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from gradients import batches, kv_site, power_law
from ranks import run_on_ranks

from spd_dist.config import Project, Reduce, Sketch
from spd_dist.distributed.world import World
from spd_dist.errors import DataError
from spd_dist.stages.project import subspace
from spd_dist.stages.project.subspace import check_same
from spd_dist.stages.reduce import reduce
from spd_dist.stages.sketch import ShardPlan, sketch
from spd_dist.storage.subspace_file import fingerprint, load_subspace, save_subspace
from spd_dist.types import Certificate, GradientBatch, SiteMoments, Subspace

NUM_SHARDS = 3  # on 4 ranks one has no shard
NARROW = [kv_site(layer, kind, 12) for layer in (0, 1) for kind in ("key", "value")]
SITES = [*NARROW, kv_site(2, "key", 20)]
METHODS = {"gram": Sketch(method="gram"), "frequent_directions": Sketch(method="frequent_directions", size=5)}


def this_world() -> World:
    return World(dist.get_rank(), dist.get_world_size(), torch.device("cpu"))


def stream(world: World, *, spoiled_shard: int | None = None) -> list[GradientBatch]:
    """The batches of this rank's shards; shard 1 has no example, and the others have different numbers of rows."""
    found = []
    for shard in range(world.rank, NUM_SHARDS, world.size):
        num_rows = [40, 0, 23][shard]
        rows = {site: power_law(num_rows, site.width, seed=31 * shard + i).float() for i, site in enumerate(SITES)}
        if shard == spoiled_shard:
            rows[SITES[2]][9, 3] = torch.nan
        found += batches(rows, 7, shard, num_zero_rows=2) if num_rows else []
    return found


def cut(world: World, method: str, config: Project) -> Subspace:
    sketches = sketch(stream(world), SITES, METHODS[method], world, ShardPlan(NUM_SHARDS, config.planned_rank))
    owned = reduce(sketches, SITES, Reduce(), num_shards=NUM_SHARDS, world=world)
    return subspace(owned, SITES, config, world, metadata={"model": "tiny"})


def compare_with_one_rank(folder: Path) -> None:
    world = this_world()
    for method in METHODS:
        for name, config in {"plain": Project(), "centered": Project(centered=True, rank_rule="energy")}.items():
            shared = cut(world, method, config)
            alone = load_subspace(folder / f"{method}_{name}.safetensors")
            assert fingerprint(shared) == fingerprint(alone), (method, name)


@pytest.mark.parametrize("world_size", [pytest.param(2, marks=pytest.mark.slow), 3, 4])
def test_subspace_has_the_same_bits_at_every_world_size(world_size, tmp_path):
    alone = World(0, 1, torch.device("cpu"))
    for method in METHODS:
        for name, config in {"plain": Project(), "centered": Project(centered=True, rank_rule="energy")}.items():
            save_subspace(tmp_path / f"{method}_{name}.safetensors", cut(alone, method, config))
    run_on_ranks(world_size, tmp_path / "store", compare_with_one_rank, tmp_path)


def sum_many_shards() -> None:
    world, site, arrived = this_world(), NARROW[0], []
    shards = {
        shard: {site: SiteMoments(torch.eye(12).double() * shard, torch.zeros(12).double(), Certificate(12.0 * shard))}
        for shard in range(world.rank, 7, world.size)
    }
    exchange = dist.all_to_all_single
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "all_to_all_single", lambda *args: [arrived.append(args[0].numel()), exchange(*args)])
        owned = reduce(shards, [site], Reduce(), num_shards=7, world=world)
    if world.rank == 0:
        assert torch.equal(owned[site].gram_DD, torch.eye(12).double() * sum(range(7)))
        moments = 12 * 12 + 12 + 6  # matrix, sum and certificate
        assert arrived == [2 * moments, 2 * moments, 2 * moments, moments], "of each rank one shard at a time"


def test_an_owner_holds_a_shard_of_each_rank_at_a_time_however_many_there_are(tmp_path):
    run_on_ranks(2, tmp_path / "store", sum_many_shards)


def fail_together() -> None:
    world = this_world()
    plan = ShardPlan(NUM_SHARDS, Project().planned_rank)
    where = r"rank 2, layers\.1\.key, shard 2, micro-batch 1: gradient rows hold NaN or Inf"
    with pytest.raises(DataError, match=where):
        sketch(stream(world, spoiled_shard=2), SITES, METHODS["gram"], world, plan)

    sketches = sketch(stream(world), SITES, METHODS["gram"], world, plan)
    stray = {0: {}} if world.rank == 1 else sketches
    with pytest.raises(DataError, match=r"rank 1 of 3 holds shard 0, and owns \[1\] of 3"):
        reduce(stray, SITES, Reduce(), num_shards=NUM_SHARDS, world=world)
    with pytest.raises(DataError, match="the sketch lost track of its energy"):
        reduce(sketches, SITES, Reduce(energy_tolerance=1e-300), num_shards=NUM_SHARDS, world=world)

    owned = reduce(sketches, SITES, Reduce(), num_shards=NUM_SHARDS, world=world)
    shared = subspace(owned, SITES, Project(), world)
    others = Subspace(shared.sites, {"seen_by": hashlib.sha256(str(world.rank).encode()).hexdigest()})
    with pytest.raises(DataError, match="the ranks hold different subspaces after the broadcast"):
        check_same(others, world)


def test_faults_of_one_rank_are_raised_on_all(tmp_path):
    run_on_ranks(3, tmp_path / "store", fail_together)
