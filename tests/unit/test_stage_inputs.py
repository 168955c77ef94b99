"""What the stages' results depend on: what is the same is done once, what is not is not mixed up."""

import shutil

import pytest
import torch
from safetensors.torch import save_file
from tiny import save_tiny_model

from spd_dist.arms import ARMS, Scope
from spd_dist.distributed.world import World
from spd_dist.models.checkpoint_files import WHOLE_BYTES, sampled_hash
from spd_dist.overrides import load_config
from spd_dist.process.signals import StopSignals
from spd_dist.run import Run
from spd_dist.stage_inputs import of_protocol, of_subspace
from spd_dist.storage.settings import READ_BY, settings_hash

TASK = """\
name: sums
prompt: "{a} and {b} are"
answer: " {c}"
gold: "{c}"
mask: answer
extraction: number
metric: numeric
"""


def opened(folder, *overrides):
    config = load_config(overrides=[f"run_dir={folder}", "data.num_test=4", "metrics.wandb=disabled", *overrides])
    return Run(config, World(0, 1, torch.device("cpu")), StopSignals(), Scope(last="project"))


def protocol(folder, *overrides):
    run = opened(folder, *overrides)
    with run.opened():
        return of_protocol(run)


def inputs(folder, *overrides):
    """By stage, what its result depends on."""
    run = opened(folder, *overrides)
    with run.opened():
        generate, finetune = run.settings(*READ_BY["generate"]), run.settings(*READ_BY["finetune"])
        return {
            "project": of_subspace(run, ARMS["spd"]), "generate": generate, "finetune": finetune,
            "evaluate": of_protocol(run),
        }  # fmt: skip


def differing(before, after):
    return [stage for stage in before if before[stage] != after[stage]]


def test_greedy_answers_are_shared_by_seeds_and_sampled_ones_are_not(tmp_path):
    greedy = [protocol(tmp_path / f"greedy-{seed}", f"seed={seed}") for seed in (1, 2)]
    assert greedy[0] == greedy[1]
    sampled = [protocol(tmp_path / f"s-{seed}", f"seed={seed}", "evaluate.temperature=0.8") for seed in (1, 2)]
    assert sampled[0]["settings"] != sampled[1]["settings"]
    assert sampled[0]["test"] == sampled[1]["test"] == greedy[0]["test"]


@pytest.mark.parametrize(("old", "new", "stages"), [
    ("are", "make", ["project", "generate", "evaluate"]),
    ('" {c}"', '" It is {c}"', ["project", "generate", "evaluate"]),
    ("mask: answer", "mask: full", ["project"]),
    ("number", "text", ["evaluate"]),
    ("numeric", "exact", ["evaluate"]),
    ("metric: numeric", "metric: numeric # as before", []),
])  # fmt: skip
def test_a_task_whose_file_was_edited_is_another_task(tmp_path, old, new, stages):
    (tmp_path / "rows.jsonl").write_text('{"id": "1", "a": "1", "b": "2", "c": "3"}\n')
    words = [f"data.{split}={tmp_path / 'rows.jsonl'}" for split in ("train", "calibration", "test")]
    words += [f"data.task={tmp_path / 'sums.yaml'}"]
    found = []
    for number, text in enumerate((TASK, TASK.replace(old, new))):
        (tmp_path / "sums.yaml").write_text(text)
        found.append(inputs(tmp_path / f"run-{number}", *words))
    assert differing(*found) == stages


def test_an_edited_task_of_another_test_is_another_task(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"id": "1", "a": "1", "b": "2", "c": "3"}\n')
    found = []
    for number, text in enumerate((TASK, TASK.replace("number", "text"))):
        (tmp_path / "sums.yaml").write_text(text)
        word = f"evaluate.also=[{tmp_path / 'sums.yaml'}={tmp_path / 'rows.jsonl'}]"
        found.append(inputs(tmp_path / f"run-{number}", word))
    assert differing(*found) == ["evaluate"]


def test_another_model_under_the_same_path_is_another_model(tmp_path):
    folder = save_tiny_model(tmp_path / "model")
    first = inputs(tmp_path / "first", f"model.name={folder}")
    (folder / "README.md").write_text("read me")
    moved = shutil.copytree(folder, tmp_path / "copy")
    shutil.rmtree(folder)
    shutil.copytree(moved, folder)
    assert differing(first, inputs(tmp_path / "copied", f"model.name={folder}")) == []
    save_tiny_model(folder, seed=1)
    second = inputs(tmp_path / "second", f"model.name={folder}")
    assert differing(first, second) == [*first]
    (folder / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    assert differing(second, inputs(tmp_path / "third", f"model.name={folder}")) == [*first]


def test_a_model_on_the_hub_or_of_a_package_is_its_name_and_nothing_is_read(tmp_path):
    for name in ("package:nowhere", "nobody/nothing"):
        run = opened(tmp_path / name.partition("/")[0], f"model.name={name}")
        with run.opened():
            assert run.settings("model") == settings_hash(run.plain, "model")


@pytest.mark.parametrize("trained", ["first", "last"])
def test_one_trained_tensor_among_many_tells_large_files_apart(tmp_path, trained):
    weights = {"first": torch.rand(256), "large": torch.rand(WHOLE_BYTES), "last": torch.rand(64, 64)}
    save_file(weights, tmp_path / "model.safetensors")
    before = sampled_hash(tmp_path)
    weights[trained] += 1e-3 * torch.rand_like(weights[trained])
    save_file(weights, tmp_path / "model.safetensors")
    assert sampled_hash(tmp_path) != before
