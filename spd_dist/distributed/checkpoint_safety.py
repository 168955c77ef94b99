"""Checkpoints are data: reading one runs nothing that somebody has put into it.

DeepSpeed writes and reads with `torch.save` and `torch.load`, whose files are pickles. Read by the unpickler that makes
tensors, plain data and the classes named here, and nothing else, a file that wants more is refused by its name.
"""

from __future__ import annotations

import contextlib
import os
import pickle
from collections.abc import Generator, Iterable
from pathlib import Path

import torch
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address

from spd_dist.errors import DataError

KNOWN = (LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address)
"""What DeepSpeed's checkpoints hold beside tensors and plain data: each only keeps values."""

_FORCE, _FORCE_NOT = "TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"


@contextlib.contextmanager
def data_alone() -> Generator[None]:
    """Inside, every `torch.load` of this process gives data alone, even one that asks for more, as DeepSpeed's do."""
    before = {name: os.environ.pop(name, None) for name in (_FORCE, _FORCE_NOT)}
    os.environ[_FORCE] = "1"
    try:
        with torch.serialization.safe_globals(list(KNOWN)):
            yield
    finally:
        del os.environ[_FORCE]
        os.environ.update({name: value for name, value in before.items() if value is not None})


def refuse_code(files: Iterable[Path]) -> None:
    """See that each file is data alone; what its tensors hold is not read yet.

    Raises:
        DataError: one is not.
    """
    for file in files:
        if file.is_symlink() or not file.is_file():
            raise DataError(f"{file} is not a file of its own; delete its folder, and an earlier checkpoint is used")
        try:
            with data_alone():
                torch.load(file, map_location="cpu", mmap=True)
        except (pickle.UnpicklingError, RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
            reason = str(error).split("\n")[0][:300]
            raise DataError(
                f"{file} is not read: it is no checkpoint of data alone, and reading it could run code ({reason}); "
                f"delete {file.parent}, and an earlier checkpoint is used"
            ) from error
