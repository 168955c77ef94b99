"""Sharded ranks, whatever they own, give the gradients of one whole model."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from families import family_model
from ranks import run_on_ranks
from tiny import save_tiny_model, tiny_model
from transformers.integrations import HfDeepSpeedConfig

from spd_dist.config import Calibrate, Distributed, Model, Project, Sketch
from spd_dist.distributed.collectives import gather_objects
from spd_dist.distributed.world import World
from spd_dist.distributed.zero import frozen_engine, sharding_settings, weights_fingerprint
from spd_dist.errors import DataError, StopRequested
from spd_dist.models.kv_sites import discover_sites
from spd_dist.models.policy import load_policy
from spd_dist.stages.calibrate import calibrate, gradient_moments
from spd_dist.stages.context import StageContext
from spd_dist.stages.project import subspace
from spd_dist.stages.sketch import ShardPlan, Unfinished, sketch
from spd_dist.storage.subspace_file import fingerprint, load_subspace, save_subspace
from spd_dist.types import Certificate, SiteMoments, SupervisedExample

CPU = torch.device("cpu")
ALONE = World(0, 1, CPU)
# Without persistent parameters, every one is sharded, gathered and released.
SHARDED = Distributed(deepspeed={"zero_optimization": {"stage3_param_persistence_threshold": 0}})


def random_examples(count):
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(6, 24, (count,), generator=generator).tolist()
    return [
        SupervisedExample(
            str(index),
            tuple(torch.randint(3, 259, (length,), generator=generator).tolist()),
            (2, length - 2),
            index % 3,
        )
        for index, length in enumerate(lengths)
    ]


def rows_by_shard(policy, examples, sites, config, world):
    """What this rank yields: the rows of its shards, and their counts."""
    rows, counts = {}, {}
    for batch in calibrate(policy, examples, sites, config, StageContext(Path(), 0, world)):
        counts[batch.shard] = counts.get(batch.shard, 0) + batch.num_tokens + batch.num_zero_rows
        for site, grad_ND in batch.grad_ND.items():
            rows.setdefault((batch.shard, site), []).append(grad_ND)
    return {key: torch.cat(parts) for key, parts in rows.items()}, counts


def assert_same(found, expected):
    (found_rows, found_counts), (expected_rows, expected_counts) = found, expected
    assert found_counts == expected_counts
    assert found_rows.keys() == expected_rows.keys()
    for key, rows_ND in expected_rows.items():
        torch.testing.assert_close(found_rows[key], rows_ND, rtol=0, atol=1e-5 * rows_ND.abs().max().item())


def on_all_ranks(policy, examples, sites, config):
    world = World(dist.get_rank(), dist.get_world_size(), CPU)
    shares = gather_objects(rows_by_shard(policy, examples, sites, config, world))
    for rank, (_, counts) in enumerate(shares):
        assert all(shard % world.size == rank for shard in counts)
    rows, counts = ({key: value for share in shares for key, value in share[part].items()} for part in (0, 1))
    return rows, counts


def check_sharded_against_whole():
    model = tiny_model()
    sites = discover_sites(model)
    whole = SimpleNamespace(model=model, engine=None, pad_token_id=0)
    # Equal shares, unequal ones, and fewer examples or shards than ranks: some rank owns nothing.
    cases = [
        (random_examples(count), {"num_shards": shards}) for count, shards in [(8, 4), (7, 3), (1, 8), (5, 1), (0, 2)]
    ]
    cases += [(random_examples(5), {"num_shards": 5, "checkpointing": True})]
    expected = []
    for examples, settings in cases:
        config = Calibrate(**settings, batch_size=2)
        expected.append(rows_by_shard(whole, examples, sites, config, ALONE))
        assert_same(on_all_ranks(whole, examples, sites, config), expected[-1])

    check_bfloat16(cases[0], expected[0])
    engine = frozen_engine(model, SHARDED, torch.float32)
    sharding = HfDeepSpeedConfig(sharding_settings(SHARDED, torch.float32))  # transformers would shard any new model
    assert discover_sites(engine.module) == sites
    del sharding
    before = weights_fingerprint(engine.module)
    sharded = SimpleNamespace(model=engine.module, engine=engine, pad_token_id=0)
    for (examples, settings), whole_result in zip(cases, expected, strict=True):
        config = Calibrate(**settings, batch_size=2)
        assert_same(on_all_ranks(sharded, examples, sites, config), whole_result)
    assert weights_fingerprint(engine.module) == before
    assert all(parameter.numel() == 0 for parameter in engine.module.parameters())  # none is left gathered
    engine.destroy()


def check_bfloat16(case, exact):
    """Sharded ranks are as far from the rows in float32 as one whole model is in either of two orders of its sums."""
    examples, settings = case
    one, other = (Calibrate(**settings, batch_size=size) for size in (2, 1))
    model = tiny_model().bfloat16()
    whole = SimpleNamespace(model=model, engine=None, pad_token_id=0)
    sites = discover_sites(model)
    noise = max(distance(rows_by_shard(whole, examples, sites, config, ALONE), exact) for config in (one, other))
    engine = frozen_engine(model, SHARDED, torch.bfloat16)
    found = on_all_ranks(SimpleNamespace(model=model, engine=engine, pad_token_id=0), examples, sites, one)
    engine.destroy()
    assert 0 < distance(found, exact) <= 2 * noise


def distance(found, exact):
    """The largest |found - exact| / |exact| of a shard's rows at a site."""
    (rows, counts), (exact_rows, exact_counts) = found, exact
    assert counts == exact_counts
    return max(((rows[key].float() - row_ND).norm() / row_ND.norm()).item() for key, row_ND in exact_rows.items())


def check_families():
    examples = [
        dataclasses.replace(example, tokens=tuple(3 + token % 60 for token in example.tokens))
        for example in random_examples(5)
    ]
    # Fused, per head, latent, with experts that ranks choose differently, with layers that have no attention.
    for name in ("phi3", "gpt2", "gpt_neox", "deepseek_v3", "qwen3_moe", "qwen3_next", "falcon_grouped"):
        model = family_model(name)
        sites, config = discover_sites(model), Calibrate(num_shards=3, batch_size=2, checkpointing=name == "qwen3_moe")
        whole = SimpleNamespace(model=model, engine=None, pad_token_id=0)
        expected = rows_by_shard(whole, examples, sites, config, ALONE)
        engine = frozen_engine(model, SHARDED, torch.float32)
        assert discover_sites(engine.module) == sites
        sharded = SimpleNamespace(model=engine.module, engine=engine, pad_token_id=0)
        assert_same(on_all_ranks(sharded, examples, sites, config), expected)
        engine.destroy()


def check_faults():
    engine = frozen_engine(tiny_model(), SHARDED, torch.float32)
    policy = SimpleNamespace(model=engine.module, engine=engine, pad_token_id=0)
    world = World(dist.get_rank(), dist.get_world_size(), CPU)
    sites, config = discover_sites(engine.module), Calibrate(num_shards=2, batch_size=1)
    examples = random_examples(4)
    bad = SupervisedExample("bad", (5, 6, 7), (0,))  # of shard 1, so of rank 1 alone
    with pytest.raises(DataError, match="example bad"):
        next(calibrate(policy, [examples[0], bad], sites, config, StageContext(Path(), 0, world)))
    # A loss that is not finite on one rank keeps the others in step, and its own rows say so.
    nan = float("nan")
    engine.module.model.norm.register_forward_hook(lambda *io: io[2] * nan if world.rank == 1 else io[2])
    rows, _ = rows_by_shard(policy, examples, sites, config, world)
    assert all(rows_ND.isfinite().all().item() == (world.rank != 1) for rows_ND in rows.values())
    engine.destroy()


@pytest.mark.parametrize("world_size", [1, pytest.param(2, marks=pytest.mark.slow), 4])
def test_sharded_ranks_find_the_gradients_of_one_whole_model(world_size, tmp_path):
    run_on_ranks(world_size, tmp_path / "store", check_sharded_against_whole)


OTHER_DIRECTIONS = ("gradient_x_activation", "activation")


def keep_effects(model: Path, folder: Path) -> None:
    """The subspaces of other directions than the gradients' on these ranks, sharded; the last rank writes them down."""
    world = World(dist.get_rank(), dist.get_world_size(), CPU)
    policy = load_policy(Model(name=str(model)), SHARDED, world)
    sites = discover_sites(policy.model)
    config, context = Calibrate(num_shards=3, batch_size=2), StageContext(folder, 0, world)
    found = gradient_moments(policy, random_examples(7), sites, config, context)
    owned = {site: SiteMoments(found.gradient[site], found.gradient[site][0], Certificate()) for site in sites}
    mine = {site: owned[site] for site in sites[world.rank :: world.size]}
    for directions in OTHER_DIRECTIONS:
        cut = subspace(mine, sites, Project(directions=directions), world, other=found.ranked_by(directions))
        if world.rank == world.size - 1:
            save_subspace(folder / f"{directions}-{world.size}.safetensors", cut)
    policy.release()


def test_directions_of_gradient_and_activation_have_the_same_bits_at_every_world_size(tmp_path):
    model, sizes = save_tiny_model(tmp_path / "model"), (1, 2, 4)
    for world_size in sizes:
        run_on_ranks(world_size, tmp_path / f"store-{world_size}", keep_effects, model, tmp_path)
    prints = [
        {fingerprint(load_subspace(tmp_path / f"{directions}-{size}.safetensors")) for size in sizes}
        for directions in OTHER_DIRECTIONS
    ]
    assert [len(each) for each in prints] == [1, 1]
    assert prints[0] != prints[1]


def test_every_kind_of_architecture_can_be_sharded(tmp_path):
    run_on_ranks(2, tmp_path / "store", check_families)


def test_a_fault_of_one_rank_hangs_no_other(tmp_path):
    run_on_ranks(2, tmp_path / "store", check_faults)


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
    world = World(dist.get_rank(), dist.get_world_size(), CPU)
    model = tiny_model()
    sites = discover_sites(model)
    engine = frozen_engine(model, SHARDED, torch.float32) if is_sharded else None
    policy = SimpleNamespace(model=model, engine=engine, pad_token_id=0)
    config = Calibrate(num_shards=3, batch_size=2)
    with Unfinished(folder, config.num_shards, world) as left:
        stop = Stop(last_round)
        context = StageContext(folder, 0, world, stop_if_asked=stop)
        gradients = calibrate(policy, random_examples(11), sites, config, context, taken=left.num_taken)
        plan = ShardPlan(config.num_shards, lambda width: width // 2, left.shards, left.keep)
        sketches = sketch(gradients, sites, Sketch(), world, plan)
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
