"""The number that a text gives as its answer: every kind that people write, and none cut out of a longer token."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spd_dist.data.scoring.numbers import parse_number, same_number
from spd_dist.data.scoring.statements import last_number, marked_number, number_answers
from spd_dist.data.tasks import find_task
from spd_dist.data.tasks.described import DescribedTask, Description

RIGHT, WRONG = True, False


@pytest.mark.parametrize(
    ("output", "gold", "correct"),
    [
        ("#### .5", "5", WRONG),
        ("#### \u22122", "2", WRONG),
        ("#### 1/2", "1", WRONG),
        ("The answer is 1e3", "3", WRONG),
        ("#### 10 + 2 = 12", "10", WRONG),
        ("#### 5</think>", "5", WRONG),
        ("<think>#### 5", "5", WRONG),
        ("#### .5", "0.5", RIGHT),
        ("#### 1/2", "0.5", RIGHT),
        ("#### 1.5e6", "1500000", RIGHT),
        ("#### - 5", "-5", RIGHT),
        ("#### 1 000", "1000", RIGHT),
        ("#### 10 + 2 = 12", "12", RIGHT),
        ("#### 5\n#### 6", "6", WRONG),
        ("#### 6\n#### 5", "6", WRONG),
        ("#### 3\nno\n#### 4\nThen 9 more", "4", RIGHT),
        ("#### 5 or 6", "6", WRONG),
        ("#### 5, 6", "6", WRONG),
        ("#### $1,000.50", "1000.5", RIGHT),
        ("#### 5 apples", "5", RIGHT),
        ("#### **5**", "5", RIGHT),
        ("#### 5. That is all 7.", "5", RIGHT),
        ("The answer is 5 or 6.", "6", WRONG),
        ("He pays $5 to $6", "6", WRONG),
        ("3 - 1", "1", WRONG),
        ("so 3 - 1 = 2 left", "2", RIGHT),
        ("the answer is \\boxed{7}", "7", RIGHT),
        ("#### \\frac{1}{2}", "0.5", RIGHT),
        ("#### 50%", "50", RIGHT),
        ("#### 5\\%", "5", RIGHT),
        ("#### 1.000.000", "1000000", RIGHT),
        ("#### 10{,}080", "10080", RIGHT),
        ("#### 2 1/2", "2.5", RIGHT),
        ("#### 3\u00d710^5", "300000", RIGHT),
        ("#### 3 \\times 10^{5}", "300000", RIGHT),
        ("room 3B has x5", "5", WRONG),
        ("1,0000", "0", WRONG),
        ("at 12:30", "30", WRONG),
        ("#### \u20ac20", "20", RIGHT),
        ("#### 20\u20ac", "20", RIGHT),
        ("#### 5cm", "5", RIGHT),
        ("#### 5k", "5", WRONG),
        ("#### Total: 5", "5", RIGHT),
        ("#### Answer: 18", "18", RIGHT),
        ("#### Step 1: add\n#### 18", "18", RIGHT),
        ("#### x = 5", "5", RIGHT),
        ("#### 12 = 10 + 2", "12", RIGHT),
        ("#### 12 (10 + 2)", "12", RIGHT),
        ("The answer is 5. Wait, the answer is 6.", "6", RIGHT),
        ("The answer is 5. The answer is 6.", "6", WRONG),
        ("#### \uff15", "5", RIGHT),
        ("#### 5 6", "6", WRONG),
        ("#### eight\n8", "8", RIGHT),
        ("####\n12\n13", "12", RIGHT),
        ("$5", "5", RIGHT),
        ("It is 8 apples and that's it", "8", RIGHT),
        ("#### -$3", "-3", RIGHT),
        ("#### $-3", "-3", RIGHT),
        ("#### 2^3", "2", WRONG),
        ("#### 2^3", "3", WRONG),
        ("#### 1e3x", "3", WRONG),
        ("#### 3 hours and 20 minutes", "20", WRONG),
        ("The final answer is: $\\boxed{42}$.", "42", RIGHT),
        ("**Answer:** 42", "42", RIGHT),
        ("Answer: 42 dollars", "42", RIGHT),
        ("#### 72 clips in April and May", "72", RIGHT),
        ("#### 72\n\nQuestion: how", "72", RIGHT),
        ("10-5", "5", WRONG),
        ("it is -5.", "-5", RIGHT),
        ("**-7**", "-7", RIGHT),
        ("(3)-2", "2", WRONG),
        ("x=-3", "-3", RIGHT),
        ("#### 1e999999999", "1", WRONG),
        ("#### 0x10", "10", WRONG),
        ("#### 5/0", "5", WRONG),
        ("#### 1,5", "5", WRONG),
        ("#### five", "5", WRONG),
        ("1st of 3rd", "3", WRONG),
        ("#### 18/2 = 9", "9", RIGHT),
        ("#### 9 = 18/2", "9", RIGHT),
        ("#### 5-6", "6", WRONG),
        ("#### 07", "7", RIGHT),
        ("#### +5", "5", RIGHT),
        ("#### 5.", "5", RIGHT),
        ("#### 5,", "5", RIGHT),
        ("#### (5)", "5", RIGHT),
        ('#### "5"', "5", RIGHT),
        ("#### 5\xa0000", "5000", RIGHT),
        ("#### $5,000,000.00", "5000000", RIGHT),
        ("#### 1'000", "1000", RIGHT),
        ("the answer is not 5 but 6", "5", WRONG),
        ("#### 3:2", "3", WRONG),
        ("#### ~ 5", "5", RIGHT),
        ("#### about 5", "5", RIGHT),
        ("Natalia sold 48/2 = 24 clips in May.\nNatalia sold 48+24 = 72 clips altogether.", "72", RIGHT),
        ("$10 + $5 = $15", "15", RIGHT),
        ("She makes 9 * 2 = $18 every day", "18", RIGHT),
    ],
)
def test_a_number_counts_as_a_person_would_count_it(output, gold, correct):
    score = find_task("gsm8k").score({"question": "?", "solution": "", "answer": gold}, output)
    assert score.correct == correct, score
    assert (score.reason == "right") == correct


@pytest.mark.parametrize("left", ["5", "5.0", "$5", "5.", "+5", " 5 ", "5.00", "10/2", "5e0", "50e-1", "$ 5"])
def test_numbers_are_compared_by_value(left):
    assert same_number(left, "5")
    assert not same_number(left, "50")


@pytest.mark.parametrize(
    ("left", "right"), [("1,234", "1234"), ("$1,000.50", "1000.5"), ("40%", "40"), ("-$3", "-3"), ("$-3", "-3")]
)
def test_commas_signs_and_units_do_not_matter(left, right):
    assert same_number(left, right)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("He has 3 + 5 = 8 apples.", "8"),
        ("10-5", None),
        ("(3)-2", None),
        ("it is -5.", "-5"),
        ("x=-3", "-3"),
        ("**-7**", "-7"),
        ("that is $1,234.50 in all", "$1,234.50"),
        ("12,345,678", "12,345,678"),
        ("1,0000", None),
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
        ("#### 3\nSo she takes the others instead.\n#### 4", None),
        ("####\n12\n13", "12"),
        ("#### eight\n8", None),
        ("The answer is 8", None),
        ("### 8", None),
    ],
)
def test_the_marked_number_follows_a_marker_on_its_line(text, number):
    assert marked_number(text) == number


@pytest.mark.parametrize("output", ["#### 5, 6", "#### 6 or 5", "#### 5\n#### 6", "The answer is 5. The answer is 6."])
def test_of_several_answers_none_counts_in_any_task_of_numbers(output):
    task = DescribedTask(Description("t", "{q}", gold="{a}", extraction="number", metric="numeric"))
    assert not task.score({"q": "?", "a": "6"}, output).correct
    assert not find_task("bbh").score({"input": "?", "target": "6"}, output).correct


def test_of_several_boxes_none_counts_in_a_described_task():
    task = DescribedTask(Description("t", "{q}", gold="{a}", extraction="boxed", metric="numeric"))
    assert not task.score({"q": "?", "a": "6"}, r"\boxed{5} or \boxed{6}").correct
    assert task.score({"q": "?", "a": "6"}, r"\boxed{6}, that is \boxed{6}").correct


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    "unit", ["9", "1,000", " 1", "$1$ ", "answer is ", "#### 5 ", "\\frac{", "**", "a = 1 + 2 = ", "(", "so the "]
)
@pytest.mark.seconds
def test_no_long_text_takes_for_ever(unit):
    number_answers("#### " + unit * (50_000 // len(unit)))


@pytest.mark.parametrize("text", [None, "", "five", "1/0", "5 apples", "--5", "1e999999999", "9" * 9999])
def test_what_is_no_number_equals_none(text):
    assert not same_number(text, "5")
    assert not same_number(text, text or "")


@given(st.integers(-(10**12), 10**12), st.sampled_from(["{}", "{:,}", "{}.0", "so it is {:,}."]))
def test_any_written_integer_is_read_back(value, form):
    found = last_number(form.format(value))
    assert found is not None
    assert parse_number(found) == value


@given(st.text())
def test_no_text_breaks_the_extraction(text):
    for found in (last_number(text), marked_number(text), marked_number("####" + text)):
        assert found is None or parse_number(found) is not None


@given(st.integers(0, 999), st.integers(0, 999), st.sampled_from(["#### {}", "The answer is {}.", "So #### {} apples"]))
def test_a_second_different_answer_never_makes_it_right(first, second, form):
    task, row = find_task("gsm8k"), {"question": "?", "solution": "", "answer": str(second)}
    both = form.format(first) + "\n" + form.format(second)
    assert task.score(row, both).correct == (first == second)


@given(st.integers(0, 999), st.sampled_from(["  {}", "{}\n\n", "**{}**", "`{}`", "{} .", "{}. That is all."]))
def test_white_space_markdown_and_what_follows_a_stop_change_no_verdict(value, form):
    text = form.format(value)
    task, row = find_task("gsm8k"), {"question": "?", "solution": "", "answer": str(value)}
    assert task.score(row, f"#### {text}").correct
