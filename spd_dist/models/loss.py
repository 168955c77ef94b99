"""The loss of a causal language model, without ever holding the logits of all positions.

It is the cross-entropy of the next tokens, or the divergence from the next-token distributions of a teacher.
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
from torch.nn.functional import cross_entropy, kl_div
from transformers import PreTrainedModel

from spd_dist.models.forward import call_model
from spd_dist.models.gradient_capture import supervised_rows
from spd_dist.models.lora import TokenKeys

ALONE: Mapping[str, Tensor | int] = MappingProxyType({})
"""The context of rows that hold one sequence each."""

Teacher = Callable[[], AbstractContextManager[None]]
"""Within what it gives, the model answers as its teacher does."""

CHUNK_BYTES = {"cpu": 64 * 2**20, "cuda": 512 * 2**20}
"""Size of one chunk's logits in float32. With weights that are trained, each chunk reads and writes a gradient of their
size: few large ones on an accelerator, where memory is faster than it is scarce."""


class LinearCrossEntropy(torch.autograd.Function):
    """Sum of the negative log-likelihoods of label_N under softmax(tail(hidden_ND weight_VD')).

    If its target is not label_N but teacher_ND, the states that a teacher has at the same positions, it is the sum of
    KL(p || q), q being that distribution and p the teacher's by the same output layer.

    The gradients are made chunk by chunk in the forward pass (as in Liger's kernel, arXiv:2410.10989): the loss is a
    scalar, so backward only scales them. Nothing of size N x V lives, and nothing is computed twice.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        target: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        tail: tuple[float, float],
    ) -> Any:
        """(sum of the losses, loss_N without gradient) in float32.

        `target` is label_N, integers, or teacher_ND. `tail` is (cap, scale): if cap > 0, logits are
        cap tanh(scale z / cap).
        """
        cap, scale = tail
        wants_hidden, _, wants_weight, wants_bias, *_ = ctx.needs_input_grad
        loss_N = torch.empty(len(target), dtype=torch.float32, device=hidden_ND.device)
        grad_ND = torch.empty_like(hidden_ND) if wants_hidden else None
        grad_VD = torch.zeros_like(weight_VD, dtype=torch.float32) if wants_weight else None
        grad_V = torch.zeros_like(bias_V, dtype=torch.float32) if bias_V is not None and wants_bias else None
        size = max(1, CHUNK_BYTES.get(hidden_ND.device.type, CHUNK_BYTES["cpu"]) // (4 * len(weight_VD)))
        for start in range(0, len(target), size):
            rows = slice(start, start + size)
            logit_CV = torch.nn.functional.linear(hidden_ND[rows], weight_VD, bias_V).float()
            if target.is_floating_point():
                taught_CV = torch.nn.functional.linear(target[rows], weight_VD, bias_V).float()
                loss_N[rows], grad_CV = _divergence_and_gradient(logit_CV, taught_CV, cap, scale)
            else:
                loss_N[rows], grad_CV = _loss_and_gradient(logit_CV, target[rows], cap, scale)
            grad_CV = grad_CV.to(hidden_ND.dtype)
            if grad_ND is not None:
                torch.mm(grad_CV, weight_VD, out=grad_ND[rows])
            if grad_VD is not None:
                grad_VD.add_(grad_CV.T @ hidden_ND[rows])
            if grad_V is not None:
                grad_V.add_(grad_CV.sum(0))
        ctx.save_for_backward(grad_ND, grad_VD, grad_V)
        ctx.dtypes = (hidden_ND.dtype, weight_VD.dtype, None if bias_V is None else bias_V.dtype)
        ctx.mark_non_differentiable(loss_N)
        return loss_N.sum(), loss_N

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        """The stored gradients, scaled."""
        hidden, weight, bias = (
            None if grad is None else (grad * grad_outputs[0]).to(dtype)
            for grad, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return hidden, None, weight, bias, None


def _apply_tail_(logit_CV: Tensor, cap: float, scale: float) -> Tensor | None:
    """Make logits of a linear layer's output, in place; gives the derivative, up to `scale`, where it is not 1."""
    if scale != 1:
        logit_CV.mul_(scale)
    if not cap:
        return None
    logit_CV.div_(cap).tanh_()
    slope_CV = 1 - logit_CV.square()
    logit_CV.mul_(cap)
    return slope_CV


def _loss_and_gradient(logit_CV: Tensor, label_C: Tensor, cap: float, scale: float) -> tuple[Tensor, Tensor]:
    """Each row's loss, and its gradient with respect to the linear layer's output; `logit_CV` is overwritten."""
    slope_CV = _apply_tail_(logit_CV, cap, scale)
    label_C1 = label_C.unsqueeze(1)
    label_logit_C = logit_CV.gather(1, label_C1).squeeze(1)
    log_sum_C = logit_CV.logsumexp(1)
    grad_CV = logit_CV.sub_(log_sum_C.unsqueeze(1)).exp_()
    grad_CV.scatter_add_(1, label_C1, grad_CV.new_full(label_C1.shape, -1.0))
    if slope_CV is not None:
        grad_CV.mul_(slope_CV)
    return log_sum_C - label_logit_C, grad_CV.mul_(scale)


def _divergence_and_gradient(logit_CV: Tensor, taught_CV: Tensor, cap: float, scale: float) -> tuple[Tensor, Tensor]:
    """Each row's KL(teacher || student), and its gradient as of `_loss_and_gradient`; both inputs are overwritten."""
    slope_CV = _apply_tail_(logit_CV, cap, scale)
    _apply_tail_(taught_CV, cap, scale)
    log_q_CV = logit_CV.sub_(logit_CV.logsumexp(1, keepdim=True))
    log_p_CV = taught_CV.sub_(taught_CV.logsumexp(1, keepdim=True))
    p_CV = log_p_CV.exp()
    divergence_C = torch.linalg.vecdot(p_CV, log_p_CV.sub_(log_q_CV))
    grad_CV = log_q_CV.exp_().sub_(p_CV)
    if slope_CV is not None:
        grad_CV.mul_(slope_CV)
    return divergence_C, grad_CV.mul_(scale)


class Student(nn.Module):
    """A causal language model whose forward pass gives the summed loss of chosen tokens: what DeepSpeed trains."""

    def __init__(
        self, model: PreTrainedModel | PeftModel, teacher: Teacher | None = None, keys: TokenKeys | None = None
    ) -> None:
        """A student of its own, or of a teacher.

        Args:
            model: what is trained.
            teacher: what a loss without labels learns from: the same model under what the teacher changes of it.
            keys: of the dropout inside the model's adapters.
        """
        super().__init__()
        self.model: Any = model
        self.tail = logits_tail(model)
        self.teacher = teacher
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
        target = self._taught(inputs, source_N) if label_N is None else label_N
        own = self._read(inputs, source_N)
        if self.tail is None:
            loss_N = _whole_losses(own, target)
            return loss_N.sum(), loss_N.detach()
        head = self.model.get_output_embeddings()

        def loss(hidden_ND: Tensor) -> Any:
            return LinearCrossEntropy.apply(hidden_ND, target, head.weight, head.bias, self.tail)

        with _forward_replaced(head, loss):
            return head(own)  # called as a module: ZeRO-3 gathers its weight around it

    def _read(self, inputs: Mapping[str, Any], source_N: Tensor) -> Tensor:
        """What the model has at the positions: the inputs of its output layer, or logits where all are held."""
        if self.tail is None:
            return call_model(self.model, inputs).logits.flatten(0, 1)[source_N]
        return call_model(self.model.base_model, inputs).last_hidden_state.flatten(0, 1)[source_N]

    @torch.no_grad()
    def _taught(self, inputs: Mapping[str, Any], source_N: Tensor) -> Tensor:
        """The same of the teacher, without dropout."""
        assert self.teacher is not None  # labels are left out only where there is one
        was_training = self.model.training
        self.model.eval()
        try:
            with self.teacher():
                return self._read(inputs, source_N)
        finally:
            self.model.train(was_training)


def _whole_losses(logit_NV: Tensor, target: Tensor) -> Tensor:
    """As of `LinearCrossEntropy`, from logits; a teacher's `target` is its logits."""
    if not target.is_floating_point():
        return cross_entropy(logit_NV.float(), target, reduction="none")
    log_q_NV, log_p_NV = logit_NV.float().log_softmax(1), target.float().log_softmax(1)
    return kl_div(log_q_NV, log_p_NV, reduction="none", log_target=True).sum(1)


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


def logits_tail(model: PreTrainedModel | PeftModel) -> tuple[float, float] | None:
    """(cap, scale) of what the architecture does to the logits after its output layer; None if that cannot be told.

    None costs memory (all logits are held), never exactness.
    """
    settings = vars(model.config)
    cap = settings.get("final_logit_softcapping") or 0.0
    scale = settings.get("logit_scale") or 1 / (settings.get("logits_scaling") or 1.0)
    plain_head = type(model.get_output_embeddings()) is nn.Linear
    return (float(cap), float(scale)) if plain_head and math.isfinite(scale) else None


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
