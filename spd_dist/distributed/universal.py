"""A checkpoint in DeepSpeed's universal form, which any world size can load: made by all ranks, and where it stopped.

DeepSpeed's own program goes through many pieces of work, each by itself: it cuts what a rank wrote into parameters, and
puts the parts of a parameter together. Rank 0 asks it for those pieces, the ranks share them, and rank 0 ends it.

zero/NAME/*.pt     a parameter and what the optimizer knows of it
tmp/               parts of parameters, and in `done/` a mark of every piece of work that is whole
SOURCE, WHOLE      what it was made of; that nothing is missing
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import shutil
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch.distributed as dist
from deepspeed.checkpoint import ds_to_universal

from spd_dist.distributed.checkpoint_safety import data_alone
from spd_dist.distributed.uneven_work import on_main, wait_for_all_ranks
from spd_dist.errors import writing

DOING = "converting a checkpoint to another world size"
SOURCE, WHOLE = "SOURCE", "WHOLE"


class Pieces(NamedTuple):
    """Work that any rank can do, in any order."""

    work: Callable[[Any], object]
    items: Sequence[Any]
    """One for each piece, in the same order in every attempt."""


def convert_to_universal(checkpoint: Path, target: Path, source: str) -> None:
    """Write `checkpoint` in the universal form to `target`. A collective, in which ranks may take any time.

    What an earlier attempt has done of it, at any world size, is not done again.

    Args:
        checkpoint: What DeepSpeed's engines wrote.
        target: A folder of its own.
        source: Names what is in `checkpoint`: what was made of another content is removed.

    Raises:
        DataError: the disk is full or may not be written.
    """
    passes = on_main(DOING, lambda: _begun(checkpoint, target, source))
    for pieces in passes:
        with wait_for_all_ranks(DOING), writing(target), data_alone():
            _do_own(pieces, target / "tmp" / "done")
    if passes:
        on_main(DOING, lambda: _ended(checkpoint, target))


def _begun(checkpoint: Path, target: Path, source: str) -> list[Pieces]:
    """The two passes that are still to be done, or none."""
    with writing(target):
        name = target / SOURCE
        if not name.is_file() or name.read_text(encoding="utf-8") != source:
            shutil.rmtree(target, ignore_errors=True)
            target.mkdir(parents=True)
            name.write_text(source, encoding="utf-8")
        if (target / WHOLE).exists():
            return []
        (target / "tmp" / "done").mkdir(parents=True, exist_ok=True)
        return [_next_pass(checkpoint, target, number) for number in range(2)]


def _next_pass(checkpoint: Path, target: Path, number: int) -> Pieces:
    """The pieces of DeepSpeed's pass of this number; it is ended there."""
    asked: list[Pieces] = []

    def ask(work: Callable[[Any], object], items: Sequence[Any], _: int) -> list[Any]:
        asked.append(Pieces(work, sorted(items, key=_name)))
        if len(asked) > number:
            raise _AskedError
        return []

    with contextlib.suppress(_AskedError):
        _run_program(checkpoint, target, ask)
    return asked[number]


class _AskedError(Exception):
    """What was asked for is known."""


def _do_own(pieces: Pieces, marks: Path) -> None:
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    for item in pieces.items[rank::size]:
        mark = marks / hashlib.blake2b(_name(item).encode(), digest_size=16).hexdigest()
        if not mark.exists():
            pieces.work(item)
            mark.touch()


def _name(item: Any) -> str:
    """Of a piece: (..., rank) of what is cut, NAME or (NAME, shapes) of what is put together."""
    return str(item[0]) if isinstance(item, tuple) and isinstance(item[0], str) else str(item)


def _ended(checkpoint: Path, target: Path) -> None:
    """What is left: what has no optimizer state, the settings, and the marks to remove."""
    with writing(target):
        for file in (target / "zero").rglob("fp32.pt"):
            if not file.with_name("exp_avg.pt").exists():  # the program would keep what a kill has cut short
                file.unlink()
        _run_program(checkpoint, target, lambda *_: [])
        (target.parent / "latest_universal").unlink()  # only a load without a tag would read it
        (target / WHOLE).touch()
        shutil.rmtree(target / "tmp", ignore_errors=True)  # at last: its marks must not outlive its parts


def _run_program(checkpoint: Path, target: Path, do_pass: Callable[..., list[Any]]) -> None:
    """DeepSpeed's program, with `do_pass` in place of what goes through the pieces of a pass."""
    arguments = argparse.Namespace(
        input_folder=str(checkpoint),
        output_folder=str(target),
        num_extract_workers=1,
        num_merge_workers=1,
        keep_temp_folder=True,
        strict=True,
        inject_missing_state=True,
    )
    silent = contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO())
    with data_alone(), silent[0], silent[1], _passes_done_by(do_pass):
        ds_to_universal.main(arguments)


@contextlib.contextmanager
def _passes_done_by(do_pass: Callable[..., list[Any]]) -> Generator[None]:
    program: Any = ds_to_universal
    whole = program._do_parallel_work
    program._do_parallel_work = do_pass
    try:
        yield
    finally:
        program._do_parallel_work = whole
