"""A release: its files agree, and what is built runs where there is no clone; containers install what CI tests."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import save_tiny_model

SPEC = importlib.util.spec_from_file_location("ci_release", Path(".ci/release.py"))
release = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(release)

PYPROJECT = '[project]\nversion = "1.2.0"\n'
CITATION = "cff-version: 1.2.0\nversion: 1.2.0\n"
CHANGELOG = "# Changelog\n\n## Unreleased\n\n## 1.2.0\n- A thing.\n\n## 1.1.0\n- Another.\n"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    return release.build(Path.cwd(), tmp_path_factory.mktemp("built"))[1]


def test_files_that_agree_have_no_fault():
    assert release.text_faults(PYPROJECT, CITATION, CHANGELOG) == []


@pytest.mark.parametrize(("changes", "fault"), [
    ({"citation": CITATION.replace("\nversion: 1.2.0", "\nversion: 1.1.0")}, "CITATION.cff: its version is 1.1.0"),
    ({"changelog": CHANGELOG.replace("## Unreleased\n", "## Unreleased\n- New.\n")}, "entries stand under Unreleased"),
    ({"changelog": CHANGELOG.replace("## 1.2.0\n- A thing.\n", "")}, "`## 1.2.0` has no entries"),
])  # fmt: skip
def test_a_file_that_does_not_agree_is_named(changes, fault):
    (found,) = release.text_faults(**{"pyproject": PYPROJECT, "citation": CITATION, "changelog": CHANGELOG} | changes)
    assert fault in found


def test_this_tree_names_one_version():
    texts = [Path(name).read_text() for name in ("pyproject.toml", "CITATION.cff", "CHANGELOG.md")]
    assert [fault for fault in release.text_faults(*texts) if "CITATION" in fault] == []


@pytest.mark.seconds
def test_a_wheel_that_is_built_from_the_source_archive_is_whole_and_starts_without_the_clone(wheel):
    assert release.wheel_faults(wheel, Path.cwd()) == []


@pytest.mark.seconds
def test_what_is_missing_in_a_wheel_is_named(wheel, tmp_path):
    tree = shutil.copytree(Path("spd_dist"), tmp_path / "spd_dist", symlinks=True)
    (tree / "hub" / "later.md.j2").write_text("not in the wheel")
    assert f"{wheel.name}: spd_dist/hub/later.md.j2 is missing" in release.wheel_faults(wheel, tmp_path)


@pytest.mark.seconds
def test_a_package_whose_hash_is_not_the_locked_one_is_refused(tmp_path):
    """And one without a hash: of a wheel of our own, so that nothing is downloaded."""
    (tmp_path / "pkg").mkdir()
    (tmp_path / "pkg" / "pyproject.toml").write_text('[project]\nname = "pkg-of-ours"\nversion = "1"\n')
    release._build("build_wheel", tmp_path / "pkg", tmp_path)
    (file,) = tmp_path.glob("*.whl")
    line, digest = f"--no-index\n--find-links {tmp_path}\npkg-of-ours==1", hashlib.sha256(file.read_bytes()).hexdigest()
    for text, fault in {
        f"{line} --hash=sha256:{digest}": "",
        f"{line} --hash=sha256:{'0' * 64}": "hash",
        line: "hash",
    }.items():
        (tmp_path / "requirements.lock").write_text(f"{text}\n")
        found = release.lock_faults(tmp_path, locks=[release.LOCK])
        assert bool(found) == bool(fault)
        assert all(one.startswith("requirements.lock: --require-hashes refuses it: ") and fault in one for one in found)


@pytest.mark.seconds
def test_batch_scripts_need_the_clone_and_say_so(wheel, tmp_path):
    environment = release.unpacked(wheel, tmp_path / "site")
    command = [sys.executable, "-P", "-m", "spd_dist.launch", "submit", "fused", "--config", "package:quickstart"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert f"error: slurm/job.sbatch.j2 is not in {tmp_path}: submit from the root of a clone" in done.stderr


@pytest.mark.slow
def test_the_method_runs_from_the_wheel_in_an_empty_folder(wheel, tmp_path):
    environment = release.unpacked(wheel, tmp_path / "site")
    model = save_tiny_model(tmp_path / "model")
    words = [f"model.name={model}", "data.num_train=4", "data.num_test=4", "calibrate.num_examples=4", "run_dir=run",
             "generate.max_new_tokens=4", "evaluate.max_new_tokens=4", "metrics.wandb=disabled"]  # fmt: skip
    command = [sys.executable, "-P", "-m", "spd_dist.launch", "run", "--config", "package:quickstart", *words]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "report.html").is_file()
    assert str(Path.cwd()) not in (tmp_path / "run" / "environment.json").read_text()


INSTRUCTIONS = {"FROM", "RUN", "COPY", "USER", "WORKDIR", "ENV", "CMD"}


def test_the_dockerfile_copies_what_there_is_and_installs_under_the_constraints():
    lines = re.sub(r"\\\n", " ", Path("Dockerfile").read_text()).splitlines()
    parsed = [line.split(maxsplit=1) for line in lines if line and not line.startswith("#")]
    assert {word for word, _ in parsed} == INSTRUCTIONS
    copied = [name for word, rest in parsed if word == "COPY" for name in rest.split()[:-1]]
    assert [name for name in copied if not Path(name).exists()] == []
    assert all("--constraint" in line for line in installs("\n".join(rest for word, rest in parsed if word == "RUN")))
    (command,) = [json.loads(rest) for word, rest in parsed if word == "CMD"]
    assert command[-1] == "package:quickstart"
    if subprocess.run(["docker", "info"], capture_output=True, check=False).returncode == 0:
        subprocess.run(["docker", "build", "--check", "."], check=True)


def test_apptainer_copies_and_installs_what_docker_does():
    text = Path("apptainer.def").read_text()
    sections = dict(re.findall(r"^%(\w+)\n(.*?)(?=^%|\Z)", text, re.MULTILINE | re.DOTALL))
    assert list(sections) == ["files", "post", "environment", "runscript"]
    copied = {line.split()[0] for line in sections["files"].splitlines() if line.strip()}
    assert copied == {"constraints.txt", "pyproject.toml", "README.md", "LICENSE", "configs", "spd_dist"}
    docker = Path("Dockerfile").read_text().replace("/opt/spd_dist/constraints.txt", "constraints.txt")
    docker = docker.replace(" /opt/spd_dist ", " . ")
    assert installs(sections["post"]) == installs(re.sub(r"\\\n", " ", docker))


def installs(text: str) -> list[str]:
    """The commands of pip, in their order."""
    return [found.strip() for found in re.findall(r"pip install [^&\n]+", text)]
