"""Every fault names the dotted key, its value, the rule and the nearest valid key."""

import dataclasses
import json
import re
from pathlib import Path

import pytest

from spd_dist.config import Config
from spd_dist.errors import ConfigError
from spd_dist.overrides import load_config, to_yaml

FAULTS = {
    "finetune.num_epoch=3": r"finetune\.num_epoch: unknown key \(value 3\); the nearest .* is finetune\.num_epochs",
    "num_epochs=3": r"num_epochs: unknown key .* nearest valid key is finetune\.num_epochs",
    "finetune.lr=1e-4": r"finetune\.lr: unknown key \(value 0\.0001\); the nearest .* is .*finetune\.learning_rate",
    "fintune.num_epochs=2": r"fintune: unknown key .* nearest valid key is finetune",
    "finetune.num_epochs=many": r"finetune\.num_epochs: 'many' is not valid; it must be an integer",
    "finetune.num_epochs=0": r"finetune\.num_epochs: 0 is out of bounds; it must be at least 1",
    "generate.top_p=1.5": r"generate\.top_p: 1\.5 is out of bounds; it must be at most 1",
    "finetune.learning_rate=0": r"finetune\.learning_rate: 0\.0 is out of bounds; it must be above 0",
    "finetune=3": r"finetune: 3 is not a section",
    "seed=1.5": r"seed: 1\.5 is not valid; it must be an integer",
    "distributed.zero_stage=4": r"distributed\.zero_stage: 4 is not valid; it must be one of 0, 1, 2, 3",
    "distributed.zero_stage=true": r"distributed\.zero_stage: True is not valid",
    "calibrate.layers=[1.5]": r"calibrate\.layers\[0\]: 1\.5 is not valid; it must be an integer or one of",
    "data={template: plain, system: Hello}": r"data\.system: Hello is not valid with data\.template=plain",
    "calibrate.layers=[]": r"calibrate\.layers: an empty list is not valid",
    "calibrate.layers=last": r"calibrate\.layers: 'last' is not valid; it must be a list, each an integer or one of",
    "metrics.wandb=false": r"metrics\.wandb: False is not valid; it must be one of auto, online, offline, disabled",
    "distributed.deepspeed=3": r"distributed\.deepspeed: 3 is not valid; it must be a mapping",
    "project.rank_rule=fixed": r"project\.rank: None is not valid with project\.rank_rule=fixed; set project\.rank=N",
    "project.rank=400": r"project\.rank_rule: half is not valid with project\.rank=400, .* set .*=fixed",
    "project.fraction=0.3": r"project\.rank_rule: half is not valid with project\.fraction=0\.3, .*=fraction",
    "project={energy: 0.9, rank_rule: fraction}": r"project\.rank_rule: fraction is not valid with project\.energy",
    "generate.task_index=1": r"generate\.task_index: 1 is out of bounds; it must be below generate\.num_tasks=1",
    "generate.engine=vllm": r"generate\.vllm_python: None is not valid with generate\.engine=vllm",
    "evaluate.num_samples=2": r"evaluate\.num_samples: 2 is not valid with evaluate\.temperature=0, since all",
    "generate={batch_invariant: true, engine: hf_cb}": r"generate\.batch_invariant: true is not valid with .*=hf_cb",
    "generate={batch_invariant: true, command: x}": r"with generate\.engine=command, .* set generate\.engine=hf or",
    "evaluate={batch_invariant: true, engine: hf_cb}": r"evaluate\.batch_invariant: true is not valid with .*=hf_cb",
    "generate={batch_invariant: true, vllm_python: x}": r"generate\.batch_invariant: true is not valid with .*=vllm",
    "run_dir=${nowhere}": r"run_dir: an interpolation does not resolve: .*'nowhere' not found$",
    "run_dir=${oc.env:NOT_SET_HERE}": r"run_dir: an interpolation does not resolve: .*'NOT_SET_HERE' not found\"$",
    "seed": r"'seed' is not an override: write section\.key=value",
    "seed=[1": r"'seed=\[1' is not an override",
}


@pytest.mark.parametrize(("override", "message"), FAULTS.items(), ids=FAULTS)
def test_a_wrong_override_names_key_value_and_rule(override, message):
    with pytest.raises(ConfigError, match=message):
        load_config(overrides=[override])


def test_a_section_that_is_an_interpolation_and_a_long_value_are_one_short_sentence():
    for word in (
        "generate=${nope}",
        "run.generate=${oc.env:NO_SUCH_VARIABLE}",
        f"seed={'a' * 100_000}",
    ):
        with pytest.raises(ConfigError) as refused:
            load_config([], [word])
        assert len(str(refused.value)) < 500


def test_whole_numbers_may_be_written_as_floats():
    config = load_config(overrides=["generate.max_new_tokens=1e3", "data.num_test=50.0", "calibrate.layers=[2.0,last]"])
    assert (config.generate.max_new_tokens, config.data.num_test, config.calibrate.layers) == (1000, 50, (2, "last"))
    assert all(type(one) is int for one in (config.generate.max_new_tokens, config.data.num_test))


def test_a_word_that_is_neither_file_nor_override_is_one_sentence():
    with pytest.raises(
        ConfigError, match=r"^foo: no such file \(from .*\), and no override, .*section\.key=value; name"
    ):
        load_config(["foo"])


def test_the_bare_word_off_is_a_choice_and_survives_being_written(tmp_path):
    config = load_config([], ["data.thinking=off"])
    assert config.data.thinking == "off"
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert load_config([tmp_path / "config.yaml"]) == config


def test_later_files_and_overrides_win(tmp_path):
    first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
    first.write_text("seed: 1\nfinetune: {num_epochs: 2, lora_rank: 4}\n")
    second.write_text("finetune: {num_epochs: 3}\n")
    config = load_config([first, second], ["finetune.learning_rate=1"])
    assert (config.seed, config.finetune.num_epochs, config.finetune.lora_rank) == (1, 3, 4)
    assert config.finetune.learning_rate == 1.0


@pytest.mark.parametrize(
    ("text", "message"), [("a: [", "cannot be read as YAML"), ("- 1\n", "must be a mapping of sections")]
)
def test_an_unreadable_file_is_named(tmp_path, text, message):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=f"{re.escape(str(path))}.*{message}"):
        load_config([path])
    with pytest.raises(ConfigError, match=r"none\.yaml: no such file"):
        load_config([tmp_path / "none.yaml"])


def test_a_file_that_does_not_merge_is_named(tmp_path):
    path = tmp_path / "section.yaml"
    path.write_text("seed: 1\n")
    with pytest.raises(ConfigError, match=r"seed: .* is not valid|does not merge"):
        load_config([path], ["seed.deep=1"])


def test_the_resolved_config_reads_back_the_same(tmp_path):
    config = load_config(
        overrides=["calibrate.layers=[1,last]", "distributed.deepspeed={zero_optimization: {sub_group_size: 7}}"]
    )
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(config))
    assert load_config([path]) == config


def test_shipped_configs_are_named_and_an_unknown_one_lists_them():
    assert load_config(["package:quickstart"]) == load_config(["configs/quickstart.yaml"])
    assert load_config(["package:presets/paper"]) == load_config(["configs/presets/paper.yaml"])
    with pytest.raises(ConfigError, match=r"--config package:nothing: no such config .*presets/paper, .*quickstart"):
        load_config(["package:nothing"])


OTHERS = {"experiments", "sweeps"}
"""Folders of other files than configs; they have tests of their own."""


@pytest.mark.parametrize(
    "path", sorted(path for path in Path("configs").rglob("*.yaml") if not OTHERS & set(path.parts)), ids=str
)
def test_every_shipped_config_loads_and_says_how_it_is_run(path):
    load_config([path])
    first = path.read_text().splitlines()[0]
    assert re.match(rf"# .*{re.escape(str(path))}", first), "the first line is the command that runs it"


def test_every_field_has_a_sentence():
    for section in dataclasses.fields(Config):
        fields = (
            dataclasses.fields(section.default_factory)
            if dataclasses.is_dataclass(section.default_factory)
            else [section]
        )
        for item in fields:
            assert item.metadata.get("sentence"), item.name


@pytest.mark.parametrize("key", ["run_dir", "model.name", "metrics.project", "data.train", "finetune.lora_targets"])
def test_a_line_end_in_a_name_is_refused(tmp_path, key):
    """It would be a line of a job's script, a part of a file's name or a row of a table."""
    section, _, name = key.rpartition(".")
    value = ["q_proj\ntouch pwned"] if name == "lora_targets" else "runs/x\ntouch pwned\n#"
    line = f"{name}: {json.dumps(value)}\n"
    (tmp_path / "a.yaml").write_text(f"{section}:\n  {line}" if section else line)
    with pytest.raises(ConfigError, match=rf"^{key}.*touch pwned.* must be text of one line, without control char"):
        load_config([tmp_path / "a.yaml"])


def test_a_system_prompt_may_have_lines(tmp_path):
    (tmp_path / "a.yaml").write_text("data: {system: 'Be brief.\n\n  Be kind.'}\n")
    assert load_config([tmp_path / "a.yaml"]).data.system == "Be brief.\nBe kind."


@pytest.mark.parametrize("text", ["{a: " * 5000 + "}" * 5000, "[" * 300_000, "- " * 5000 + "x"])
def test_yaml_that_nests_too_deep_is_refused(tmp_path, text):
    """The parser that is written in C would end the process."""
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"a\.yaml: cannot be read as YAML: it nests deeper than 100 levels"):
        load_config([tmp_path / "a.yaml"])
