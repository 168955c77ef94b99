"""Four ranks see the run folder that one rank sees."""

import os
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ranks import run_on_ranks

from spd_dist.distributed.heartbeat import Heartbeat
from spd_dist.distributed.world import World
from spd_dist.errors import ConfigError, DataError
from spd_dist.storage import run_folder
from spd_dist.storage.manifests import read_manifest
from spd_dist.storage.restart import kept_status
from spd_dist.storage.run_folder import RunFolder


def use_the_folder(path: Path) -> None:
    world = World(dist.get_rank(), dist.get_world_size(), torch.device("cpu"))
    folder = RunFolder(path, {"seed": 1}, world)
    assert not folder.is_complete("generate", {"config": "c"})
    stage = folder.start("generate", {"config": "c"})
    (stage / f"rank_{world.rank}.txt").write_text(f"{world.rank}")  # the folder is there on every rank
    manifest = folder.finish(
        "generate", {"config": "c"}, [f"rank_{rank}.txt" for rank in range(world.size)], seconds=1.0
    )
    assert manifest.world_size == world.size
    assert set(manifest.outputs) == {f"rank_{rank}.txt" for rank in range(world.size)}
    assert folder.is_complete("generate", {"config": "c"})
    assert folder.output_hash("generate") == RunFolder(path, {"seed": 1}, world).output_hash("generate")
    with pytest.raises(ConfigError, match="seed is 1 there and 2 now"):  # found by rank 0, raised by all
        RunFolder(path, {"seed": 2}, world)
    with pytest.raises(DataError, match=r"gone.json is missing"):
        folder.finish("generate", {}, ["gone.json"], seconds=1.0)
    kind = NotADirectoryError if world.rank == 0 else RuntimeError  # rank 0's error, told to all
    with (
        pytest.raises(kind, match="Not a directory"),
        kept_status(stage / "rank_0.txt" / "status.json", Heartbeat(stage / "heartbeat", world), "evaluate"),
    ):
        pytest.fail("a rank went on though its status can't be written")
    dist.barrier()
    if world.rank == world.size - 1:
        os.remove(stage / "rank_0.txt")
    dist.barrier()
    assert not folder.is_complete("generate", {"config": "c"})
    # One rank's host never sees a file that the others see: all end, and none goes on alone.
    if world.rank == 1:
        run_folder.wait_until_seen = partial(run_folder.wait_until_seen, seconds=0.2)
    else:
        run_folder.wait_until_seen = lambda *_: None
    with pytest.raises(DataError, match=r"rank_0.txt is missing"):
        folder.manifest("generate")


def test_every_rank_hears_what_rank_zero_finds(tmp_path):
    run_on_ranks(4, tmp_path / "store", use_the_folder, tmp_path / "run")
    assert read_manifest(tmp_path / "run" / "generate").world_size == 4
