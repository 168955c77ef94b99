"""GGUF files: converted once into a cached folder of safetensors, which then loads as any checkpoint does."""

from __future__ import annotations

import functools
import glob
import hashlib
import importlib.util
import logging
import os
import shutil
import socket
import threading
import time
from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from safetensors import SafetensorError
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from spd_dist.distributed.lock import alone_in
from spd_dist.errors import DataError, named_path
from spd_dist.models.conversion import check_written, read_gguf, read_settings, why_incomplete, write_model
from spd_dist.models.gguf_header import check_gguf

log = logging.getLogger(__name__)

PACKAGE = "package:"
PARTIAL, OLD = ".partial", ".old"
FLOAT32_BYTES = 4
SAY_EVERY_SECONDS = 10.0
LEFT_SECONDS = 24 * 3600.0
"""After which what an unfinished conversion wrote last is rubbish, whoever it was."""


def is_gguf(name: str) -> bool:
    """Whether `name` means a GGUF file, which may or may not be there."""
    return name.startswith(PACKAGE) or Path(name).suffix == ".gguf"


def find_gguf(name: str) -> Path | None:
    """The GGUF file that `name` means, or None: a path that ends in .gguf, or `package:NAME` for one in a package.

    Raises:
        DataError: the package is not installed or holds no GGUF file, or the file is missing.
    """
    if not is_gguf(name):
        return None
    if name.startswith(PACKAGE):
        return _in_package(name.removeprefix(PACKAGE))
    path = named_path(name)
    if not path.is_file():
        raise DataError(f"model.name: {name} is no file; give the path of a GGUF file, a model folder or a hub name")
    return path


def _in_package(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise DataError(f"model.name: package:{package} is not installed; pip install -e '.[quickstart]'")
    found = sorted(path for folder in spec.submodule_search_locations for path in Path(folder).rglob("*.gguf"))
    if not found:
        raise DataError(f"model.name: package:{package} holds no .gguf file; name a package that does, or a path")
    return found[0]


def cache_folder(cache_dir: str | None) -> Path:
    """Where converted weights are kept: `cache_dir`, or spd_dist in XDG_CACHE_HOME, which is ~/.cache if not set.

    Raises:
        DataError: there is no home folder.
    """
    base = os.environ.get("XDG_CACHE_HOME", "")
    try:
        if cache_dir:
            return Path(cache_dir).expanduser().absolute()
        if os.path.isabs(base):  # a relative one is to be ignored, by its specification
            return Path(base) / "spd_dist"
        if os.environ.get("HOME") == "":
            raise RuntimeError("HOME is empty")
        return Path.home() / ".cache" / "spd_dist"
    except RuntimeError as error:
        raise DataError(
            f"model.cache_dir: {cache_dir}, and there is no home folder to keep converted weights in ({error}); set "
            "model.cache_dir=FOLDER"
        ) from error


def converted(gguf: Path, cache_dir: str | None) -> Path:
    """The folder with the de-quantized float32 weights and the tokenizer of `gguf`, made at the first call.

    Processes that share the cache wait for the one that makes it, hours if need be: not for a collective's body. It
    appears whole or not at all, and one that is not whole is made again.

    Raises:
        DataError: the file can't be converted, or the cache not be written.
    """
    gguf = gguf.absolute()
    cache = cache_folder(cache_dir)
    folder = cache / f"{gguf.stem}-{_digest(gguf)}"
    if why_incomplete(folder) is None:
        _remove_left(folder, is_locked=False)
        return folder
    assert not is_deepspeed_zero3_enabled(), "convert before a model is loaded into shards, which all ranks do together"
    header = check_gguf(gguf)
    settings = read_settings(gguf, header)
    num_bytes = FLOAT32_BYTES * sum(tensor.num_weights for tensor in header.tensors)
    with ExitStack() as held:
        with _kept_in(cache, num_bytes):
            cache.mkdir(parents=True, exist_ok=True)
            held.enter_context(_said(f"converting {gguf.name} to safetensors in {cache}"))
            is_locked = held.enter_context(alone_in(folder))
        problem = why_incomplete(folder)  # another process may have made it meanwhile
        if problem is not None:
            if folder.exists():
                log.warning("%s: %s; it is converted again", folder, problem)
            _remove_left(folder, is_locked=is_locked)
            model, tokenizer = read_gguf(gguf, header, settings)
            with _unfinished(folder) as partial:
                with _kept_in(cache, num_bytes):
                    partial.mkdir()
                    write_model(model, tokenizer, partial)
                check_written(partial, model, tokenizer)
                with _kept_in(cache, num_bytes):
                    _publish(partial, folder)
    return folder


@contextmanager
def _kept_in(cache: Path, num_bytes: int) -> Generator[None]:
    """Name the setting that moves the cache if it cannot be written; nothing is read in the body."""
    try:
        yield
    except (OSError, SafetensorError, DataError) as error:
        cause = error.__cause__ if isinstance(error, DataError) else error
        reason = cause.strerror if isinstance(cause, OSError) else cause
        raise DataError(
            f"model.cache_dir: {cache} cannot be written ({reason}), and converted weights of "
            f"{num_bytes / 2**30:.2f} GiB are kept there; set model.cache_dir=FOLDER with room for them"
        ) from error


@contextmanager
def _said(doing: str) -> Generator[None]:
    """Say at the start and now and then what is waited for, whichever process does it."""
    started, is_over = time.monotonic(), threading.Event()

    def say() -> None:
        while not is_over.wait(SAY_EVERY_SECONDS):
            log.info("%s: %.0f s", doing, time.monotonic() - started)

    log.info("%s, once", doing)
    thread = threading.Thread(target=say, name="converting", daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()
    log.info("%s: done, %.1f s", doing, time.monotonic() - started)


@contextmanager
def _unfinished(folder: Path) -> Generator[Path]:
    """A place of this process beside `folder`, which is not there yet, and not there any more at the end."""
    partial = folder.with_name(f".{folder.name}.{socket.gethostname()}-{os.getpid()}{PARTIAL}")
    shutil.rmtree(partial, ignore_errors=True)  # of a killed process of the same number
    try:
        yield partial
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _publish(partial: Path, folder: Path) -> None:
    """Rename `partial` to `folder`; if there is an incomplete one, it makes way."""
    if folder.exists():
        if why_incomplete(folder) is None:  # where there are no locks, another process may have been faster
            return
        old = partial.with_suffix(OLD)
        folder.rename(old)
        shutil.rmtree(old, ignore_errors=True)
    partial.rename(folder)


def _remove_left(folder: Path, *, is_locked: bool) -> None:
    """Remove what killed processes left: those of this host while no other can be at work, others' after a day."""
    name = glob.escape(folder.name)
    places = [place for like in (f".{name}.*", f"{name}.*") for place in glob.glob(like, root_dir=folder.parent)]
    for left in (folder.parent / place for place in places):
        host, _, number = left.stem.removeprefix(f".{folder.name}.").rpartition("-")
        is_dead = is_locked and host == socket.gethostname() and number.isdigit() and not _is_alive(int(number))
        if os.path.isdir(left) and (is_dead or _seconds_since_written(left) > LEFT_SECONDS):
            shutil.rmtree(left, ignore_errors=True)


def _is_alive(number: int) -> bool:
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        return True
    return True


def _seconds_since_written(folder: Path) -> float:
    """By the newest of a folder and its files; one that vanishes meanwhile is new."""
    try:
        return time.time() - max(place.stat().st_mtime for place in (folder, *folder.iterdir()))
    except OSError:
        return 0.0


def _digest(gguf: Path) -> str:
    try:
        state = gguf.stat()
        return _digest_of(gguf, (state.st_size, state.st_mtime_ns, state.st_ino))
    except OSError as error:
        raise DataError(f"model.name: {gguf} cannot be read: {error.strerror}; fix its permissions or disk") from error


@functools.cache
def _digest_of(gguf: Path, _: tuple[int, int, int]) -> str:
    with gguf.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:12]
