"""A LoRA adapter's folder, which may be a stranger's: read as data alone, and only into a model that it is for."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path

from peft import PeftModel, get_peft_model_state_dict
from peft.utils.save_and_load import load_peft_weights
from safetensors import SafetensorError
from torch import Tensor

from spd_dist.errors import DataError

SETTINGS = "adapter_config.json"
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
"""The second is a pickle, which peft reads as tensors alone."""
_FAULTS = (
    SafetensorError, pickle.UnpicklingError, OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError,
    ImportError,
)  # fmt: skip
"""What peft, torch and safetensors raise of a folder that is none, or is for another model."""


def check_adapter(folder: Path) -> None:
    """See that there is one.

    Raises:
        DataError: there is none.
    """
    if not (folder / SETTINGS).is_file():
        raise DataError(f"{folder} holds no {SETTINGS}; run the finetune stage again with --from finetune")
    if not any((folder / name).is_file() for name in WEIGHTS):
        raise DataError(f"{folder} holds no {WEIGHTS[0]}; run the finetune stage again with --from finetune")


@contextmanager
def naming_adapter(folder: Path) -> Generator[None]:
    """Within, what a library raises of the adapter becomes one sentence.

    Raises:
        DataError: it is none, or does not fit the model.
    """
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Found missing adapter keys")  # `check_fits` makes it an error
            yield
    except _FAULTS as error:
        reason = " ".join(str(error).split())[:300]
        raise DataError(
            f"{folder} is no adapter that this model can take ({type(error).__name__}: {reason})"
        ) from error


def read_adapter(folder: Path) -> dict[str, Tensor]:
    """The tensors of an adapter by name, on the CPU.

    Raises:
        DataError: it holds what is no weight, or no finite one.
    """
    check_adapter(folder)
    with naming_adapter(folder):
        tensors = load_peft_weights(str(folder), device="cpu")
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or not tensor.isfinite().all():
            raise DataError(
                f"{folder}: {name} holds {tensor.dtype} numbers that are no weights, or not finite; train it again"
            )
    return tensors


def check_fits(adapted: PeftModel, tensors: Mapping[str, Tensor], folder: Path) -> None:
    """See that a model has got all that an adapter holds: peft passes over what is missing or has no place.

    Raises:
        DataError: it has not.
    """
    wanted = get_peft_model_state_dict(adapted, save_embedding_layers=False).keys()
    missing = sorted(wanted - tensors.keys())
    left = sorted(name for name in tensors.keys() - wanted if ".lora_" in name)
    if missing or left:
        raise DataError(
            f"{folder} is an adapter of another model: {len(missing)} tensors are missing and {len(left)} have no "
            f"place, as {(missing + left)[0]}; give the model that it was trained on"
        )
