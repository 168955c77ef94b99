"""What CI checks before it believes the pages: commands that are shown, and the table of the first run."""

import importlib.util
import os
import re
import shlex
import subprocess
from pathlib import Path
from types import ModuleType

import pytest

PAGE = """# Title

## Two commands

    make quickstart   # sets up
    make test

It prints

                right          95 %       minus
     arm            %      interval    n   base
     base        31.2  23.9 to 39.7  128
     spd         28.9  21.8 to 37.3  128   -2.3

    python launchers/spd.py --config configs/NAME.yaml  # a comment
    deepspeed launchers/spd.py \\
      --config configs/quickstart.yaml

`launchers/plan.py` is no command, `touch RUN_DIR/PREEMPT` is one.
```bash
NODES="1 4" slurm/stages.sh --config A.yaml
```
"""
REPORT = {"arms": {"base": {"value": 0.3125, "interval": [0.2387, 0.3972]},
                   "spd": {"value": 0.2891, "interval": [0.2176, 0.3731]}}}  # fmt: skip
WEB_PAGE = (
    '<tr><td title="x">base</td><td>31.2</td><td>23.9 to 39.7</td>\n<td>128</td></tr>'
    "<tr><td>spd</td><td>28.9</td><td>21.8 to 37.3</td><td>128</td></tr>"
)


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"ci_{name}", Path(f".ci/{name}.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


documented, quickstart = script("documented"), script("quickstart")


def test_the_two_commands_are_read_from_the_page():
    assert [quickstart.command(number, PAGE) for number in (1, 2)] == ["make quickstart", "make test"]
    with pytest.raises(ValueError, match="'## Two commands' has no indented block"):
        quickstart.command(1, "# Title\n")


def test_equal_figures_pass_and_so_do_those_within_the_intervals():
    assert quickstart.faults(PAGE, PAGE, REPORT, WEB_PAGE) == []
    moved = PAGE.replace("28.9  21.8 to 37.3", "29.7  22.5 to 38.1")
    report = {"arms": REPORT["arms"] | {"spd": {"value": 0.297, "interval": [0.225, 0.381]}}}
    page = WEB_PAGE.replace("28.9", "29.7").replace("21.8 to 37.3", "22.5 to 38.1")
    assert quickstart.faults(PAGE, moved, report, page) == []


@pytest.mark.parametrize(("old", "new", "fault"), [
    ("31.2  23.9", "40.6  23.9", "base: 40.6 % right, README.md's interval is 23.9 to 39.7"),
    ("39.7  128", "39.7  127", "base: 127 examples, README.md says 128"),
    ("     spd         28.9", "     psr         28.9", "arms: README.md has"),
    ("31.2  23.9", "32.0  23.9", "base: report.json says"),
    ("31.2  23.9", "32.0  23.9", "base: report.html has no row"),
])  # fmt: skip
def test_a_figure_that_differs_is_named(old, new, fault):
    assert any(fault in one for one in quickstart.faults(PAGE, PAGE.replace(old, new), REPORT, WEB_PAGE))


def test_a_page_without_a_table_fails():
    assert "README.md: there is no table of arms" in quickstart.faults("# Title\n", "", REPORT, WEB_PAGE)


def test_commands_are_found_in_blocks_and_sentences():
    assert list(documented.page_commands(PAGE)) == [
        'NODES="1 4" slurm/stages.sh --config A.yaml',
        "make quickstart",
        "make test",
        "python launchers/spd.py --config configs/NAME.yaml",
        "deepspeed launchers/spd.py --config configs/quickstart.yaml",
        "touch RUN_DIR/PREEMPT",
    ]
    assert list(documented.config_commands("# make x  (deepspeed y.py z)\n# `python a.py b` says\nrun_dir: x\n")) == [
        "make x",
        "deepspeed y.py z",
        "python a.py b",
    ]


def test_a_command_in_no_table_and_an_entry_of_no_page_are_faults(tmp_path, monkeypatch):
    (tmp_path / "README.md").write_text(PAGE)
    monkeypatch.chdir(tmp_path)
    rest = {name: "" for name in documented.page_commands(PAGE) if name != "make test"}
    found = documented.check({"run": rest | {"python gone.py now": ""}, "parse": {}})
    assert found == [
        "README.md: `make test` is in no table of commands.toml",
        "commands.toml: `python gone.py now` stands in no page or config",
    ]


@pytest.mark.parametrize("command", [
    "python launchers/spd.py --confg configs/quickstart.yaml",
    "deepspeed --no_such launchers/spd.py --config configs/quickstart.yaml",
    "torchrun --nnodes 2 launchers/spd.py --config configs/nowhere.yaml",
    "sbatch slurm/nowhere.sbatch --config configs/quickstart.yaml",
    "make no-such-target",
])  # fmt: skip
def test_a_command_that_would_not_start_is_a_fault(command, capfd):
    shown = documented.documented_commands()
    tables = {"parse": {command: ""}, "others": dict.fromkeys(shown, "")}
    found = documented.check(tables)
    assert [one for one in found if "cannot be parsed" in one and command in one], found


def test_a_command_that_starts_is_parsed_and_its_config_loaded():
    documented.parse(shlex.split("deepspeed --num_accelerators 2 launchers/spd.py --config configs/quickstart.yaml"))
    documented.parse(shlex.split("srun --nodes=2 python launchers/doctor.py --config configs/quickstart.yaml"))


def test_every_part_of_ci_has_a_function_and_a_share_of_45_minutes():
    text = Path(".ci/run").read_text()
    shares = {name: int(seconds) for name, seconds in re.findall(r"^  \[(\w+)\]=(\d+)", text, re.MULTILINE)}
    order = re.search(r"^ORDER=\((.*)\)", text, re.MULTILINE)[1].split()
    exported = re.search(r"^export -f (.*)", text, re.MULTILINE)[1].split()
    defined = re.findall(r"^(\w+)\(\) \{", text, re.MULTILINE)
    assert set(order) == set(exported) == shares.keys() == set(defined) - {"report"}
    assert sum(shares.values()) <= 45 * 60
    assert order[0] == "quickstart", "the others use its environment and its run"


@pytest.mark.parametrize("target", ["quickstart", "test", "test-cluster", "test-faults", "doctor"])
def test_a_shell_that_keeps_no_compiled_modules_makes_no_start_slower(target):
    shell = os.environ | {"PYTHONDONTWRITEBYTECODE": "1"}
    shown = subprocess.run(["make", "--dry-run", target], env=shell, capture_output=True, text=True, check=True).stdout
    starts = [line for line in shown.splitlines() if "TOKENIZERS_PARALLELISM" in line]
    assert starts
    assert all(" PYTHONDONTWRITEBYTECODE= " in line for line in starts)
    assert re.search(r"^unset .*\bPYTHONDONTWRITEBYTECODE\b", Path(".ci/run").read_text(), re.MULTILINE)
