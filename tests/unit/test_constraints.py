"""constraints.txt against the environment that `make install` made."""

import re
import sys
import sysconfig
from importlib import metadata
from pathlib import Path

import pytest

SITE = sysconfig.get_path("purelib")
"""Where packages are; a library may have added its own copies of others to the path."""
NOT_PINNED = {"pip", "spd-dist"}
"""pip comes with the Python that makes the environment."""
FOR_CARDS = re.compile(r"(?:nvidia|cuda)-.*|triton")
"""What torch's build for cards brings, at versions of torch's own; the pins are those of its build for CPUs."""


def pins() -> dict[str, str]:
    lines = Path("constraints.txt").read_text(encoding="utf-8").splitlines()
    return dict(_normalized(*line.split("==")) for line in lines if "==" in line and not line.startswith("#"))


def _normalized(name: str, version: str) -> tuple[str, str]:
    return re.sub(r"[-_.]+", "-", name).lower(), version.partition("+")[0]


def test_every_installed_package_is_pinned_at_its_version_and_no_pin_is_left_over():
    if not (Path(sys.prefix) / ".installed").is_file():
        pytest.skip("this environment was not made by `make install`")
    installed = dict(_normalized(one.metadata["Name"], one.version) for one in metadata.distributions(path=[SITE]))
    pinned = pins()
    others = dict(installed.items() - pinned.items())
    assert {name for name in others if name not in NOT_PINNED and not FOR_CARDS.fullmatch(name)} == set()
    assert pinned.keys() - installed.keys() - {"uv"} == set(), "uv is installed only where there is none yet"


def test_every_line_is_a_pin_or_a_comment():
    lines = [line for line in Path("constraints.txt").read_text(encoding="utf-8").splitlines() if line[:1] != "#"]
    assert [line for line in lines if not re.fullmatch(r"[A-Za-z0-9_.-]+==[A-Za-z0-9_.]+", line)] == []
    assert len({_normalized(*line.split("=="))[0] for line in lines}) == len(lines)


def test_the_locks_have_the_pins_and_a_hash_of_each():
    locked = hashed("requirements.lock")
    torch, built = {"torch": pins()["torch"]}, hashed("requirements-built.lock")
    assert locked | torch | built == pins()
    assert not locked.keys() & {*torch, *built}, "which are in files of their own"
    assert built.keys() == {"deepspeed"}
    assert hashed("requirements-torch-cpu.lock") == torch
    of_cards = hashed("requirements-torch-cuda.lock")
    assert {name: of_cards[name] for name in torch} == torch
    assert {"nvidia-cudnn-cu13", "nvidia-nccl-cu13", "triton"} <= of_cards.keys()
    assert not of_cards.keys() & locked.keys()


def hashed(file: str) -> dict[str, str]:
    """Versions by package in a lock of nothing but packages with hashes."""
    text = Path(file).read_text(encoding="utf-8")
    left = re.sub(r"^(\S+==\S+ \\|    --hash=sha256:[0-9a-f]{64}(?: \\)?|#.*)\n", "", text, flags=re.MULTILINE)
    assert left == ""
    found = re.findall(r"^(\S+?)==(\S+) \\\n((?:    --hash=sha256:[0-9a-f]{64}(?: \\)?\n)+)", text, re.MULTILINE)
    return dict(_normalized(name, version) for name, version, _ in found)


def test_actions_of_ci_are_named_by_commit():
    lines = [line for file in Path(".github/workflows").glob("*.yml") for line in file.read_text().splitlines()]
    uses = [line for line in lines if "uses:" in line]
    assert uses
    assert [line for line in uses if not re.search(r"@[0-9a-f]{40}  # v\d", line)] == []
