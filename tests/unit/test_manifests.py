"""Finished work is found by what it was made from, copied whole, and published by whoever is first."""

import logging
import threading
from pathlib import Path

import pytest
import torch

from spd_dist.distributed.world import World
from spd_dist.errors import MissingError
from spd_dist.storage.manifests import (
    MANIFEST,
    find_finished,
    finished_stages,
    inode_of,
    publish,
    read_manifest,
    set_aside,
    take_over,
    wait_until_seen,
    why_not_complete,
)
from spd_dist.storage.run_folder import RunFolder

ALONE = World(rank=0, size=1, device=torch.device("cpu"))
INPUTS = {"settings": "s1", "train": "t1"}


def opened(path: Path, **settings: object) -> RunFolder:
    return RunFolder(path, {"seed": 1}, ALONE, **settings)


def do(folder: RunFolder, stage: str, text: str = "a", inputs: dict[str, str] = INPUTS) -> Path:
    place = folder.start(stage, inputs)
    (place / "completions").mkdir(exist_ok=True)
    (place / "completions" / "a.jsonl").write_text(text)
    (place / "checkpoints").mkdir(exist_ok=True)
    folder.finish(stage, inputs, ["completions"], seconds=1.5)
    return place


def test_what_another_arm_made_from_the_same_is_copied_and_takes_no_time(tmp_path, caplog):
    folder = opened(tmp_path)
    do(folder, "arms/psr/generate")
    with caplog.at_level(logging.INFO):
        assert folder.is_complete("arms/termination/generate", INPUTS)
    assert f"complete, taken from {tmp_path / 'arms/psr/generate'}" in caplog.text
    copy = tmp_path / "arms/termination/generate"
    assert (copy / "completions/a.jsonl").read_text() == "a"
    assert not (copy / "checkpoints").exists()
    manifest = read_manifest(copy)
    assert (manifest.stage, manifest.seconds) == ("arms/termination/generate", 0.0)
    assert folder.output_hash("arms/termination/generate") == folder.output_hash("arms/psr/generate")


def test_another_run_is_looked_at_only_if_it_is_named_and_only_for_the_same_inputs(tmp_path):
    do(opened(tmp_path / "one"), "project")
    assert not opened(tmp_path / "two").is_complete("project", INPUTS)
    two = opened(tmp_path / "two", others=[tmp_path / "nowhere", tmp_path / "one"])
    assert not two.is_complete("project", INPUTS | {"train": "t2"})
    assert two.is_complete("project", INPUTS)


def test_damaged_work_is_not_taken_over(tmp_path):
    place = do(opened(tmp_path / "one"), "project")
    (place / "completions" / "a.jsonl").write_text("b")
    assert find_finished([tmp_path / "one"], INPUTS) is None


def test_unfinished_work_of_the_stage_gives_way_to_finished_work_of_another(tmp_path):
    folder = opened(tmp_path)
    (folder.start("arms/ssd/generate", INPUTS) / "half").write_text("")
    do(folder, "arms/psr/generate")
    assert folder.is_complete("arms/ssd/generate", INPUTS)
    assert not (tmp_path / "arms/ssd/generate/half").exists()


def test_jobs_work_in_folders_of_their_own_and_the_first_one_publishes(tmp_path):
    psr, random = (opened(tmp_path, job=job) for job in ("psr", "random"))
    places = [psr.start("project", INPUTS), random.start("project", INPUTS)]
    assert places == [tmp_path / "jobs/psr/project", tmp_path / "jobs/random/project"]
    for place in places:
        (place / "subspace").write_text("same")
    assert not psr.is_complete("project", INPUTS)
    psr.finish("project", INPUTS, ["subspace"], seconds=1)
    published = (tmp_path / "project" / MANIFEST).stat().st_mtime_ns
    random.finish("project", INPUTS, ["subspace"], seconds=2)
    assert random.is_complete("project", INPUTS)
    assert (tmp_path / "project" / MANIFEST).stat().st_mtime_ns == published
    assert not any(place.exists() for place in places)


def test_what_another_job_published_meanwhile_is_not_copied_onto_itself(tmp_path, caplog):
    spd = opened(tmp_path, job="spd")
    do(opened(tmp_path), "project")
    before = inode_of(tmp_path / "project")
    with caplog.at_level(logging.INFO):
        assert spd._take_over("project", INPUTS) == spd.folder("project")
        assert spd.is_complete("project", INPUTS)
    assert "taken from" not in caplog.text
    assert inode_of(tmp_path / "project") == before


def test_what_is_complete_is_not_replaced_by_a_copy(tmp_path):
    source, target = (do(opened(tmp_path / name), "project") for name in ("one", "two"))
    before = inode_of(target)
    assert take_over(source, target, "project")
    assert inode_of(target) == before
    assert [file.name for file in target.parent.glob(".*")] == [".project.lock"]


def test_a_source_that_vanished_is_not_taken_and_leaves_nothing(tmp_path):
    source = do(opened(tmp_path / "one"), "project")
    (source / "completions" / "a.jsonl").unlink()
    assert not take_over(source, tmp_path / "two/project", "project")
    assert not take_over(tmp_path / "nowhere", tmp_path / "two/project", "project")
    assert list((tmp_path / "two").iterdir()) == []


def test_only_the_folder_that_was_judged_is_set_aside(tmp_path):
    folder, judged = tmp_path / "project", inode_of(do(opened(tmp_path), "project"))
    folder.rename(tmp_path / "kept")  # so that no other gets its inode
    set_aside(folder, judged)
    do(opened(tmp_path), "project", "of another job")
    set_aside(folder, judged)
    assert (folder / "completions/a.jsonl").read_text() == "of another job"
    set_aside(folder, inode_of(folder))
    assert not folder.exists()


def test_finished_stages_are_those_of_all_arms_and_rounds_and_no_job_at_work(tmp_path):
    stages = ["project", "evaluate/spd", "arms/spd@rank=4/project", "rounds/2/finetune", "rounds/2/arms/psr/generate"]
    work = ["jobs/spd/project", "finetune/checkpoints/step_1", "rounds/2/jobs/spd/evaluate/spd", ".project.partial"]
    for stage in [*stages, *work]:
        (tmp_path / stage).mkdir(parents=True)
        (tmp_path / stage / MANIFEST).write_text("{}")
    assert sorted(finished_stages(tmp_path)) == sorted(tmp_path / stage for stage in stages)


def test_published_work_takes_the_place_of_what_is_stale(tmp_path):
    do(opened(tmp_path), "project", "old", INPUTS | {"train": "t0"})
    do(opened(tmp_path, job="spd"), "project", "new")
    assert (tmp_path / "project/completions/a.jsonl").read_text() == "new"
    assert why_not_complete(tmp_path / "project", INPUTS) is None


def test_a_killed_job_goes_on_in_its_own_folder(tmp_path):
    (opened(tmp_path, job="spd").start("generate", INPUTS) / "half").write_text("x")
    assert (opened(tmp_path, job="spd").start("generate", INPUTS) / "half").read_text() == "x"
    place = do(opened(tmp_path, job="spd"), "generate")
    assert not place.exists()
    assert (tmp_path / "generate/half").read_text() == "x"


def test_publishing_twice_is_publishing_once(tmp_path):
    first, second = (do(opened(tmp_path / name), "project") for name in ("a", "b"))
    publish(first, tmp_path / "c/project")
    publish(second, tmp_path / "c/project")
    assert why_not_complete(tmp_path / "c/project", INPUTS) is None
    assert not first.exists()
    assert not second.exists()


def test_what_another_host_wrote_is_waited_for_and_named_if_it_never_comes(tmp_path):
    (tmp_path / "here").touch()
    later = threading.Timer(0.3, (tmp_path / "later").touch)
    later.start()
    wait_until_seen(tmp_path, ["here", "later"])
    assert (tmp_path / "later").exists()
    with pytest.raises(MissingError, match="never is missing: the run is not finished"):
        wait_until_seen(tmp_path, ["here", "never"], seconds=0.2)
