"""The README's two commands, word for word, and its table held against what a run printed and wrote.

`python3 .ci/quickstart.py command 1` prints the first command; `... check OUTPUT RUN_DIR` compares. The standard
library is enough: nothing is installed yet when the first command is asked for.
"""

import html
import json
import re
import sys
from pathlib import Path

README = Path(__file__).resolve().parent.parent / "README.md"
ROW = re.compile(r"^\s*(\w+)\s+(\d+\.\d)\s+(\d+\.\d) to (\d+\.\d)\s+(\d+)\b", re.MULTILINE)
"""A row of the table of arms: name, right answers in percent, both ends of their interval, number of examples."""


def command(number, page):
    """The first or the second command of the page, without its comment."""
    block = re.search(r"^## Two commands\n+((?: {4}.*\n)+)", page, re.MULTILINE)
    if block is None:
        raise ValueError("README.md: '## Two commands' has no indented block of commands")
    lines = [re.sub(r"\s+#.*$", "", line).strip() for line in block[1].splitlines()]
    return [line for line in lines if line][number - 1]


def table(text):
    """Arm by arm: right answers and the ends of their interval, in percent, and the number of examples."""
    return {
        name: (float(right), float(low), float(high), int(count)) for name, right, low, high, count in ROW.findall(text)
    }


def faults(page, output, report, web_page):
    """What differs between the README's table, the printed one, `report.json` and `report.html`.

    Returns:
        Sentences, none if all is right: the printed table is the README's, or, where another processor rounds
        otherwise, each arm lies within the README's interval; report and page say what was printed.
    """
    shown, printed = table(page), table(output)
    found = []
    if not shown:
        found.append("README.md: there is no table of arms")
    if shown.keys() != printed.keys():
        found.append(f"arms: README.md has {sorted(shown)}, the run printed {sorted(printed)}")
    for arm in shown.keys() & printed.keys():
        _, low, high, count = shown[arm]
        right = printed[arm][0]
        if printed[arm][3] != count:
            found.append(f"{arm}: {printed[arm][3]} examples, README.md says {count}")
        elif not low <= right <= high:
            found.append(f"{arm}: {right} % right, README.md's interval is {low} to {high}")
    for arm, values in printed.items():
        summary = report["arms"].get(arm)
        if summary is None:
            found.append(f"{arm}: printed, but not in report.json")
            continue
        written = (summary["value"], *summary["interval"])
        if tuple(f"{100 * value:.1f}" for value in written) != tuple(f"{value:.1f}" for value in values[:3]):
            found.append(f"{arm}: report.json says {written}, printed was {values[:3]}")
        row = [f"{values[0]:.1f}", f"{values[1]:.1f} to {values[2]:.1f}", str(values[3])]
        if row not in rows_of(web_page, arm):
            found.append(f"{arm}: report.html has no row {row}")
    return found


def rows_of(web_page, arm):
    """The first cells after the arm's name, of every row of the page's tables that begins with it."""
    rows = re.findall(r"<tr>(.*?)</tr>", web_page, re.DOTALL)
    cells = [
        [html.unescape(cell).strip() for cell in re.findall(r"<td[^>]*>(.*?)</td>", row, re.DOTALL)] for row in rows
    ]
    return [row[1:4] for row in cells if row and row[0] == arm]


def main():
    """Print a command, or compare; exit code 1 if something differs."""
    page = README.read_text(encoding="utf-8")
    if sys.argv[1] == "command":
        print(command(int(sys.argv[2]), page))
        return 0
    output, run_dir = Path(sys.argv[2]).read_text(encoding="utf-8"), Path(sys.argv[3])
    report = json.loads((run_dir / "report.json").read_text(encoding="utf-8"))
    found = faults(page, output, report, (run_dir / "report.html").read_text(encoding="utf-8"))
    same = table(page) == table(output)
    print("\n".join(found) or f"the table is README's{'' if same else ', within its intervals'}")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
