"""What the doctor says of hosts that differ, one fault at a time."""

from __future__ import annotations

import dataclasses

import pytest
from launching import SMALL
from tiny import save_tiny_model

from spd_dist.errors import DataError
from spd_dist.models.policy import locate_model
from spd_dist.overrides import load_config
from spd_dist.preflight import Facts, Meeting, Needs, gather_facts, judge

FINE = Meeting({}, {}, True, 12.0, 0.1, [0.0, 0.01, 0.0, -0.01])


def hosts(**changes: object) -> list[Facts]:
    """Two hosts of two ranks each; `changes` are those of the last rank, or of both ranks of host b by a tuple."""
    ranks = [
        Facts(
            rank=rank, host="ab"[rank // 2], python="3.11", code="c1", versions={"torch": "2.13", "peft": "0.21"},
            config="f1", device="H100", num_devices=2, local_size=2, num_cores=64, free_memory_gib=70.0,
            free_disk_gib={"run_dir": 100.0, "temporary": 50.0}, model_gib=40.0,
            reachable={"model": "Llama, 9 bytes", "train rows": "10, x"},
        )
        for rank in range(4)
    ]  # fmt: skip
    return [*ranks[:2], *(dataclasses.replace(one, **changes) for one in ranks[2:])]


def wrong(facts: list[Facts], meeting: Meeting | None = FINE, needs: Needs | None = None) -> list[tuple[str, str, str]]:
    found = judge(facts, meeting, needs or Needs())
    return [(one.check, one.where, one.what) for one in found if not one.is_right]


def test_hosts_that_agree_are_right_in_every_check():
    assert wrong(hosts()) == []
    found = {one.check: one.what for one in judge(hosts(), FINE, Needs())}
    assert found["ranks"] == "2 a host, 4 in all"
    assert found["all-reduce"] == "12.00 GB/s, 0.10 ms"
    assert found["memory"] == (
        "70.0 GiB of device memory free for a rank, at least; the whole weights (40.0 GiB) fit on every rank"
    )
    assert found["disk: run_dir"] == "100.0 GiB free on its disk, at least"
    assert found["code"] == "c1, hash of the package's files, on every host the same; it is no git commit"
    assert found["config"] == "f1, hash of the settings that results depend on"
    assert {"code", "python", "packages", "config", "shared folder", "clock", "model", "train rows"} <= found.keys()


@pytest.mark.parametrize(
    ("changes", "check", "says"),
    [
        ({"code": "c2"}, "code", "c2, elsewhere c1; the same commit must be checked out on every host"),
        ({"python": "3.12"}, "python", "3.12, elsewhere 3.11; use one virtual environment"),
        ({"versions": {"torch": "2.12", "peft": "0.21"}}, "packages", "torch 2.12, elsewhere torch 2.13; use one"),
        ({"versions": {"torch": "2.13"}}, "packages", "less, elsewhere peft 0.21; use one"),
        ({"config": "f2"}, "config", "f2, elsewhere f1; the hosts read different files or words"),
        ({"device": "A100"}, "device", "2 x A100, elsewhere 2 x H100; every host must show as many devices, of one"),
        ({"num_devices": 7}, "device", "7 x H100, elsewhere 2 x H100; every host must show as many"),
        ({"device": "cpu", "num_devices": 0, "num_cores": 1}, "cores", "2 ranks on 1 cores"),
        ({"free_memory_gib": 9.0}, "memory", "rank 2 has 9.0 GiB free, its part of the weights is 10.0 GiB; end what"),
        ({"free_disk_gib": {"run_dir": 1.0, "temporary": 9.0}}, "disk: run_dir", "1.00 GiB free, 5 needed; make room"),
        ({"free_disk_gib": {"run_dir": 9.0, "temporary": 0.5}}, "disk: temporary", "0.50 GiB free, 1 needed"),
        ({"faults": {"run_dir": "/runs cannot be made: x"}}, "run_dir", "/runs cannot be made: x"),
        ({"reachable": {}, "faults": {"model": "no weights"}}, "model", "no weights"),
        ({"reachable": {"train rows": "9, y"}}, "train rows", "9, y, elsewhere 10, x; the hosts see other files"),
    ],
)
def test_a_host_that_differs_is_named_with_what_is_wrong_and_what_to_do(changes, check, says):
    found = {one: (where, what) for one, where, what in reversed(wrong(hosts(**changes)))}
    where, what = found[check]
    assert where == "b"
    assert what.startswith(says)


def test_a_host_with_more_ranks_than_devices_or_than_the_others_is_named():
    crowded = [*hosts(), dataclasses.replace(hosts()[3], rank=4)]
    found = wrong(crowded, None)
    assert ("device", "b", "3 ranks on 2 devices") in found
    assert [check for check, *_ in found] == ["device", "ranks"]


def test_weights_must_fit_where_they_are_not_sharded():
    assert wrong(hosts(), needs=Needs(is_sharded=True)) == []
    assert wrong(hosts(free_memory_gib=50.0), needs=Needs(is_sharded=False))[0][:2] == ("memory", "b")


@pytest.mark.parametrize(
    ("meeting", "check", "where", "says"),
    [
        (
            {"unseen": {2: [0, 1]}},
            "shared folder",
            "b",
            "does not see what a wrote; run_dir must be on a",
        ),
        ({"unwritable": {3: "/runs cannot be written: full"}}, "shared folder", "b", "/runs cannot be written: full"),
        ({"is_sum_right": False}, "all-reduce", "all 2 hosts", "the sum is wrong"),
        ({"gigabytes_per_second": 0.5}, "all-reduce", "all 2 hosts", "0.50 GB/s, 0.10 ms; 1 GB/s wanted: is distrib"),
        ({"clock_offset_seconds": [0.0, 0.0, -3.2, -3.2]}, "clock", "b", "-3.2 s against a; let NTP set it"),
    ],
)
def test_what_ranks_find_together_is_said_of_the_host_that_is_wrong(meeting, check, where, says):
    ((found, place, what),) = wrong(hosts(), dataclasses.replace(FINE, **meeting), Needs(gigabytes_per_second=1.0))
    assert (found, place) == (check, where)
    assert what.startswith(says)


def test_facts_are_of_this_host_and_inputs_that_are_missing_are_faults(tmp_path):
    model = save_tiny_model(tmp_path / "model")
    config = load_config(overrides=[*SMALL, f"model.name={model}", f"run_dir={tmp_path / 'run'}"])
    facts = gather_facts(config, {"RANK": "5", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2", "HOME": str(tmp_path)})
    assert (facts.rank, facts.local_size, facts.device, facts.faults) == (5, 2, "cpu", {})
    assert facts.reachable["model"].startswith("LlamaForCausalLM, ")
    assert facts.reachable["test rows"].startswith("6 rows, their hash ")
    assert facts == dataclasses.replace(facts, **dataclasses.asdict(facts))
    (tmp_path / "file").touch()
    lost = ["model.name=nowhere/model", "data.train=nowhere.jsonl", f"run_dir={tmp_path / 'file' / 'run'}"]
    facts = gather_facts(load_config(overrides=lost), {})
    assert {"model", "train rows", "run_dir"} <= facts.faults.keys()
    assert gather_facts(load_config(overrides=lost), {"LOCAL_RANK": "1"}).faults.keys() == {"run_dir"}


def test_the_hash_of_the_config_is_of_all_that_changes_results(tmp_path):
    def found(*words):
        config = load_config(overrides=[*SMALL, f"run_dir={tmp_path}", "project.mode=random", *words])
        return gather_facts(config, {"LOCAL_RANK": "1"}).config

    assert found("generate.batch_size=3", "mechanism.batch_size=3") == found()
    words = ["finetune.divergence=js", "finetune.num_on_policy_iterations=2", "project.match_kl=true"]
    assert len({found(), *map(found, words), found("mechanism.num_rows=50")}) == 5


def test_a_model_without_weights_is_named(tmp_path):
    folder = save_tiny_model(tmp_path / "model")
    assert locate_model(load_config(overrides=[f"model.name={folder}"]).model).num_bytes > 100_000
    for file in folder.glob("*.safetensors"):
        file.unlink()
    with pytest.raises(DataError, match=r"model\.name: .* holds no weights"):
        locate_model(load_config(overrides=[f"model.name={folder}"]).model)
    with pytest.raises(DataError, match="nowhere/model is no folder here, not in this host's cache"):
        locate_model(load_config(overrides=["model.name=nowhere/model"]).model)


def test_what_holds_the_limits_of_programs_is_said_of_tasks_that_run_them(tmp_path):
    model = save_tiny_model(tmp_path / "model")
    words = [*SMALL, f"model.name={model}", f"run_dir={tmp_path / 'run'}"]
    assert gather_facts(load_config(overrides=words), {}).sandbox == ""
    nowhere = [f"data.{split}={tmp_path}/nowhere.jsonl" for split in ("train", "test", "calibration")]
    facts = gather_facts(load_config(overrides=[*words, "data.task=mbpp", *nowhere]), {})
    assert ("CPU time by " in facts.sandbox) != ("sandbox" in facts.faults)
    (found,) = [
        one for one in judge(hosts(sandbox="bubblewrap; CPU time by watcher"), FINE, Needs()) if one.what[:2] == "bu"
    ]
    assert (found.check, found.is_right, found.where) == ("sandbox", True, "b")
