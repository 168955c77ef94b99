"""What is saved of a student, checked against the trained weights before anyone hears that it is done."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from spd_dist.config import Model
from spd_dist.distributed.collectives import together
from spd_dist.distributed.uneven_work import on_main
from spd_dist.distributed.zero import end_engine, frozen_engine, is_sharded
from spd_dist.errors import DataError, writing
from spd_dist.models.lora import (
    PeftModel,
    adapter_parameters,
    check_kept,
    load_adapter,
    merged_tensors,
    remove_adapters,
    save_adapter,
    saved_parameters,
)
from spd_dist.models.model_card import Card, write_card
from spd_dist.models.policy import Policy, load_policy
from spd_dist.models.save_weights import load_saved_model, probe_logits, save_model, stored_parameters, whole_tensors
from spd_dist.stages.context import StageContext

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 5e-3}
"""Largest difference of logits, relative to the largest logit, that rounding explains."""


@dataclass(frozen=True)
class SavedAdapter:
    """An `adapter/` that was loaded again and is the student."""

    num_trained_parameters: int
    logits_difference: float
    """To the trained model's on the probe, of the largest."""


@dataclass(frozen=True)
class SavedModel:
    """A `model/` that was loaded again and is the student."""

    model_logits_difference: float
    delta_kept_fraction: float | None = None
    """Of a merge: what rounding left of the update, in the weight that kept least."""
    delta_kept_least: str | None = None
    """That weight."""


@dataclass(frozen=True)
class Export:
    """Saves one student. Its methods are collectives, and return what the summary says of them."""

    policy: Policy
    context: StageContext
    card: Card
    probe: tuple[int, ...]
    trained_logits: Tensor
    """Of the student on the probe, from the engine that trained it."""

    def adapter(self, adapted: PeftModel) -> SavedAdapter:
        """Write `adapter/`, take the adapters off, and load it as a user does, to see that it is the student."""
        model = self.policy.model
        partial = self._start("adapter")
        tensors = dict(whole_tensors(saved_parameters(adapted)))
        num_trained = sum(tensors[name].numel() for name in adapter_parameters(adapted))
        self._on_main(partial, lambda: save_adapter(adapted, tensors, partial))
        remove_adapters(adapted)
        with together("loading the saved adapter"):  # and no rank renames it before all have read it
            loaded = load_adapter(model, partial)
        engine = frozen_engine(loaded, self.context.distributed, model.dtype) if is_sharded(model) else None
        difference = self._difference(probe_logits(loaded, self.probe, self.context.world.device))
        if engine is not None:
            end_engine(engine)
        remove_adapters(loaded)
        self._finish(partial, difference)
        return SavedAdapter(num_trained, difference)

    def merged(self, adapted: PeftModel) -> SavedModel:
        """Write `model/` with the adapters in its weights."""
        kept: dict[str, float] = {}
        partial = self._write_model(merged_tensors(adapted, kept))
        with together("looking at what rounding left of the update"):
            name, fraction = check_kept(kept, self.policy.model.dtype)
        facts = {**self.card.facts, "of the update, left by rounding": f"{fraction:.4f} or more, least in {name}"}
        described = dataclasses.replace(self, card=dataclasses.replace(self.card, facts=facts))
        return SavedModel(described._read_back(partial), fraction, name)

    def model(self) -> SavedModel:
        """Write `model/`."""
        return SavedModel(self._read_back(self._write_model(whole_tensors(stored_parameters(self.policy.model)))))

    def _write_model(self, tensors: Iterable[tuple[str, Tensor]]) -> Path:
        partial = self._start("model")
        save_model(self.policy.model, tensors, partial, world=self.context.world)
        self._on_main(partial, lambda: self.policy.tokenizer.save_pretrained(partial))
        return partial

    def _read_back(self, partial: Path) -> float:
        """How far the logits of the saved model are from the trained one's; it then gets its final name."""
        if is_sharded(self.policy.model):  # too large for one rank, perhaps
            dtype: Any = str(self.policy.model.dtype).removeprefix("torch.")  # one of the names that a config takes
            name = Model(name=str(partial), dtype=dtype)
            saved = load_policy(name, self.context.distributed, self.context.world)
            difference = self._difference(probe_logits(saved.model, self.probe, self.context.world.device))
            saved.release()
        else:
            difference = on_main("reading the saved model back", lambda: self._read_on_main(partial))
        self._finish(partial, difference)
        return difference

    def _read_on_main(self, partial: Path) -> float:
        loaded = load_saved_model(partial, self.policy.model.dtype)
        nn.Module.to(loaded, self.context.world.device)
        return self._difference(probe_logits(loaded, self.probe, self.context.world.device))

    def _start(self, name: str) -> Path:
        partial = self.context.folder / f"{name}.partial"
        self._on_main(partial, lambda: shutil.rmtree(partial, ignore_errors=True))
        return partial

    def _on_main(self, path: Path, action: Callable[[], object]) -> None:
        def act() -> None:
            with writing(path):
                action()

        on_main(f"saving {path}", act)

    def _difference(self, logits: Tensor) -> float:
        return ((logits - self.trained_logits).abs().max() / self.trained_logits.abs().max()).item()

    def _finish(self, partial: Path, difference: float) -> None:
        """Add tokenizer and card, and rename to the final name, if the logits agree.

        Raises:
            DataError: they do not.
        """
        tolerance = TOLERANCE[self.policy.model.dtype]
        final = partial.with_suffix("")

        def publish() -> None:
            if not difference <= tolerance:
                raise DataError(
                    f"{partial}: its logits differ from those of the trained model by {difference:.1e} of the largest, "
                    f"more than {tolerance:.0e}; it is left there to look at, and "
                    f"{self.context.folder / 'checkpoints'} holds the trained weights"
                )
            self.policy.tokenizer.save_pretrained(partial)
            write_card(self.card, partial, "adapter" if final.name == "adapter" else "model")
            shutil.rmtree(final, ignore_errors=True)
            partial.rename(final)

        self._on_main(final, publish)
