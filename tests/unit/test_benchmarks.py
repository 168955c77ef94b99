"""README's table of benchmarks: each row names what measures it; and a benchmark whose child dies ends with it."""

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

PAGE = """
## Benchmarks

| what | against | key | ratio | command |
|---|---|---|---|---|
| gradient rows | a backward pass | `speedup` | 2.5 | `python benchmarks/capture.py` |
| the same | a forward pass | `time` | 1.5 | `python benchmarks/capture.py --threads 2` |

## Next
"""


def module(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"benchmarks_{name}", Path(f"benchmarks/{name}.py"))
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


everything = module("_all")


def test_rows_that_name_what_was_measured_are_right():
    rows = everything.table_rows(PAGE, "README.md")
    assert [(row.script, row.key) for row in rows] == [("capture", "speedup"), ("capture", "time")]
    assert everything.faults(rows, {"capture": {"ratios": {"speedup": 2.4, "time": 1.6}}}) == []


def test_a_row_of_another_key_or_script_and_a_benchmark_of_no_row_are_faults():
    found = everything.faults(
        everything.table_rows(PAGE, "README.md"), {"capture": {"ratios": {"time": 1}}, "sketch": {"ratios": {}}}
    )
    assert found == [
        "gradient rows: capture.py gives no speedup; it gives time",
        "no row of a table is of sketch.py",
    ]
    assert (
        "capture.py is no benchmark that was run" in everything.faults(everything.table_rows(PAGE, "README.md"), {})[0]
    )


@pytest.mark.parametrize(("old", "new", "message"), [
    ("`speedup`", "speedup", "the key in back quotes"),
    ("`python benchmarks/capture.py`", "capture.py", "its command is not `python benchmarks/NAME.py"),
    (" 2.5 |", "", "a row has what, against, key, ratio, command"),
    ("## Benchmarks", "## Speed", "README.md: there is no table under the heading Benchmarks"),
])  # fmt: skip
def test_a_row_that_cannot_be_checked_is_refused(old, new, message):
    with pytest.raises(ValueError, match=message):
        everything.table_rows(PAGE.replace(old, new), "README.md")


def test_the_pages_name_every_benchmark_once_at_least_and_agree():
    pages = {name: everything.table_rows(Path(name).read_text(encoding="utf-8"), name) for name in everything.PAGES}
    assert {row.script for row in pages["README.md"]} == set(everything.benchmarks())
    assert set(pages["README.md"]) <= set(pages["docs/benchmarks.md"])


PROGRAM = """
import multiprocessing, os, sys
sys.path.insert(0, "benchmarks")
import common

def child(sender):
    os._exit(7)

if __name__ == "__main__":
    common.EXTRAS["nowhere"] = "bench"
    common.parsed(common.parser(""), *{packages})
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=child, args=(sender,))
    process.start()
    sender.close()
    common.received(receiver, process, "the child")
"""


def started(*packages: str) -> subprocess.CompletedProcess:
    words = [sys.executable, "-c", PROGRAM.format(packages=packages)]
    return subprocess.run(words, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.seconds
def test_a_child_that_dies_ends_the_benchmark_and_a_missing_package_its_start():
    dead = started()
    assert dead.returncode == 1
    assert "error: the child: its process ended with 7; why stands above" in dead.stderr
    absent = started("nowhere")
    assert absent.returncode == 2
    assert absent.stderr.strip() == "error: nowhere is not installed: pip install -e '.[bench]'"
