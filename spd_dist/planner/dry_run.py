"""What a model's passes hold in memory, found without weights and without computing anything."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PretrainedConfig, PreTrainedModel, masking_utils

from spd_dist.config import Calibrate, Finetune
from spd_dist.distributed.zero import linear_of_zero3
from spd_dist.errors import DataError
from spd_dist.models.gradient_capture import Capture, capture
from spd_dist.models.kv_sites import discover_sites
from spd_dist.models.lora import (
    TokenKeys,
    adapted_modules,
    add_adapters,
    key_dropout,
    summing_inputs,
    token_key,
)
from spd_dist.models.loss import Student, losses_of
from spd_dist.models.model_stats import FOREIGN_FAULTS, first_line, meta_model
from spd_dist.types import KVSite


class LiveBytes(TorchDispatchMode):
    """Counts the storages that operations make while it is active, until they are freed."""

    def __init__(self, known: Iterable[Tensor]) -> None:
        """`known` are there before: parameters and buffers."""
        super().__init__()
        self.live, self.peak = 0, 0
        self._seen = weakref.WeakSet(tensor.untyped_storage() for tensor in known)

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = operation(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.layout is torch.strided:
                self._count(tensor.untyped_storage())
        self.peak = max(self.peak, self.live)
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        if storage not in self._seen:
            self._seen.add(storage)
            self.live += storage.nbytes()
            weakref.finalize(storage, self._free, storage.nbytes())

    def _free(self, num_bytes: int) -> None:
        self.live -= num_bytes


def calibrate_peak(
    config: PretrainedConfig, calibrate: Calibrate, dtype: torch.dtype, *, num_layers: int, is_sharded: bool = False
) -> int:
    """Bytes that capturing the gradients of one micro-batch takes beside the weights: examples as long as they may be.

    Half of their tokens are supervised, and one layer's keys and values are sites. `num_layers` are those from the
    lowest site's to the last: below, nothing is kept. `is_sharded`: ZeRO-3 runs the linear layers.
    """

    def run(model: PreTrainedModel) -> tuple[int, int]:
        sites = _lowest_sites(model)
        mode = _make_fake_(model)
        with mode, capture(model, sites, checkpointing=calibrate.checkpointing) as caught:
            peak = _capture(model, caught, calibrate)
        return model.config.get_text_config().num_hidden_layers - sites[0].layer, peak

    with linear_of_zero3() if is_sharded else nullcontext():
        return _extrapolated(config, dtype, run, num_layers)


def finetune_peak(config: PretrainedConfig, finetune: Finetune, dtype: torch.dtype, *, is_sharded: bool = False) -> int:
    """Bytes that one micro-batch of fine-tuning takes beside parameters, their gradients and the optimizer.

    Sequences are as long as they may be, and all their tokens are supervised. `is_sharded`: by ZeRO-3.
    """

    def run(model: PreTrainedModel) -> tuple[int, int]:
        num_layers = model.config.get_text_config().num_hidden_layers
        adapted = add_adapters(model, finetune, generator=torch.Generator()) if finetune.mode == "lora" else None
        if adapted is None:
            model.requires_grad_(True)
        keys = key_dropout(adapted) if adapted is not None else None
        if finetune.checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        with _make_fake_(model), nullcontext() if finetune.packing else _without_packing():
            teacher = nullcontext if finetune.loss == "distil" else None  # what it reads is as large, hooks or not
            return num_layers, _train(Student(model, teacher).train(), keys, finetune)

    with linear_of_zero3() if is_sharded else nullcontext():
        return _extrapolated(config, dtype, run, config.get_text_config().num_hidden_layers)


def score_peak(config: PretrainedConfig, dtype: torch.dtype, *, batch: tuple[int, int], num_targets: int) -> int:
    """Bytes beside the weights while a batch of (rows, tokens) is read without a gradient, and its targets scored."""

    def run(model: PreTrainedModel) -> tuple[int, int]:
        token_BT = _tokens(*batch)
        with _make_fake_(model), LiveBytes([*model.parameters(), *model.buffers(), token_BT]) as live, torch.no_grad():
            with _first_rows_alone(model, num_targets):
                logit_SV = model(token_BT, attention_mask=torch.ones_like(token_BT), use_cache=False).logits
            losses_of(logit_SV, token_BT.flatten()[:num_targets])
        return model.config.get_text_config().num_hidden_layers, live.peak

    return _extrapolated(config, dtype, run, config.get_text_config().num_hidden_layers)


def inputs_peak(config: PretrainedConfig, finetune: Finetune, dtype: torch.dtype) -> int:
    """Bytes beside the weights while the adapters' modules are seen at work, for `lora_init` of eva and corda.

    Nearly all of it are sums of the size of the input's width squared, one for each distinct input.
    """

    def run(model: PreTrainedModel) -> tuple[int, int]:
        modules, token_BT = adapted_modules(model, finetune), _tokens(1, finetune.max_tokens)
        with _make_fake_(model), _without_packing(), summing_inputs(modules, scaled=finetune.lora_init == "corda"):
            with LiveBytes([*model.parameters(), *model.buffers(), token_BT]) as live, torch.no_grad():
                model(token_BT, use_cache=False)
            return model.config.get_text_config().num_hidden_layers, live.peak

    return _extrapolated(config, dtype, run, config.get_text_config().num_hidden_layers)


def _extrapolated(
    config: PretrainedConfig,
    dtype: torch.dtype,
    run: Callable[[PreTrainedModel], tuple[int, int]],
    num_layers: int,
) -> int:
    """What `run` gives, (layers, bytes) of a copy, carried on to `num_layers`."""
    period = _period(config)
    depths = [max(2, period), 2 * max(2, period)]
    try:
        (few, low), (many, high) = (run(meta_model(config, dtype, num_layers=depth)) for depth in depths)
    except FOREIGN_FAULTS as error:
        raise DataError(
            f"model.name: what a {config.model_type} model holds can't be told without running it "
            f"({first_line(error)}); mixtures of experts need model.dtype=bfloat16, others a trial run"
        ) from error
    return round(low + (high - low) / (many - few) * (num_layers - few))


@contextmanager
def _without_packing() -> Generator[None]:
    """Transformers makes masks for packed sequences if their positions say so; those of fake tensors say nothing."""
    found = masking_utils.find_packed_sequence_indices
    masking_utils.find_packed_sequence_indices = lambda _: None
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = found


def _period(config: PretrainedConfig) -> int:
    """Layers after which their kinds repeat."""
    kinds = config.get_text_config().to_dict().get("layer_types") or ["full_attention"]
    return next(n for n in range(1, len(kinds) + 1) if all(kind == kinds[i % n] for i, kind in enumerate(kinds)))


def _lowest_sites(model: PreTrainedModel) -> list[KVSite]:
    """Keys and values of the first layer that makes any."""
    depth = model.config.get_text_config().num_hidden_layers
    for layer in range(depth - 1):
        try:
            return discover_sites(model, [layer])
        except DataError:
            continue
    return discover_sites(model, [depth - 1])


def _make_fake_(model: nn.Module) -> FakeTensorMode:
    """Turn meta parameters and buffers into fake ones.

    On the CPU: there attention runs by its flash kernel, which keeps what those of accelerators keep.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    made: dict[int, Tensor] = {}
    for module in model.modules():
        fields: dict[str, dict[str, Tensor | None]] = vars(module)
        for held in (fields["_parameters"], fields["_buffers"]):
            for name, tensor in held.items():
                if tensor is not None:
                    held[name] = made.setdefault(id(tensor), _fake(mode, tensor))
    return mode


def _fake(mode: FakeTensorMode, tensor: Tensor) -> Tensor:
    fake = FakeTensor(mode, tensor.detach().to("meta"), torch.device("cpu"))
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(fake, requires_grad=tensor.requires_grad)
    return fake


def _tokens(num_rows: int, num_tokens: int) -> Tensor:
    return torch.zeros(num_rows, num_tokens, dtype=torch.long)


def _capture(model: PreTrainedModel, caught: Capture, calibrate: Calibrate) -> int:
    """As the stage does; only that its masks, whose size depends on values, are replaced by counts."""
    token_BT = _tokens(calibrate.batch_size, calibrate.max_tokens)
    num_targets = token_BT.numel() // 2
    with LiveBytes([*model.parameters(), *model.buffers(), token_BT]) as live, torch.enable_grad():
        with _first_rows_alone(model, num_targets):
            logit_SV = model(token_BT, attention_mask=torch.ones_like(token_BT), use_cache=False).logits
        loss_S = cross_entropy(logit_SV.float(), token_BT.flatten()[:num_targets], reduction="none")
        del logit_SV
        grads = torch.autograd.grad(loss_S.sum(), caught.outputs)
        rows = [grad.clone() for grad in grads]
        del grads, rows
    return live.peak


@contextmanager
def _first_rows_alone(model: PreTrainedModel, count: int) -> Generator[None]:
    """As `supervised_rows`, by a count."""
    head: Any = model.get_output_embeddings()
    handle = head.register_forward_pre_hook(lambda _, inputs: (inputs[0].flatten(0, 1)[:count].clone(),))
    try:
        yield
    finally:
        handle.remove()


def _train(student: Student, keys: TokenKeys | None, finetune: Finetune) -> int:
    token_BT = _tokens(finetune.micro_batch_size, finetune.max_tokens)
    label_N = token_BT.flatten()[1:]
    for parameter in student.parameters():
        if parameter.requires_grad:  # ZeRO takes gradients away as they come
            parameter.register_post_accumulate_grad_hook(_forget_gradient)
    with LiveBytes([*student.parameters(), *student.buffers(), token_BT]) as live, torch.enable_grad():
        if keys is not None:
            keys.key_BT = token_key(token_BT, token_BT)
        loss, _ = student(token_BT, label_N, label_N if student.teacher is None else None)
        loss.backward()
    return live.peak


def _forget_gradient(parameter: nn.Parameter) -> None:
    parameter.grad = None
