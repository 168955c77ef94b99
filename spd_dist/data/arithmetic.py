"""Built-in one-step word problems: small enough for a small model, many enough for a split of each kind."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from spd_dist.data.tasks.protocol import Row

TEMPLATES: dict[str, tuple[str, ...]] = {
    "+": (
        "{name} has {a} {things} and buys {b} more. How many {things} does {name} have now?",
        "There are {a} {things} on the table and {b} {things} in the cupboard. How many {things} are there in all?",
        "{name} found {a} {things} in the morning and {b} at night. How many {things} did {name} find?",
        "{a} girls and {b} boys go on a school trip. How many children go on the trip?",
        "{name} read {a} pages on Monday and {b} pages on Tuesday. How many pages did {name} read on the two days?",
        "{name} had {a} {things} and got {b} more as a gift. How many {things} does {name} have in total?",
    ),
    "-": (
        "{name} had {a} {things} and gave {b} of them away. How many {things} does {name} have left?",
        "There were {a} people on a bus. At the next stop {b} people got off. How many people stayed on the bus?",
        "{name} baked {a} cookies and sold {b} of them. How many cookies were not sold?",
        "{name} has {a} {things} and {other} has {b}. How many more {things} does {name} have than {other}?",
        "A book has {a} pages. {name} has read {b} of them. How many pages are still to be read?",
        "{name} had {a} dollars and spent {b} dollars on a gift. How many dollars are left?",
    ),
    "*": (
        "{name} has {a} boxes with {b} {things} in each box. How many {things} does {name} have?",
        "One ticket costs {b} dollars. How many dollars do {a} tickets cost?",
        "A hall has {a} rows of chairs with {b} chairs in each row. How many chairs are in the hall?",
        "{name} runs {b} miles every day. How many miles does {name} run in {a} days?",
        "Each of {a} children gets {b} {things}. How many {things} are needed?",
        "{name} earns {b} dollars an hour and works for {a} hours. How many dollars does {name} earn?",
    ),
    "/": (
        "{name} shares {a} {things} equally among {b} friends. How many {things} does each friend get?",
        "{a} {things} are packed into bags of {b}. How many bags are filled?",
        "A rope of {a} feet is cut into {b} pieces of the same length. How many feet long is each piece?",
        "{name} paid {a} dollars for {b} tickets of the same price. How many dollars did one ticket cost?",
        "{a} students form {b} teams of the same size. How many students are on each team?",
        "A book has {a} pages and {name} reads {b} pages a day. In how many days does {name} finish the book?",
    ),
}
"""Templates by operation: a problem is `a (operation) b`."""

NAMES = (
    "Ben", "Clara", "David", "Emma", "Finn", "Grace", "Hugo", "Iris", "Jack", "Kate",
    "Leo", "Maya", "Noah", "Olga", "Paul", "Rosa", "Sam", "Tom", "Vera", "Will",
)  # fmt: skip
THINGS = (
    "apples", "books", "cards", "coins", "eggs", "flowers", "marbles", "pencils", "shells", "stamps", "toys",
)  # fmt: skip
WORDS = {"+": "add", "-": "subtract", "*": "multiply", "/": "divide"}
PROBLEMS_A_TEMPLATE = 120
SPLIT_SIZES = {"calibration": 500, "test": 1000, "train": 1380}


class Problem(NamedTuple):
    """What makes two problems the same one: names and things are decoration, and follow from it."""

    operation: str
    template: int
    a: int
    b: int


def generate_rows(split: str, seed: int) -> list[Row]:
    """The rows of a split: one of three parts of the problems, each in the order that the seed shuffles them.

    No problem is in two splits of the same seed, and each operation has the same share of all problems.
    """
    problems = list(_draw_problems(random.Random(f"arithmetic/{seed}")))
    start = 0
    for name, size in SPLIT_SIZES.items():
        if name == split:
            return [_row(problem) for problem in problems[start : start + size]]
        start += size
    raise KeyError(split)


def _draw_problems(generator: random.Random) -> list[Problem]:
    problems = [
        Problem(operation, template, a, b)
        for operation, templates in TEMPLATES.items()
        for template in range(len(templates))
        for a, b in generator.sample(list(_operands(operation)), PROBLEMS_A_TEMPLATE)
    ]
    generator.shuffle(problems)
    return problems


def _operands(operation: str) -> Iterator[tuple[int, int]]:
    low, high = {"+": (2, 20), "-": (2, 20), "*": (2, 12), "/": (2, 12)}[operation]
    for left in range(low, high + 1):
        for right in range(low, high + 1):
            if operation == "/":
                yield left * right, right
            elif operation != "-" or left > right:
                yield left, right


def _row(problem: Problem) -> Row:
    operation, template, a, b = problem
    result = {"+": a + b, "-": a - b, "*": a * b, "/": a // b}[operation]
    key = f"arithmetic/{WORDS[operation]}-{template}/{a}-{b}"
    generator = random.Random(key)  # the same problem reads the same under every seed
    name, other = generator.sample(NAMES, 2)
    question = TEMPLATES[operation][template].format(a=a, b=b, name=name, other=other, things=generator.choice(THINGS))
    return {"id": key, "question": question, "solution": f"{a} {operation} {b} = {result}", "answer": str(result)}
