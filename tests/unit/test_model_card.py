"""A model card says what was done, how to load it, and carries the base model's licence over."""

import ast
from pathlib import Path

import pytest
import yaml

from spd_dist.models.model_card import Card, licence, write_card

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
        "completion",
        {"task": "arithmetic", "config hash": "abc"},
        EPOCHS,
    )
    write_card(card, tmp_path / "out", form)
    text = (tmp_path / "out/README.md").read_text()
    expected = ["base_model: org/base", "license: apache-2.0", "| task | arithmetic |", "| config hash | abc |", loader]
    expected += [
        "| 1 | 1.5000 |  |",
        "| 2 | 1.2500 | 1.3000 |",
        "over\nthe completions",
        "# base, distilled from itself",
    ]
    for line in expected:
        assert line in text
    assert (tmp_path / "out/LICENSE").read_text() == "Apache License\n"


def test_an_unknown_licence_is_not_made_up(tmp_path):
    card = Card("org/base", "org/base", "prompt_and_completion", {}, EPOCHS)
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
    assert licence(Card(str(tmp_path / "base.gguf"), "", "completion", {}, EPOCHS)) == "mit"


def test_names_and_facts_of_strangers_are_text_in_the_card(tmp_path):
    """No key of the front matter, no markup, no cell, no heading and no line of code comes from a name."""
    name = 'org/base\nlicense: mit\nwidget: "x"'
    facts = {"task": "a | b\n# Heading <img src=x onerror=alert(1)> [link](javascript:x) `code`"}
    (tmp_path / "a").mkdir()
    write_card(Card(name, 'org/"); import os; ("', "completion", facts, EPOCHS), tmp_path / "a", "adapter")
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
