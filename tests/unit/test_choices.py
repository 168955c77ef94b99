"""The choice that an output commits to."""

import pytest

from spd_dist.data.scoring.choices import committed_letter
from spd_dist.data.scoring.thoughts import without_thoughts

CHOICES = ["red fox", "blue", "green tea", "none"]


@pytest.mark.parametrize(
    ("output", "letter"),
    [
        ("C'est la vie", None),
        ("Vitamin B is good so A", "A"),
        ("The answer is not A but B", "B"),
        ("A or B", None),
        ("<think>A or C?</think>B", "B"),
        ("<think>A", None),
        ("b", "B"),
        ("(b)", "B"),
        ("Answer: b", "B"),
        ("B.", "B"),
        ("B", "B"),
        ("(B)", "B"),
        (" B) blue", "B"),
        ("B: blue", "B"),
        ("Answer: B", "B"),
        ("The answer is B.", "B"),
        ("The answer is (B) blue", "B"),
        ("blue", "B"),
        ("Blue.", "B"),
        ("The answer is blue.", "B"),
        ("A man walks", None),
        ("I think so", None),
        ("The answer is a dog", None),
        ("**B**", "B"),
        ("B, because it is", "B"),
        ("B because it is", "B"),
        ("A is correct", "A"),
        ("Option B is correct", "B"),
        ("The correct answer is option C.", "C"),
        ("The correct option is C", "C"),
        ("A, B and C", None),
        ("A and B", None),
        ("A/B", None),
        ("Answer: A or B", None),
        ("\\boxed{B}", "B"),
        ("The answer is \\boxed{\\text{B}}", "B"),
        ("A. red fox\nB. blue", None),
        ("Answer: A. Wait, no. Answer: B", "B"),
        ("Answer: A\nAnswer: B", None),
        ("I choose D", "D"),
        ("Plan B was better", None),
        ("D\n\nExplanation: A is wrong since", "D"),
        ("So, the answer is D", "D"),
        ("The answer is: **(D)**", "D"),
        ("Answer: D - none", "D"),
        ("C. green tea", "C"),
        ("It can't be (A), so it is (C)", "C"),
        ("Both (A) and (B)", None),
        ("E", None),
        ("AB", None),
        ("B\nB", "B"),
        ("The answer is A, not B", "A"),
        ("Answer is c", "C"),
        ("B) or C)", None),
        ("grade A beef", None),
        ("The answer is A.\n\nThe answer is A.", "A"),
        ("I would go with B.", "B"),
        ("the answer: (a)", "A"),
        ("Answer:\nC", "C"),
        ("d.", "D"),
        ("A man is", None),
        ("Not A", None),
    ],
)
def test_only_a_committed_letter_counts(output, letter):
    assert committed_letter(without_thoughts(output).text, "ABCD", CHOICES) == letter
