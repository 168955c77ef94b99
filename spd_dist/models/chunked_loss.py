"""The loss of the output layer, chunk by chunk: the cross-entropy, or a divergence from a teacher's distributions.

Shapes: N positions, C of them in a chunk, D width of a state, V vocabulary.
"""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import kl_div

Divergence = Literal["forward", "reverse", "js"]
"""Between a teacher's p and a student's q: KL(p || q), KL(q || p), or Jensen-Shannon's, which is half of KL(p || m) and
half of KL(q || m) with m = (p + q) / 2 (arXiv:2306.13649, section 2, with beta = 1/2)."""


CHUNK_BYTES = {"cpu": 64 * 2**20, "cuda": 512 * 2**20}
"""Size of one chunk's logits in float32. With weights that are trained, each chunk reads and writes a gradient of their
size: few large ones on an accelerator, where memory is faster than it is scarce."""


class Tail(NamedTuple):
    """From an output layer's z to a loss: logits are cap tanh(scale z / cap), or scale z without a cap."""

    cap: float = 0.0
    scale: float = 1.0
    divergence: Divergence = "forward"
    """From a teacher, if there is one."""
    teacher: tuple[Tensor, Tensor | None] | None = None
    """Weight and bias of the teacher's output layer; None where it is the student's."""


class LinearCrossEntropy(torch.autograd.Function):
    """Sum of the negative log-likelihoods of label_N under softmax(tail(hidden_ND weight_VD')).

    If its target is not label_N but teacher_ND, the states that a teacher has at the same positions, it is the sum of
    a divergence between p, the teacher's distribution, and q, that one.

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
        tail: Tail,
    ) -> Any:
        """(sum of the losses, loss_N without gradient) in float32.

        `target` is label_N, integers, or teacher_ND, from which the divergence of `tail` is taken.
        """
        wants_hidden, _, wants_weight, wants_bias, *_ = ctx.needs_input_grad
        loss_N = torch.empty(len(target), dtype=torch.float32, device=hidden_ND.device)
        grad_ND = torch.empty_like(hidden_ND) if wants_hidden else None
        grad_VD = torch.zeros_like(weight_VD, dtype=torch.float32) if wants_weight else None
        grad_V = torch.zeros_like(bias_V, dtype=torch.float32) if bias_V is not None and wants_bias else None
        teacher = tail.teacher or (weight_VD, bias_V)
        size = max(1, CHUNK_BYTES.get(hidden_ND.device.type, CHUNK_BYTES["cpu"]) // (4 * len(weight_VD)))
        for start in range(0, len(target), size):
            rows = slice(start, start + size)
            logit_CV = torch.nn.functional.linear(hidden_ND[rows], weight_VD, bias_V).float()
            if target.is_floating_point():
                taught_CV = torch.nn.functional.linear(target[rows], *teacher).float()
                loss_N[rows], grad_CV = _divergence_and_gradient(logit_CV, taught_CV, tail)
            else:
                loss_N[rows], grad_CV = _loss_and_gradient(logit_CV, target[rows], tail)
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


def _apply_tail_(logit_CV: Tensor, tail: Tail) -> Tensor | None:
    """Make logits of a linear layer's output, in place; gives the derivative, up to `scale`, where it is not 1."""
    if tail.scale != 1:
        logit_CV.mul_(tail.scale)
    if not tail.cap:
        return None
    logit_CV.div_(tail.cap).tanh_()
    slope_CV = 1 - logit_CV.square()
    logit_CV.mul_(tail.cap)
    return slope_CV


def _loss_and_gradient(logit_CV: Tensor, label_C: Tensor, tail: Tail) -> tuple[Tensor, Tensor]:
    """Each row's loss, and its gradient with respect to the linear layer's output; `logit_CV` is overwritten."""
    slope_CV = _apply_tail_(logit_CV, tail)
    label_C1 = label_C.unsqueeze(1)
    label_logit_C = logit_CV.gather(1, label_C1).squeeze(1)
    log_sum_C = logit_CV.logsumexp(1)
    grad_CV = logit_CV.sub_(log_sum_C.unsqueeze(1)).exp_()
    grad_CV.scatter_add_(1, label_C1, grad_CV.new_full(label_C1.shape, -1.0))
    if slope_CV is not None:
        grad_CV.mul_(slope_CV)
    return log_sum_C - label_logit_C, grad_CV.mul_(tail.scale)


def _divergence_and_gradient(logit_CV: Tensor, taught_CV: Tensor, tail: Tail) -> tuple[Tensor, Tensor]:
    """Each row's divergence, and its gradient as of `_loss_and_gradient`; both inputs are overwritten."""
    slope_CV = _apply_tail_(logit_CV, tail)
    _apply_tail_(taught_CV, tail)
    divergence_C, grad_CV = divergence_and_gradient_(taught_CV, logit_CV, tail.divergence)
    if slope_CV is not None:
        grad_CV.mul_(slope_CV)
    return divergence_C, grad_CV.mul_(tail.scale)


def divergences(taught_NV: Tensor, logit_NV: Tensor, kind: Divergence) -> Tensor:
    """Each position's divergence (N,), float32, of the student's `logit_NV` from a teacher's; it has a gradient."""
    log_p_NV, log_q_NV = taught_NV.float().log_softmax(1), logit_NV.float().log_softmax(1)
    if kind == "forward":
        return _kl(log_p_NV, log_q_NV)
    if kind == "reverse":
        return _kl(log_q_NV, log_p_NV)
    log_m_NV = torch.logaddexp(log_p_NV, log_q_NV) - math.log(2)
    return (_kl(log_p_NV, log_m_NV) + _kl(log_q_NV, log_m_NV)) / 2


def _kl(log_p_NV: Tensor, log_q_NV: Tensor) -> Tensor:
    return kl_div(log_q_NV, log_p_NV, reduction="none", log_target=True).sum(1)


def divergence_and_gradient_(taught_NV: Tensor, logit_NV: Tensor, kind: Divergence) -> tuple[Tensor, Tensor]:
    """Each position's divergence (N,), and its gradient (N, V) with respect to `logit_NV`: both inputs are overwritten.

    With r = log q - log m, KL(q || m) has the gradient q (r - KL(q || m)), for a reversed KL with m = p; what m itself
    adds for Jensen-Shannon's cancels against KL(p || m).
    """
    log_q_NV = logit_NV.sub_(logit_NV.logsumexp(1, keepdim=True))
    log_p_NV = taught_NV.sub_(taught_NV.logsumexp(1, keepdim=True))
    if kind == "forward":
        p_NV = log_p_NV.exp()
        divergence_N = torch.linalg.vecdot(p_NV, log_p_NV.sub_(log_q_NV))
        return divergence_N, log_q_NV.exp_().sub_(p_NV)
    log_m_NV = log_p_NV if kind == "reverse" else torch.logaddexp(log_p_NV, log_q_NV).sub_(math.log(2))
    q_NV = log_q_NV.exp()
    ratio_NV = log_q_NV.sub_(log_m_NV)
    divergence_N = torch.linalg.vecdot(q_NV, ratio_NV)
    grad_NV = ratio_NV.sub_(divergence_N[:, None]).mul_(q_NV)
    if kind == "reverse":
        return divergence_N, grad_NV
    of_teacher_N = torch.linalg.vecdot(log_p_NV.exp(), log_p_NV.sub_(log_m_NV))
    return (divergence_N + of_teacher_N) / 2, grad_NV.div_(2)
