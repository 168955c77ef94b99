"""Checkpoint files written while training goes on: copied at once, then written and hashed by a thread."""

from __future__ import annotations

import copy
import hashlib
import os
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine

from spd_dist.errors import DataError


class BackgroundWriter(TorchCheckpointEngine):
    """DeepSpeed's checkpoint engine, except that `save` only copies, and that no failure is raised inside it.

    A rank that raised in the middle of `save_checkpoint` would leave the others waiting in its collectives. So failures
    wait for `digests`, and the caller shares them.
    """

    def __init__(self) -> None:
        super().__init__()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._written: dict[Path, Future[str]] = {}

    def save(self, state_dict: Mapping[str, Any], path: str) -> None:
        """Copy the state to the CPU, and have it written."""
        self._written[Path(path)] = self._thread.submit(_write, _copied(state_dict), Path(path))

    @property
    def is_idle(self) -> bool:
        """Whether everything is written, or has failed."""
        return all(future.done() for future in self._written.values())

    def digests(self) -> dict[str, str]:
        """SHA-256 of each file that this rank wrote since the last call, by name; waits for them.

        Raises:
            DataError: a file could not be written.
        """
        written, self._written = self._written, {}
        digests = {}
        for path, future in written.items():
            error = future.exception()
            if error is not None:
                raise DataError(
                    f"{path} cannot be written: {error}; make room or fix the permissions, and start the same command "
                    "again: earlier checkpoints are kept"
                )
            digests[path.name] = future.result()
        return digests

    def close(self) -> None:
        """Wait for the thread to end."""
        self._thread.shutdown()


def _copied(value: Any) -> Any:
    """`value` with every tensor copied to the CPU and everything else deeply copied: training will change both."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return type(value)((key, _copied(item)) for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return type(value)(_copied(item) for item in value)
    return copy.deepcopy(value)


def _write(state: Mapping[str, Any], path: Path) -> str:
    with open(path, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
