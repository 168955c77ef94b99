"""Expressions: equal by Math-Verify's conventions, and its equalities that no grader would sign."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from spd_dist.data.scoring.expressions import CPU_SECONDS, expression_answers, same_expression

EQUAL = r"""
1,2,3 | 3,2,1
1,200 | 1200
\sqrt3 | \sqrt{3}
\frac\pi2 | \frac{\pi}{2}
x^{2}+2 | x^2+2
.5 | \frac{1}{2}
\frac{-1}{2} | -\frac{1}{2}
5 \text{ cm} | 5
10{,}080 | 10080
10,\!080 | 10080
x \in [-2,7] | [-2,7]
\begin{pmatrix} 1 \\ 2 \end{pmatrix} | \begin{pmatrix}1\\2\end{pmatrix}
\dfrac12 | \frac{1}{2}
\text{(C)} | C
(C) | \text{(C)}
C | \text{C}
5.4 \text{ cents} | 5.4
864 \mbox{ inches}^2 | 864
(-\infty,3)\cup(5,\infty) | (-\infty, 3) \cup (5, \infty)
2x+3 | 3+2x
(x+1)(x-1) | x^2-1
x=5 | 5
y=2x+1 | y=1+2x
y=2x+1 | 2x+1
\frac{2}{4} | \frac{1}{2}
50\% | 50
50\% | 0.5
50 | 50\%
90^\circ | 90
\$5 | 5
\text{June 20} | June 20
\text{Evelyn} | Evelyn
3\sqrt{2} | \sqrt{18}
\sqrt{18} | 3\sqrt2
2^{10} | 1024
1 \frac{1}{2} | \frac{3}{2}
1\frac12 | 1.5
1011_2 | 1011_{2}
1011 | 1011_2
\pm 3 | 3,-3
x=1 \text{ or } x=2 | 1,2
1 \text{ and } 2 | 1,2
1,2 | 2,1
a+b | b+a
ab | ba
3 + 4i | 3+4i
4i+3 | 3+4i
\frac{\sqrt{3}}{3} | \frac{1}{\sqrt{3}}
\log_2 8 | 3
10^{-3} | 0.001
1.0 | 1
12.50 | 12.5
1{,}000{,}000 | 10^6
\frac{1}{2}\text{ hour} | \frac12
6\text{ and }7 | 6,7
x>3 | x > 3
x>3 | 3<x
\{1,2,3\} | \{3,2,1\}
\emptyset | \{\}
5! | 120
\binom{5}{2} | 10
\begin{bmatrix} 1 & 2 \\ 3 & 4 \end{bmatrix} | \begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}
\left( 3, \frac{\pi}{2} \right) | (3,\frac{\pi}2)
2\pi r | 2 \pi r
12 \text{ units} | 12
12\text{ cm}^2 | 12
12\,\text{cm}^3 | 12
12 cm | 12
12 kg | 12
7:30 | 7:30
7 \text{ p.m.} | 7
3:2 | \frac32
3/2 | \frac32
-\frac{3}{2} | \frac{-3}{2}
-\frac{3}{2} | \frac{3}{-2}
- 5 | -5
+5 | 5
1e3 | 1000
1 000 | 1000
\approx 5 | 5
5.0 | 5.00
5. | 5
10 + 2 = 12 | 12
10+2 | 12
2+2=5 | 5
\text{Yes} | \text{yes}
0 | 0.0
\frac{0}{5} | 0
e^2 | e^{2}
\tan x | \frac{\sin x}{\cos x}
\sin^2 x + \cos^2 x | 1
f(x)=x^2 | x^2
(2, 3), (4, 5) | (4,5),(2,3)
\text{ 12 } | 12
\mathbf{12} | 12
\textbf{12} | 12
{12} | 12
$12$ | 12
12\text{ square units} | 12
5\text{ miles per hour} | 5
x^2 + y^2 = 1 | x^2+y^2-1=0
y = -2x | 2x+y=0
\frac{x+1}{2} | \frac12 x + \frac12
100,000 | 100000
1.000 | 1
120^{\circ} | 120
\sqrt[3]{8} | 2
2\sqrt{3}+1 | 1+2\sqrt3
\lfloor 2.5 \rfloor | 2
\mathbb{R} | (-\infty,\infty)
\text{A, B} | \text{A,B}
\text{A} and \text{B} | \text{A},\text{B}
1,234 | 1234
1.5 \times 10^{3} | 1500
(3, 5) | (3,5)
\left(\frac{1}{2}, 3\right) | (0.5, 3)
\frac12 | 0.50
12\% | 0.12
12\% | 12
36^\circ | 36
36 \text{ degrees} | 36^\circ
\$32,348 | 32348
\frac{14}{3} \approx 4.67 | \frac{14}{3}
\text{no solution} | \text{No solution}
x = 2, y = 3 | (2,3)
\text{Tuesday} | Tuesday
6 - 5i | 6-5i
2 | \sqrt{4}
"""
DIFFERENT = r"""
1,2,3 | 123
123 | 1,2,3
1-\frac1e | 1+\frac1e
(1,2) | (2,1)
(1,2) | [1,2]
(1,2) | \{1,2\}
[1,2) | [1,2]
(-\infty,3]\cup(5,\infty) | (-\infty, 3) \cup (5, \infty)
y=5 | x=5
0.333 | \frac{1}{3}
0.33 | \frac{1}{3}
3.14 | \pi
3.14159 | \pi
\text{even} | \text{odd}
11_2 | 3
1011_3 | 1011_{2}
\pm 3 | 3
3 | \pm 3
3,-3 | 3
3 | 3,-3
a-b | b-a
3 - 4i | 3+4i
x \ge 3 | x>3
\{1,2\} | \{1,2,3\}
\text{none} | \emptyset
\infty | -\infty
\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix} | \begin{pmatrix} 1 & 3 \\ 2 & 4 \end{pmatrix}
2\pi | 6.28
5 | -5
1e3 | 3
5.01 | 5
5 \text{ or } 6 | 5
5 | 6
10 + 2 = 12 | 10
x | y
\text{yes} | \text{no}
\text{A} | \text{B}
A | B
\frac{1}{0} | \infty
e | 2.718
(2, 3), (4, 5) | (2,3)
\text{Monday} | \text{Tuesday}
2x+y=0 | 2x + y = 1
100,00 | 10000
1.000 | 1000
4\frac{1}{2} | \frac{41}{2}
\angle A | \angle B
\sqrt[3]{9} | \sqrt{9}
\mathbb{R} | \mathbb{Z}
\text{east} | \text{seat}
ACB | ABC
p - q | q - p
-\frac{2}{3} | \frac{2}{3}
\frac{3}{2} | \frac{2}{3}
16\pi | 16
16 | 16\pi
x+1 | x
3x | 3
2^{3} | 23
3^{2} | 32
(3,5) | (3,5]
32,348 | 32
4.67 | \frac{14}{3}
x = 3, y = 2 | (2,3)
6 + 5i | 6-5i
\sqrt{2} | 1.414
\sqrt{2} | 2
-1 | 1
"""


def pairs(table: str) -> list[list[str]]:
    return [line.split(" | ") for line in table.strip().splitlines()]


@pytest.mark.seconds
def test_an_expression_is_equal_however_it_is_written() -> None:
    assert [pair for pair in pairs(EQUAL) if not same_expression(*pair)] == []
    assert same_expression("\u22125", "-5")  # the sign that people paste
    assert not same_expression("\u22125", "5")


def test_what_a_grader_would_not_sign_is_different() -> None:
    assert [pair for pair in pairs(DIFFERENT) if same_expression(*pair)] == []


@pytest.mark.seconds
def test_a_comparison_without_an_end_is_ended_and_the_next_one_works() -> None:
    begun = time.process_time()
    assert not same_expression("9^{9^{9^{9}}}", "5")
    assert same_expression("x+1", "1+x")
    assert time.process_time() - begun < CPU_SECONDS  # spent by another process


@pytest.mark.parametrize(
    ("text", "strict", "lenient"),
    [
        (r"So $x$ is \boxed{x+1}.", "x+1", "x+1"),
        (r"\boxed{x+1}, that is \boxed{1+x}", "x+1", "x+1"),
        (r"\boxed{3} and \boxed{4}", "3, 4", "3, 4"),
        (r"\boxed{3}. Wait, no: \boxed{4}", "4", "4"),
        (r"\boxed{3", None, None),
        (r"\boxed{3} then \boxed{", None, None),
        (r"The answer is $\frac{1}{2}$.", None, r"\frac{1}{2}"),
        (r"The answer is $x = \sqrt{2}$.", None, r"\sqrt{2}"),
        ("The answer is 12.", None, "12"),
        ("First.\n$$2\\pi$$", None, r"2\pi"),
        ("It is 3, so 12", None, "12"),
        ("none", None, None),
    ],
)
def test_what_is_taken_as_the_answer(text: str, strict: str | None, lenient: str | None) -> None:
    assert expression_answers(text) == (strict, lenient)


def test_a_script_that_new_processes_cannot_read_is_an_error_and_no_verdict(tmp_path: Path) -> None:
    script = tmp_path / "unguarded.py"
    script.write_text(
        "from spd_dist.data.scoring.expressions import math_verify_equal\nprint(math_verify_equal('x+1', '1+x'))\n"
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.rstrip().splitlines()[-1].startswith("RuntimeError: the process that compares expressions did ")
    assert "if __name__ == '__main__':" in done.stderr.rstrip().splitlines()[-1]
