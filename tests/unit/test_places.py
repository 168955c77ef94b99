"""What a first run makes outside of its folder: found wrong by name, with the setting that moves it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from spd_dist.preflight.places import faults_of_places
from spd_dist.runtime.home import LIBRARIES, make_room, stand_ins


def test_a_home_of_ones_own_is_right_and_nothing_stands_in(tmp_path):
    environment = {"HOME": str(tmp_path), "TMPDIR": str(tmp_path)[:79]}
    environment["TMPDIR"] = "/tmp"
    assert {name for name in faults_of_places(None, environment) if name != "shared memory"} == set()
    assert stand_ins(environment) == {}


@pytest.mark.parametrize(("environment", "cache_dir", "name", "message"), [
    ({}, None, "home", "HOME (not set) cannot be written: set HOME to a folder of yours"),
    ({"HOME": "/proc/nobody"}, None, "home", "HOME (/proc/nobody) cannot be written"),
    ({"HF_HOME": "/proc/hub"}, None, "hub cache", "/proc/hub cannot be written: set HF_HOME to a folder with room"),
    ({"XDG_CACHE_HOME": "/proc/x"}, None, "model cache", "/proc/x/spd_dist cannot be written: set model.cache_dir="),
    ({}, "/sys/models", "model cache", "/sys/models cannot be written: set model.cache_dir=FOLDER"),
    ({"TMPDIR": "/nowhere/at/all"}, None, "temporary folder", "/nowhere/at/all cannot be written: set TMPDIR"),
    ({"TMPDIR": "/proc/t"}, None, "temporary folder", "/proc/t cannot be written: set TMPDIR to a folder that can"),
])  # fmt: skip
def test_each_place_that_cannot_be_written_is_named_with_what_moves_it(environment, cache_dir, name, message):
    assert message in faults_of_places(cache_dir, environment)[name]


def test_a_temporary_folder_with_a_long_name_is_found(tmp_path):
    folder = tmp_path / ("long" * 20)
    folder.mkdir()
    assert "too long a name for the sockets" in faults_of_places(None, {"TMPDIR": str(folder)})["temporary folder"]


def test_libraries_get_folders_where_the_home_cannot_be_written(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    environment = {"HOME": "/proc/nobody", "MPLCONFIGDIR": "/mine"}
    said = make_room(environment)
    assert "HOME (/proc/nobody) cannot be written: matplotlib, W&B and compilers keep their files in" in said
    assert environment["MPLCONFIGDIR"] == "/mine"
    moved = LIBRARIES.keys() - {"MPLCONFIGDIR"}
    assert all(Path(environment[name]).is_relative_to(tmp_path) and Path(environment[name]).is_dir() for name in moved)
    assert make_room({"HOME": str(tmp_path)}) is None


INSTALL = "launchers/install.py"


def checked(*words: str, program: str = "") -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", program, *words] if program else [sys.executable, INSTALL, *words]
    return subprocess.run([*command, "--check"], capture_output=True, text=True, check=False, timeout=60)


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


def test_a_machine_that_is_right_is_said_to_be(tmp_path):
    done = checked("--venv", str(tmp_path / "venv"))
    assert (done.returncode, done.stderr) == (0, "")
    assert "are right" in done.stdout


def test_the_set_up_script_is_python_that_old_pythons_read():
    compile(Path(INSTALL).read_text(encoding="utf-8"), INSTALL, "exec", dont_inherit=True)
    for name in ("3.8.18", "3.9.18", "3.10.13"):
        python = Path(f"/root/.pyenv/versions/{name}/bin/python")
        if python.exists() and os.access(python, os.X_OK):
            done = subprocess.run([python, INSTALL, "--check"], capture_output=True, text=True, check=False)
            assert done.returncode == 1
            assert f"is {name.rpartition('.')[0]}: make PYTHON=python3.11" in done.stderr
