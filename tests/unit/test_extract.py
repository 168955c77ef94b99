"""What counts as the answer of a text, and when two answers are one."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spd_dist.data.extract import (
    boxed,
    fenced,
    last_number,
    marked_number,
    parse_number,
    same_number,
    without_calculator,
)


@pytest.mark.parametrize("left", ["5", "5.0", "$5", "5.", "+5", " 5 ", "5.00"])
def test_numbers_are_compared_by_value(left):
    assert same_number(left, "5")
    assert not same_number(left, "50")


@pytest.mark.parametrize(
    ("left", "right"), [("1,234", "1234"), ("$1,000.50", "1000.5"), ("40%", "40"), ("-$3", "-3"), ("$-3", "-3")]
)
def test_commas_signs_and_units_do_not_matter(left, right):
    assert same_number(left, right)


@pytest.mark.parametrize("text", [None, "", "five", "1/2", "5 apples", "٣", "1e5", "--5"])
def test_what_is_no_number_equals_none(text):
    assert not same_number(text, "5")
    assert not same_number(text, text or "")


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("He has 3 + 5 = 8 apples.", "8"),
        ("10-5", "5"),
        ("(3)-2", "2"),
        ("it is -5.", "-5"),
        ("x=-3", "-3"),
        ("**-7**", "-7"),
        ("that is $1,234.50 in all", "$1,234.50"),
        ("12,345,678", "12,345,678"),
        ("1,2,3", "3"),
        ("1,0000", "0000"),
        ("in 2024.", "2024"),
        ("0.20.", "0.20"),
        ("no number", None),
        ("", None),
    ],
)
def test_the_last_number_is_found(text, number):
    assert last_number(text) == number


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("3 + 5 = 8\n#### 8", "8"),
        ("#### 1,000 dollars", "1,000"),
        ("####8", "8"),
        ("#### 3\nno\n#### 4\nThen 9 more", "4"),
        ("####\n12\n13", "12"),
        ("#### eight\n8", None),
        ("The answer is 8", None),
        ("### 8", None),
    ],
)
def test_the_marked_number_follows_the_last_marker_on_its_line(text, number):
    assert marked_number(text) == number


@given(st.integers(-(10**12), 10**12), st.sampled_from(["{}", "{:,}", "{}.0", "so it is {:,}."]))
def test_any_written_integer_is_read_back(value, form):
    found = last_number(form.format(value))
    assert found is not None
    assert parse_number(found) == value


@given(st.text())
def test_no_text_breaks_the_extraction(text):
    for found in (last_number(text), marked_number(text)):
        assert found is None or parse_number(found) is not None
    assert boxed(text) is None or boxed(text) in text
    assert fenced(text) is None or fenced(text).strip()


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


def test_the_first_fenced_block_with_content_is_the_program():
    assert fenced("Here:\n```python\nx = 1\n```\nand\n```\ny = 2\n```") == "x = 1\n"
    assert fenced("```\n\n```\n```py\nz\n```") == "z\n"
    assert fenced("```python\nx = 1") == "x = 1"
    assert fenced("x = 1") is None
