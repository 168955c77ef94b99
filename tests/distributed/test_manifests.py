"""Array jobs of one seed, at the same moment: whoever is first, all find whole stages, and none destroys another's."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch.distributed as dist
from ranks import run_on_ranks

from spd_dist.storage.manifests import (
    MANIFEST,
    Manifest,
    described,
    find_finished,
    finished_stages,
    publish,
    take_over,
    why_not_complete,
)
from spd_dist.storage.records import write_record

NUM_JOBS, NUM_TIMES = 4, 10
INPUTS, OTHERS = {"settings": "s1"}, {"settings": "s0"}
NAMES = [f"{number}.bin" for number in range(8)]


def make(stage: Path, inputs: dict[str, str] = INPUTS) -> Path:
    stage.mkdir(parents=True)
    for name in NAMES:
        (stage / name).write_bytes(name.encode() * 10_000)
    outputs = described(stage, [stage / name for name in NAMES])
    write_record(stage / MANIFEST, Manifest(stage.name, inputs, outputs, 1.0, 1.0, 1, "2026-01-01T00:00:00Z", {}))
    return stage


def take(one: Path, seed: Path) -> None:
    """What a job does for a stage that it lacks: seed 1 has it, or another job of this seed by now."""
    source, target = find_finished([seed, one], INPUTS), seed / "project"
    assert source is not None
    assert source == target or take_over(source, target, "project")


def take_over_together(folder: Path) -> None:
    for number in range(NUM_TIMES):
        dist.barrier()
        take(folder / "seed_1", folder / f"new_{number}")
        for name in NAMES:  # the job goes on from what it took, while others still take
            assert (folder / f"new_{number}" / "project" / name).read_bytes() == name.encode() * 10_000


def take_over_what_is_stale_together(folder: Path) -> None:
    for number in range(NUM_TIMES):
        if dist.get_rank() == 0:
            make(folder / f"stale_{number}" / "project", OTHERS)
        dist.barrier()
        take(folder / "seed_1", folder / f"stale_{number}")
        dist.barrier()
        assert why_not_complete(folder / f"stale_{number}" / "project", INPUTS) is None


def publish_together(folder: Path) -> None:
    for number in range(NUM_TIMES):
        seed = folder / f"published_{number}"
        work = make(seed / "jobs" / str(dist.get_rank()) / "generate")
        dist.barrier()
        publish(work, seed / "generate")
        assert not work.exists()
        for name in NAMES:
            assert (seed / "generate" / name).read_bytes() == name.encode() * 10_000


def look_while_another_works(folder: Path) -> None:
    """Rank 0 writes and prunes checkpoints as a job, and publishes again and again; the others look on."""
    seed, done = folder / "busy", folder / "done"
    if dist.get_rank() == 0:
        for number in range(3 * NUM_TIMES):
            make(seed / "jobs/spd/finetune/checkpoints" / str(number))
            publish(make(seed / "jobs/spd/arms/psr/generate", {"number": str(number)}), seed / "arms/psr/generate")
            shutil.rmtree(seed / "jobs/spd/finetune/checkpoints" / str(number))
        done.touch()
    else:
        while not done.exists():
            assert find_finished([seed], OTHERS) is None


def race(folder: Path) -> None:
    take_over_together(folder)
    take_over_what_is_stale_together(folder)
    publish_together(folder)
    look_while_another_works(folder)


def test_jobs_that_find_take_and_publish_the_same_stage_at_once_all_have_it_whole(tmp_path):
    make(tmp_path / "seed_1/project")
    run_on_ranks(NUM_JOBS, tmp_path / "store", race, tmp_path)
    kinds = ("new", "stale", "published")
    for seed in (tmp_path / f"{kind}_{number}" for kind in kinds for number in range(NUM_TIMES)):
        (stage,) = finished_stages(seed)
        assert why_not_complete(stage, INPUTS) is None
        assert not [file.name for file in seed.iterdir() if file.name.startswith(".")], "a job left its copy behind"
