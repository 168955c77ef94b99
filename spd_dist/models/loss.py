"""The loss of a causal language model, without ever holding the logits of all positions.

It is the cross-entropy of the next tokens, or a divergence from the next-token distributions of a teacher.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from types import MappingProxyType
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from spd_dist.distributed.zero import gathered
from spd_dist.models.chunked_loss import CHUNK_BYTES, Divergence, LinearCrossEntropy, Tail, divergences
from spd_dist.models.forward import call_model
from spd_dist.models.gradient_capture import supervised_rows
from spd_dist.models.lora import TokenKeys

ALONE: Mapping[str, Tensor | int] = MappingProxyType({})
"""The context of rows that hold one sequence each."""

Teacher = Callable[[], AbstractContextManager[None]]
"""Within what it gives, the model answers as its teacher does."""


class Student(nn.Module):
    """A causal language model whose forward pass gives the summed loss of chosen tokens: what DeepSpeed trains."""

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        teacher: Teacher | None = None,
        keys: TokenKeys | None = None,
        divergence: Divergence = "forward",
    ) -> None:
        """A student of its own, or of a teacher.

        Args:
            model: what is trained.
            teacher: what a loss without labels learns from: the same model under what the teacher changes of it.
            keys: of the dropout inside the model's adapters.
            divergence: between the teacher's distributions and the student's.
        """
        super().__init__()
        self.model: Any = model
        self.tail = logits_tail(model)
        self.teacher = teacher
        self.divergence: Divergence = divergence
        self.keys = keys or TokenKeys()

    def forward(
        self,
        token_BT: Tensor,
        source_N: Tensor,
        label_N: Tensor | None,
        context: Mapping[str, Tensor | int] = ALONE,
    ) -> tuple[Tensor, Tensor]:
        """(sum of the losses, loss_N without gradient), in float32.

        Args:
            token_BT: token ids, padded on the right.
            source_N: flat index, in B x T, of the position that predicts each supervised token.
            label_N: the supervised tokens; None to learn the distributions that the teacher has there.
            context: `position_ids` (B, T) of packed rows, or an `attention_mask`.
        """
        inputs = {"input_ids": token_BT, "use_cache": False, **context}
        target, of_teacher = (label_N, None) if label_N is not None else self._taught(inputs, source_N)
        own = self._read(inputs, source_N)
        if self.tail is None:
            loss_N = _whole_losses(own, target, self.divergence)
            return loss_N.sum(), loss_N.detach()
        head, tail = self._head, self.tail._replace(divergence=self.divergence, teacher=of_teacher)

        def loss(hidden_ND: Tensor) -> Any:
            return LinearCrossEntropy.apply(hidden_ND, target, head.weight, head.bias, tail)

        with _forward_replaced(head, loss):
            return head(own)  # called as a module: ZeRO-3 gathers its weight around it

    def _read(self, inputs: Mapping[str, Any], source_N: Tensor) -> Tensor:
        """What the model has at the positions: the inputs of its output layer, or logits where all are held."""
        if self.tail is None:
            return call_model(self.model, inputs).logits.flatten(0, 1)[source_N]
        return call_model(self.model.base_model, inputs).last_hidden_state.flatten(0, 1)[source_N]

    @property
    def _head(self) -> Any:
        return self.model.get_output_embeddings()

    @torch.no_grad()
    def _taught(
        self, inputs: Mapping[str, Any], source_N: Tensor
    ) -> tuple[Tensor, tuple[Tensor, Tensor | None] | None]:
        """The same of the teacher, without dropout; and its output layer, if the student's is trained."""
        assert self.teacher is not None  # labels are left out only where there is one
        was_training = self.model.training
        self.model.eval()
        try:
            with self.teacher():
                taught, head = self._read(inputs, source_N), self._head
                if self.tail is None or not head.weight.requires_grad:
                    return taught, None
                with gathered(head.parameters()):
                    return taught, (head.weight.clone(), None if head.bias is None else head.bias.clone())
        finally:
            self.model.train(was_training)


def _whole_losses(logit_NV: Tensor, target: Tensor, divergence: Divergence) -> Tensor:
    """As of `LinearCrossEntropy`, from logits; a teacher's `target` is its logits."""
    if target.is_floating_point():
        return divergences(target, logit_NV, divergence)
    return cross_entropy(logit_NV.float(), target, reduction="none")


class _forward_replaced:
    def __init__(self, module: nn.Module, forward: Callable[..., Any]) -> None:
        self.module, self.forward = module, forward

    def __enter__(self) -> None:
        self.module.forward = self.forward

    def __exit__(self, *_: object) -> None:
        del self.module.forward


@torch.no_grad()
def check_tail_(student: Student, token_1T: Tensor) -> bool:
    """Whether the chunked loss is that of the model's own logits; if not, they are held whole from here on."""
    label_N = token_1T[0, 1:]
    source_N = torch.arange(len(label_N), device=label_N.device)
    logit_TV = student.model(input_ids=token_1T, use_cache=False).logits[0]
    expected = cross_entropy(logit_TV[:-1].float(), label_N, reduction="sum")
    found, _ = student(token_1T, source_N, label_N)
    agrees = torch.allclose(found, expected, rtol=1e-2)
    student.tail = student.tail if agrees else None
    return agrees


def logits_tail(model: PreTrainedModel | PeftModel) -> Tail | None:
    """What the architecture does to the logits after its output layer; None if that cannot be told.

    None costs memory (all logits are held), never exactness.
    """
    settings = vars(model.config)
    cap = settings.get("final_logit_softcapping") or 0.0
    scale = settings.get("logit_scale") or 1 / (settings.get("logits_scaling") or 1.0)
    plain_head = type(model.get_output_embeddings()) is nn.Linear
    return Tail(float(cap), float(scale)) if plain_head and math.isfinite(scale) else None


def example_losses(model: PreTrainedModel, tokens_BT: Tensor, attention_BT: Tensor, target_BT: Tensor) -> Tensor:
    """Each example's mean negative log-likelihood of its targets (paper, Eq. 6), float32, by one forward pass.

    Args:
        model: What is called: under ZeRO-3 the engine's module.
        tokens_BT: Right-padded.
        attention_BT: 1 at tokens and 0 at pads.
        target_BT: True where the token is supervised: at least once a row, and never at position 0.
    """
    source_BT = target_BT.roll(-1, dims=1)
    with supervised_rows(model, source_BT):
        logit_SV = model(tokens_BT, attention_mask=attention_BT, use_cache=False).logits
    loss_S = cross_entropy(logit_SV.float(), tokens_BT[target_BT], reduction="none")
    num_targets_B = target_BT.sum(dim=1)
    owner_S = torch.arange(len(num_targets_B), device=loss_S.device).repeat_interleave(num_targets_B)
    return loss_S.new_zeros(len(num_targets_B)).index_add(0, owner_S, loss_S) / num_targets_B


@torch.no_grad()
def token_losses(model: PreTrainedModel, tokens_BT: Tensor, attention_BT: Tensor, target_BT: Tensor) -> Tensor:
    """The negative log-likelihood of each target, float32, one after the other in row-major order; no gradient.

    Args:
        model: As of `example_losses`, and so are the others.
        tokens_BT: Right-padded.
        attention_BT: 1 at tokens and 0 at pads.
        target_BT: True where the token is looked at: never at position 0.
    """
    with supervised_rows(model, target_BT.roll(-1, dims=1)):
        logit_SV = model(tokens_BT, attention_mask=attention_BT, use_cache=False).logits
    return losses_of(logit_SV, tokens_BT[target_BT])


def losses_of(logit_SV: Tensor, label_S: Tensor) -> Tensor:
    """The negative log-likelihood of each label, float32, of which a chunk is made at a time."""
    size = max(1, CHUNK_BYTES.get(logit_SV.device.type, CHUNK_BYTES["cpu"]) // (4 * logit_SV.shape[1]))
    chunks = zip(logit_SV.split(size), label_S.split(size), strict=True)
    return torch.cat([cross_entropy(logit_CV.float(), label_C, reduction="none") for logit_CV, label_C in chunks])
