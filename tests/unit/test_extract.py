"""What a text holds: boxes, fenced code, calculator marks."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spd_dist.data.scoring import programs
from spd_dist.data.scoring.extract import all_boxed, boxed, fenced, without_calculator


def test_calculator_marks_are_removed():
    assert without_calculator("48/2 = <<48/2=24>>24 clips, $<<0.2*50=10>>10") == "48/2 = 24 clips, $10"


@pytest.mark.parametrize(
    ("text", "content"),
    [
        (r"so \boxed{42}.", "42"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{1} then \boxed{2}", "2"),
        (r"\boxed{1} then \boxed{2", "1"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\fbox{3} \boxed {4}", "4"),
        ("42", None),
    ],
)
def test_the_last_complete_box_is_found(text, content):
    assert boxed(text) == content


def test_every_complete_box_is_found_with_its_place():
    text = r"\boxed{1}, \boxed{\frac{1}{2}} and \boxed{3"
    assert all_boxed(text) == [(7, "1"), (18, r"\frac{1}{2}")]


@given(st.text())
def test_no_text_breaks_the_extraction(text):
    assert boxed(text) is None or boxed(text) in text
    assert fenced(text) is None or fenced(text).strip()
    assert all(content in text for _, content in all_boxed(text))


def test_the_first_fenced_block_with_content_is_the_program():
    assert fenced("Here:\n```python\nx = 1\n```\nand\n```\ny = 2\n```") == "x = 1\n"
    assert fenced("```\n\n```\n```py\nz\n```") == "z\n"
    assert fenced("```python\nx = 1") == "x = 1"
    assert fenced("x = 1") is None


@pytest.mark.parametrize("endless", ["try:\n" + " x = 1\n" * 4000, "@a\n" * 4000, "x = (\n" * 4000, "a b\n" * 4000])
@pytest.mark.seconds
def test_no_text_is_parsed_once_for_every_line_of_it(monkeypatch, endless):
    """A rank judges beside decoding: 4000 lines that each end in an error took it half a minute."""
    parsed, real = [], programs.ast.parse
    monkeypatch.setattr(programs.ast, "parse", lambda *words: parsed.append(words) or real(*words))
    assert programs.python_in(f"import os\n{endless}") == "import os"
    assert len(parsed) < programs.MAX_PARSES + 20
