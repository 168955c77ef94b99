import dataclasses
import json
import logging

import pytest
import torch
from emulated import wait_for

from spd_dist.config import Config
from spd_dist.distributed.world import World
from spd_dist.errors import ConfigError, DataError, StopRequested
from spd_dist.mechanism.mechanism_stage import CHANGES_NOTHING
from spd_dist.stages.finetune.train_student import NOT_OF_RESULTS
from spd_dist.storage.attempts import AttemptClock, stage_cost
from spd_dist.storage.records import SCHEMA
from spd_dist.storage.run_folder import RunFolder
from spd_dist.storage.settings import MAY_CHANGE, fixed_settings, result_settings, settings_hash

ALONE = World(rank=0, size=1, device=torch.device("cpu"))


def plain(**changes):
    config = dataclasses.asdict(Config())
    for key, value in changes.items():
        section, _, name = key.partition("__")
        if name:
            config[section][name] = value
        else:
            config[section] = value
    return config


def opened(path, **changes):
    return RunFolder(path, plain(**changes), ALONE)


def finished(folder, stage="generate", inputs=None):
    inputs = inputs or {"config": "c1", "project": "p1"}
    (folder.start(stage, inputs) / "completions").mkdir()
    (folder.folder(stage) / "completions" / "a.jsonl").write_text("a\n")
    (folder.folder(stage) / "summary.json").write_text("{}")
    folder.finish(stage, inputs, ["completions", "summary.json"], seconds=1.5, extra={"tokens": 7})
    return inputs


def test_opening_writes_the_config_and_the_environment(tmp_path):
    opened(tmp_path / "run", finetune__num_epochs=3)
    assert "num_epochs: 3" in (tmp_path / "run" / "config.yaml").read_text()
    environment = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert environment["world_size"] == 1
    assert environment["versions"]["torch"] == torch.__version__.partition("+")[0] or torch.__version__
    assert len(environment["git_commit"]) == 40
    assert environment["earlier"] == []


def test_the_environment_keeps_what_earlier_attempts_ran_on(tmp_path):
    for _ in range(3):
        opened(tmp_path)
    environment = json.loads((tmp_path / "environment.json").read_text())
    assert [sorted(attempt) for attempt in environment["earlier"]] == [sorted(environment.keys() - {"schema"})] * 2
    assert [attempt["earlier"] for attempt in environment["earlier"]] == [[], []]


def test_a_folder_of_another_version_is_refused_with_both_versions_and_the_remedy(tmp_path):
    opened(tmp_path / "run")
    file = tmp_path / "run" / "environment.json"
    file.write_text(file.read_text().replace(f'"schema": {SCHEMA}', '"schema": 7'))
    with pytest.raises(
        DataError, match=rf"run.environment.json is of version 7 .* version {SCHEMA}; .* another run_dir"
    ):
        opened(tmp_path / "run")
    file.unlink()  # before there were versions
    with pytest.raises(DataError, match=rf"run is of version 1 .* version {SCHEMA}; .* another run_dir"):
        opened(tmp_path / "run")


def test_a_folder_of_another_config_is_refused_with_the_keys_that_differ(tmp_path):
    finished(opened(tmp_path))
    differing = r"another config \(finetune.num_epochs is 5 there and 3 now; seed is 42 there and 1 now\)"
    with pytest.raises(ConfigError, match=rf"{differing}; .* run_dir=FOLDER, .* --restart-from generate, .*/replaced"):
        opened(tmp_path, finetune__num_epochs=3, seed=1)
    assert "num_epochs: 5" in (tmp_path / "config.yaml").read_text()


def test_a_folder_in_which_nothing_was_finished_takes_another_config_and_says_so(tmp_path, caplog):
    folder = opened(tmp_path)
    (folder.start("generate", {"config": "c1"}) / "part").touch()
    with caplog.at_level("INFO"):
        taken = opened(tmp_path, finetune__num_epochs=3)
    assert "so this config takes it over: finetune.num_epochs is 5 there and 3 now" in caplog.text
    assert "num_epochs: 3" in (tmp_path / "config.yaml").read_text()
    assert (taken.start("generate", {"config": "c1"}) / "part").exists()
    assert not (taken.start("generate", {"config": "c2"}) / "part").exists()


def test_a_key_that_the_older_config_lacks_counts_as_a_difference(tmp_path):
    finished(RunFolder(tmp_path, {"seed": 1}, ALONE))
    with pytest.raises(ConfigError, match="extra is None there and True now"):
        RunFolder(tmp_path, {"seed": 1, "extra": True}, ALONE)


def test_keys_that_do_not_change_results_may_change(tmp_path):
    opened(tmp_path, metrics__wandb="disabled")
    opened(tmp_path, metrics__wandb="offline", generate__batch_size=3, distributed__threads=1, run_dir=str(tmp_path))
    assert "wandb: offline" in (tmp_path / "config.yaml").read_text()


@pytest.mark.parametrize("section", ["generate", "evaluate"])
def test_a_batch_that_is_a_fixed_shape_is_a_part_of_the_result(tmp_path, section):
    fixed, other = ({f"{section}__batch_invariant": True, f"{section}__batch_size": size} for size in (32, 16))
    assert settings_hash(plain(**fixed), section) != settings_hash(plain(**other), section)
    finished(opened(tmp_path, **fixed))
    with pytest.raises(ConfigError, match=rf"another config \({section}.batch_size is 32 there and 16 now\)"):
        opened(tmp_path, **other)


def test_every_key_that_may_change_is_a_key_of_the_config():
    for key in MAY_CHANGE:
        value = plain()
        for name in key.split("."):
            value = value[name]


CHANGES_RESULTS = {
    "run_dir": False,
    "rounds": False,  # how often the method is done, as the next two say how many arms: more results, each the same
    "evaluate.arms": False,
    "evaluate.temperatures": False,
    "metrics": False,
    "model.cache_dir": False,
    "calibrate.batch_size": False,
    "calibrate.checkpointing": False,
    "generate.placement": False,
    "generate.batch_size": False,  # unless `batch_invariant` fixes the shapes
    "generate.compile": False,
    "generate.num_tasks": False,
    "generate.task_index": False,
    "generate.vllm_python": False,  # while the engine is the same
    "generate.tensor_parallel": False,
    "generate.pipeline_parallel": False,
    "generate.server": False,
    "generate.engine_timeout_seconds": False,
    "generate.max_empty_rate": False,  # these four end a run, or warn
    "generate.max_repetition_rate": False,
    "generate.max_length_rate": False,
    "generate.max_unfinished_rate": False,
    "finetune.micro_batch_size": False,
    "finetune.checkpointing": False,
    "finetune.offload_activations": False,
    "finetune.checkpoint_every": False,
    "finetune.keep_checkpoints": False,
    "finetune.keep_every": False,
    "finetune.packing": False,
    "finetune.merge": False,
    "finetune.divergence": True,  # of what a student learns
    "finetune.num_on_policy_iterations": True,
    "project.match_kl": True,
    "evaluate.allow_code_execution": False,
    "evaluate.batch_size": False,
    "evaluate.num_coloured": True,  # of what the means of token effects are taken over
    "evaluate.placement": False,
    "mechanism": True,
    "mechanism.batch_size": False,
    "mechanism.share_prefix": False,
    "mechanism.in_run": False,
    "distributed.zero_stage": False,
    "distributed.timeout_seconds": False,
    "distributed.time_limit_seconds": False,
    "distributed.time_margin_seconds": False,
    "distributed.threads": False,
    "distributed.interface": False,
}
"""Of each key that may change when a run goes on."""


@pytest.mark.parametrize("key", sorted({*MAY_CHANGE, *CHANGES_RESULTS}))
def test_a_key_that_may_change_when_a_run_goes_on_may_change_results(key):
    engine = {"generate__engine": "hf", "evaluate__engine": "hf"}
    before, after = plain(**engine), plain(**engine, **{key.replace(".", "__", 1): "another"})
    assert fixed_settings(before) == fixed_settings(after)
    assert (result_settings(before) != result_settings(after)) == CHANGES_RESULTS[key]
    assert settings_hash(before, *before) == settings_hash(after, *after), "each stage has it among its own inputs"


def test_what_a_stage_says_changes_no_result_of_it_is_what_the_list_says():
    of_list = {key for key in MAY_CHANGE if not CHANGES_RESULTS[key]}
    assert {f"mechanism.{key}" for key in CHANGES_NOTHING} == {key for key in of_list if key.startswith("mechanism.")}
    trained = NOT_OF_RESULTS - {"num_on_policy_iterations"}  # of one iteration it changes no weight, of all it does
    assert {f"finetune.{key}" for key in trained} == {key for key in of_list if key.startswith("finetune.")}


def test_settings_hashes_see_their_sections_and_only_what_changes_results():
    assert settings_hash(plain(), "generate", "seed") == settings_hash(
        plain(generate__batch_size=1, seed=42), "generate", "seed"
    )
    assert settings_hash(plain(), "generate") == settings_hash(plain(seed=1), "generate")
    assert settings_hash(plain(), "generate", "seed") != settings_hash(plain(seed=1), "generate", "seed")
    assert settings_hash(plain(), "generate") != settings_hash(plain(generate__top_p=0.5), "generate")
    assert "generate.batch_size" not in result_settings(plain())
    assert "run_dir" not in result_settings(plain())


def test_a_run_folder_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(ConfigError, match=r"run_dir: .*run is a file; name a folder"):
        opened(tmp_path / "run")


def test_a_config_that_cannot_be_read_is_named(tmp_path):
    opened(tmp_path)
    (tmp_path / "config.yaml").write_text("a: [")
    with pytest.raises(DataError, match=r"config.yaml is corrupt"):
        opened(tmp_path)


def test_a_finished_stage_is_complete_and_its_manifest_says_from_what(tmp_path):
    folder = opened(tmp_path)
    inputs = finished(folder)
    assert folder.is_complete("generate", inputs)
    manifest = folder.manifest("generate")
    assert manifest.inputs == inputs
    assert set(manifest.outputs) == {"completions/a.jsonl", "summary.json"}
    assert (manifest.seconds, manifest.world_size, manifest.extra) == (1.5, 1, {"tokens": 7})


def test_a_stage_of_another_arm_lives_beside(tmp_path):
    folder = opened(tmp_path)
    inputs = finished(folder, "arms/psr/generate")
    assert folder.is_complete("arms/psr/generate", inputs)
    assert not folder.is_complete("generate", inputs | {"config": "c2"})


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda stage: (stage / "summary.json").unlink(), "its output summary.json is gone"),
        (lambda stage: (stage / "summary.json").write_text("{ }"), "its output summary.json was changed"),
        (
            lambda stage: (stage / "completions" / "a.jsonl").write_text("b\n"),
            "its output completions/a.jsonl was changed",
        ),
        (lambda stage: (stage / "manifest.json").unlink(), None),
    ],
)
def test_a_stage_whose_outputs_are_not_as_they_were_is_done_again_and_the_log_says_why(
    tmp_path, caplog, damage, reason
):
    caplog.set_level(logging.INFO, "spd_dist")
    folder = opened(tmp_path)
    inputs = finished(folder)
    damage(folder.folder("generate"))
    assert not folder.is_complete("generate", inputs)
    assert reason is None or f"generate: done again, since {reason}" in caplog.text


def test_a_stage_whose_inputs_changed_is_done_again_from_nothing(tmp_path, caplog):
    caplog.set_level(logging.INFO, "spd_dist")
    folder = opened(tmp_path)
    inputs = finished(folder)
    changed = {**inputs, "project": "p2", "new": "n"}
    assert not folder.is_complete("generate", changed)
    assert "generate: done again, since its input new, project changed" in caplog.text
    folder.start("generate", changed)
    assert [file.name for file in folder.folder("generate").iterdir()] == ["started.json"]
    assert not folder.is_complete("generate", inputs)


def test_unfinished_work_is_kept_for_the_same_inputs_and_removed_for_others(tmp_path):
    folder = opened(tmp_path)
    part = folder.start("generate", {"config": "c1"}) / "part.jsonl"
    part.write_text("a\n")
    folder.start("generate", {"config": "c1"})
    assert part.read_text() == "a\n"
    folder.start("generate", {"config": "c2"})
    assert not part.exists()
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        ".generate.lock", "config.yaml", "environment.json", "generate",
    ]  # fmt: skip


def test_what_attempts_took_is_added_up_until_the_stage_is_finished(tmp_path, monkeypatch):
    monkeypatch.setattr("spd_dist.storage.attempts.SECONDS_BETWEEN", 0.01)
    folder, two_ranks = opened(tmp_path), dataclasses.replace(ALONE, size=2)
    work = folder.start("generate", {"config": "c1", "project": "p1"})
    with pytest.raises(StopRequested), AttemptClock(work, two_ranks, None):
        raise StopRequested("asked to")
    stopped = stage_cost(work)
    assert stopped.device_seconds == 2 * stopped.seconds > 0
    with AttemptClock(work, ALONE, None):
        wait_for(lambda: stage_cost(work).seconds > stopped.seconds + 0.02, 60)  # on disk while it goes on
    both = stage_cost(work)
    assert both.device_seconds == pytest.approx(stopped.seconds + both.seconds)
    with AttemptClock(work, ALONE, 7):
        pass
    task = stage_cost(work)
    assert task.seconds == both.seconds, "tasks may run beside each other"
    assert task.device_seconds > both.device_seconds
    finished(folder)
    with AttemptClock(work, ALONE, 8):
        pass
    assert not (work / "attempts").exists()
    assert stage_cost(work) == (0, 0)


def test_damaged_work_is_never_resumed_from(tmp_path):
    folder = opened(tmp_path)
    inputs = finished(folder)
    (folder.folder("generate") / "completions" / "a.jsonl").write_text("spoilt\n")
    folder.start("generate", inputs)
    assert not (folder.folder("generate") / "completions").exists()


def test_work_that_another_task_finished_meanwhile_is_kept(tmp_path):
    folder = opened(tmp_path)
    inputs = finished(folder)
    folder.start("generate", inputs)  # another task of the array looked before the manifest was there
    assert (folder.folder("generate") / "completions" / "a.jsonl").exists()
    assert folder.is_complete("generate", inputs)


def test_the_task_that_finishes_second_changes_nothing(tmp_path):
    first, second = opened(tmp_path), opened(tmp_path)
    second.start("generate", {"config": "c1", "project": "p1"})
    inputs = finished(first)
    before = first.manifest("generate")
    assert second.finish("generate", inputs, ["summary.json"], seconds=9.0) == before
    assert first.manifest("generate") == before
    assert not (tmp_path / "generate" / "started.json").exists()


def test_the_interpreter_of_vllm_may_change_and_the_engine_may_not(tmp_path):
    finished(opened(tmp_path, generate__vllm_python="/a/python"))
    opened(tmp_path, generate__vllm_python="/b/python")
    opened(tmp_path, generate__vllm_python="/b/python", generate__engine="vllm")
    with pytest.raises(ConfigError, match=r"another config \(.*generate.engine is 'vllm' there and 'hf' now\)"):
        opened(tmp_path)
    hashes = {
        settings_hash(plain(**settings), "generate")
        for settings in (
            {"generate__vllm_python": "/a/python"},
            {"generate__vllm_python": "/b/python"},
            {"generate__engine": "vllm", "generate__vllm_python": "/b/python"},
        )
    }
    assert len(hashes) == 1
    assert hashes.isdisjoint({settings_hash(plain(), "generate")})
    assert settings_hash(plain(generate__engine="hf", generate__vllm_python="/a/python"), "generate") == settings_hash(
        plain(), "generate"
    )


def test_the_limits_of_a_corpus_may_change(tmp_path):
    opened(tmp_path)
    opened(tmp_path, generate__max_empty_rate=0.6, generate__max_repetition_rate=0.7, generate__max_length_rate=0.8)


def test_a_stage_is_not_finished_without_its_outputs(tmp_path):
    folder = opened(tmp_path)
    folder.start("generate", {})
    with pytest.raises(DataError, match=r"summary.json is missing: the run is not finished"):
        folder.finish("generate", {}, ["summary.json"], seconds=1.0)
    with pytest.raises(DataError, match=r"manifest.json is missing"):
        folder.manifest("generate")


def test_the_output_hash_follows_the_bytes_and_not_the_time(tmp_path):
    first, second, third = (opened(tmp_path / name) for name in "abc")
    finished(first)
    finished(second, inputs={"config": "other"})
    assert first.output_hash("generate") == second.output_hash("generate")
    (third.start("generate", {}) / "summary.json").write_text("{ }")
    third.finish("generate", {}, ["summary.json"], seconds=1.0)
    assert first.output_hash("generate") != third.output_hash("generate")


def test_the_hash_of_some_outputs_sees_no_other(tmp_path):
    first, second = opened(tmp_path / "a"), opened(tmp_path / "b")
    inputs = finished(first)
    (second.start("generate", inputs) / "completions").mkdir()
    (second.folder("generate") / "completions" / "a.jsonl").write_text("a\n")
    (second.folder("generate") / "summary.json").write_text('{"seconds": 2}')
    second.finish("generate", inputs, ["completions", "summary.json"], seconds=1.0)
    assert first.output_hash("generate") != second.output_hash("generate")
    corpus = "completions/a.jsonl"
    assert first.output_hash("generate", corpus) == second.output_hash("generate", corpus)
