"""Every benchmark, one after the other, and the tables of README.md and docs/benchmarks.md held against them.

`python benchmarks/_all.py --json-folder DIR [--smoke] [NAME ...]` prints the seconds of each and ends with 1 if one
fails, or if a row of the table names a script or a key that is not there. Without `--smoke` it prints the rows anew.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).resolve().parent
PAGES = ("README.md", "docs/benchmarks.md")


class Row(NamedTuple):
    """A row of a page's table."""

    what: str
    against: str
    key: str
    """Of the benchmark's ratios."""
    ratio: str
    """As it was measured, with a unit or none."""
    command: str

    @property
    def script(self) -> str:
        """The benchmark's name: `capture` of `python benchmarks/capture.py`."""
        return Path(shlex.split(self.command)[1]).stem


def table_rows(page: str, name: str) -> list[Row]:
    """The rows of the table under the heading `Benchmarks` of the page `name`.

    Raises:
        ValueError: there is none, or a row lacks its key or its command.
    """
    _, *rest = re.split(r"^#+ Benchmarks\n", page, maxsplit=1, flags=re.MULTILINE)
    section = "".join(rest).partition("\n## ")[0]
    lines = [line.strip().strip("|").split("|") for line in section.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line] for line in lines[2:]]
    if not cells:
        raise ValueError(f"{name}: there is no table under the heading Benchmarks")
    for row in cells:
        if len(row) != len(Row._fields) or not re.fullmatch(r"`\w+`", row[2]):
            raise ValueError(f"{name}: {' | '.join(row)}: a row has {', '.join(Row._fields)}, the key in back quotes")
        if not re.fullmatch(r"`python benchmarks/\w+\.py.*`", row[4]):
            raise ValueError(f"{name}: {' | '.join(row)}: its command is not `python benchmarks/NAME.py ...`")
    return [Row(*(cell.strip("`") for cell in row)) for row in cells]


def faults(rows: list[Row], measured: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Rows whose script was not run or has no such ratio, and benchmarks of no row; of all pages together."""
    found = []
    for row in rows:
        if row.script not in measured:
            found.append(f"{row.what}: {row.script}.py is no benchmark that was run")
        elif row.key not in measured[row.script]["ratios"]:
            known = ", ".join(measured[row.script]["ratios"])
            found.append(f"{row.what}: {row.script}.py gives no {row.key}; it gives {known}")
    named = {row.script for row in rows}
    return found + [f"no row of a table is of {name}.py" for name in measured if name not in named]


def benchmarks() -> list[str]:
    """The names of all benchmarks: files that are no `common.py` and do not begin with `_`."""
    return sorted(file.stem for file in HERE.glob("*.py") if file.stem != "common" and file.stem[0] != "_")


def main() -> int:
    """Run, check, and print."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("names", nargs="*", metavar="NAME", help="all if none is given")
    options.add_argument("--smoke", action="store_true", help="in seconds, at sizes whose numbers say nothing")
    options.add_argument("--json-folder", type=Path, required=True, metavar="DIR", help="a file of each goes here")
    chosen = options.parse_args()
    names = chosen.names or benchmarks()
    failed = []
    for name in names:
        file, started = chosen.json_folder / f"{name}.json", time.monotonic()
        words = [sys.executable, str(HERE / f"{name}.py"), "--json", str(file), *["--smoke"][: chosen.smoke]]
        code = subprocess.run(words, stdin=subprocess.DEVNULL, check=False).returncode
        print(
            f"{name}: {'done' if code == 0 else f'failed with {code}'}, {time.monotonic() - started:.1f} s", flush=True
        )
        failed += [name] if code else []
    if failed:
        print(f"failed: {', '.join(failed)}")
        return 1
    pages = {name: (HERE.parent / name).read_text(encoding="utf-8") for name in PAGES}
    rows = [row for name, page in pages.items() for row in table_rows(page, name)]
    read = {name: json.loads((chosen.json_folder / f"{name}.json").read_text(encoding="utf-8")) for name in names}
    checked = [row for row in rows if "--vllm-python" not in row.command]  # needs an environment of its own
    found = faults([row for row in checked if not chosen.names or row.script in names], read)
    for row in rows if not chosen.smoke else []:
        if row.script in read and row.key in read[row.script]["ratios"]:
            value = read[row.script]["ratios"][row.key]
            print(f"| {row.what} | {row.against} | `{row.key}` | {value:.2f} | `{row.command}` |")
    print("\n".join(found) or "each row of the tables names a benchmark that ran and a ratio that it gives")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
