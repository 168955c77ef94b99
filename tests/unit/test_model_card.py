"""A model card says what was done, how to load it, and carries the base model's licence over."""

import ast
from pathlib import Path

import pytest
import yaml

from spd_dist.arms import ARMS, chosen, iterations_of
from spd_dist.card_facts import student_facts
from spd_dist.models.model_card import Card, licence, write_card
from spd_dist.overrides import config_of_arm, load_config

EPOCHS = [{"epoch": 1, "loss": 1.5}, {"epoch": 2, "loss": 1.25, "validation_loss": 1.3}]


def base_model(folder: Path) -> Path:
    folder.mkdir()
    (folder / "README.md").write_text("---\nlanguage: en\nlicense: apache-2.0\n---\n# A model\n")
    (folder / "LICENSE").write_text("Apache License\n")
    return folder


@pytest.mark.parametrize(
    ("form", "loader"),
    [("adapter", "PeftModel.from_pretrained(base"), ("model", 'AutoModelForCausalLM.from_pretrained("path')],
)
def test_the_card_holds_facts_losses_and_the_way_to_load(tmp_path, form, loader):
    (tmp_path / "out").mkdir()
    card = Card(
        "org/base",
        str(base_model(tmp_path / "base")),
        {"task": "arithmetic", "config hash": "abc"},
        EPOCHS,
    )
    write_card(card, tmp_path / "out", form)
    text = (tmp_path / "out/README.md").read_text()
    expected = ["base_model: org/base", "license: apache-2.0", "| task | arithmetic |", "| config hash | abc |", loader]
    expected += [
        "| 1 | 1.5000 |  |",
        "| 2 | 1.2500 | 1.3000 |",
        "# base, fine-tuned by spd_dist",
    ]
    for line in expected:
        assert line in text
    assert (tmp_path / "out/LICENSE").read_text() == "Apache License\n"


def test_an_unknown_licence_is_not_made_up(tmp_path):
    card = Card("org/base", "org/base", {}, EPOCHS)
    write_card(card, tmp_path, "adapter")
    text = (tmp_path / "README.md").read_text()
    assert "license:" not in text
    assert "The base model's licence holds; see org/base." in text


def test_a_gguf_file_names_its_licence(tmp_path):
    GGUFWriter = pytest.importorskip("gguf").GGUFWriter
    writer = GGUFWriter(tmp_path / "base.gguf", "llama")
    writer.add_license("mit")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    assert licence(Card(str(tmp_path / "base.gguf"), "", {}, EPOCHS)) == "mit"


def test_names_and_facts_of_strangers_are_text_in_the_card(tmp_path):
    """No key of the front matter, no markup, no cell, no heading and no line of code comes from a name."""
    name = 'org/base\nlicense: mit\nwidget: "x"'
    facts = {"task": "a | b\n# Heading <img src=x onerror=alert(1)> [link](javascript:x) `code`"}
    (tmp_path / "a").mkdir()
    write_card(Card(name, 'org/"); import os; ("', facts, EPOCHS), tmp_path / "a", "adapter")
    text = (tmp_path / "a" / "README.md").read_text()
    header = yaml.safe_load(text.split("---\n")[1])
    assert header["base_model"] == name
    assert "license" not in header
    assert "widget" not in header
    assert "| task | a \\| b # Heading &lt;img src=x onerror=alert(1)&gt; \\[link\\](javascript:x) \\`code\\` |" in text
    assert [line for line in text.splitlines() if line.startswith("# ")] == [f"# {text.split('# ')[1].splitlines()[0]}"]
    code = text.split("```python\n")[1].split("```")[0]
    calls = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call)]
    assert len(calls) == 3
    assert all(isinstance(argument, ast.Constant | ast.Name) for call in calls for argument in call.args)


HELD = "the base model with its keys and values held to its capability subspace"
RANDOM = "the base model with its keys and values held to a random subspace of the same rank"
MATCHED = f"{RANDOM}, blended to move it as far as the method's own does, by KL"
NEXT_TOKEN = "| loss | of the next token, over prompts and completions |"
DISTILLED = "| loss | towards the teacher's next-token distributions, by {}, over prompts and completions |"
FORWARD, REVERSE = DISTILLED.format("KL(teacher || student)"), DISTILLED.format("KL(student || teacher)")
UNUSED, FOR_PROJECTION = "| reference answers | not used |", "| reference answers | used for the projection alone |"


def card_of(folder: Path, name: str, *overrides: str, iteration: int = -1) -> str:
    """A student's card, but for what its training adds."""
    config = load_config(overrides=[f"evaluate.arms=['{name}']", *overrides])
    (arm,) = chosen([name])
    own = config_of_arm(config, arm)
    rows = student_facts(iterations_of(arm, own)[iteration], own)
    write_card(Card("org/base", "org/base", rows, EPOCHS), folder, "adapter")
    return (folder / "README.md").read_text().replace("\\|", "|")


@pytest.mark.parametrize(
    ("name", "learnt_from", "others"),
    [
        ("psr", "completions of the base model, unfiltered", (NEXT_TOKEN, UNUSED)),
        ("ssd", "completions of the base model, unfiltered", (NEXT_TOKEN, UNUSED)),
        (
            "termination",
            "completions of the base model, unfiltered, those cut at the limit shortened to end in EOS",
            (NEXT_TOKEN, UNUSED),
        ),
        (
            "supervised",
            "the reference answers of the calibration set, unfiltered",
            ("| loss | of the next token, over prompts and answers |", "| reference answers | what it learnt from |"),
        ),
        ("spd", f"completions of {HELD}, unfiltered", (NEXT_TOKEN, FOR_PROJECTION)),
        (
            "full",
            "completions of the base model with its keys and values held to the subspace of whole sequences' "
            "gradients, unfiltered",
            (NEXT_TOKEN, FOR_PROJECTION),
        ),
        (
            "identity",
            "completions of the base model with its keys and values projected to everything, which changes nothing, "
            "unfiltered",
            (NEXT_TOKEN, UNUSED),
        ),
        ("random", f"completions of {RANDOM}, unfiltered", (NEXT_TOKEN, UNUSED)),
        (
            "filtered",
            f"completions of {HELD}, filtered to those that ended by themselves and did not go in circles and gave the "
            "answer of most samples of their prompt",
            (NEXT_TOKEN, FOR_PROJECTION),
        ),
        ("spd_distil", f"completions of {HELD}, unfiltered", (FORWARD, f"| teacher | {HELD} |", FOR_PROJECTION)),
        (
            "random_distil",
            f"completions of {MATCHED}, unfiltered",
            (FORWARD, f"| teacher | {MATCHED} |", FOR_PROJECTION),
        ),
        (
            "spd_contrast",
            f"completions drawn from log p + 2 (log q - log p), p the base model and q {HELD}, unfiltered",
            (NEXT_TOKEN, FOR_PROJECTION),
        ),
        (
            "random_contrast",
            f"completions drawn from log p + 2 (log q - log p), p the base model and q {MATCHED}, unfiltered",
            (NEXT_TOKEN, FOR_PROJECTION),
        ),
        (
            "spd_onpolicy",
            "completions of the student of the iteration before, unfiltered",
            (REVERSE, f"| teacher | {HELD} |", FOR_PROJECTION),
        ),
        (
            "random_onpolicy",
            "completions of the student of the iteration before, unfiltered",
            (REVERSE, f"| teacher | {MATCHED} |", FOR_PROJECTION),
        ),
    ],
)
def test_the_card_of_each_arm_says_what_it_learnt_from_and_by_which_loss(tmp_path, name, learnt_from, others):
    text = card_of(tmp_path, name)
    assert f"| learnt from | {learnt_from} |" in text
    for line in others:
        assert line in text
    assert ("| teacher |" in text) == ("distil" in name or "onpolicy" in name)
    assert "itself" not in text.replace("by themselves", "")


def test_every_arm_that_trains_has_its_rows_and_no_other_has_any():
    for name, arm in ARMS.items():
        assert bool(student_facts(arm, config_of_arm(load_config(), arm))) == (name not in ("base", "projected"))


def test_the_card_follows_the_settings_and_not_the_name_alone(tmp_path):
    text = card_of(tmp_path, "spd_onpolicy", "finetune.num_on_policy_iterations=3", iteration=0)
    assert "| learnt from | completions of the base model, unfiltered |" in text, "the first iteration has no student"
    text = card_of(tmp_path, "psr@finetune.filter=[ended]@finetune.loss_on=completion")
    assert "| learnt from | completions of the base model, filtered to those that ended by themselves |" in text
    assert "| loss | of the next token, over the completions |" in text
    text = card_of(tmp_path, "supervised", "finetune.filter=[ended]", "finetune.loss_on=completion")
    assert "the reference answers of the calibration set, unfiltered" in text, "which is what a filter does not see"
    assert "over the answers |" in text
    text = card_of(tmp_path, "spd@mode=blend@rho=0.1@kinds=key", "generate.contrast=1.5", "data.thinking=drop")
    held = "the base model with its keys held to its capability subspace, 0.1 of the rest kept"
    contrast = f"log p + 1.5 (log q - log p), p the base model and q {held}"
    assert f"| learnt from | completions drawn from {contrast}, unfiltered, without their thoughts |" in text
    text = card_of(tmp_path, "spd_distil@finetune.divergence=js")
    assert "by the Jensen-Shannon divergence, over" in text
    text = card_of(tmp_path, "psr@finetune.lora_init=spd")
    assert "| adapters begin in | its capability subspace |" in text
    assert "| reference answers | used for the subspace alone |" in text
    text = card_of(tmp_path, "random@rank_rule=energy")
    assert FOR_PROJECTION in text, "its rank is of the gradients' spectrum"
