"""The two updates of a sketch, on G sites at once: add an outer product; shrink a stack of rows (Frequent Directions).

Liberty, KDD 2013 (arXiv 1206.0594); Ghashami, Liberty, Phillips and Woodruff, SICOMP 2016 (arXiv 1501.01711). All
arithmetic is float64: products of float32 or bfloat16 numbers are exact in it, no scale overflows, TF32 cannot reach
it, and the energy identity holds to rounding over any number of shrinks.

Shapes: G sites, N rows of a stack, D width, L rows of a sketch, K = min(N, D).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

ROUNDING = torch.finfo(torch.float64).eps


class Shrunk(NamedTuple):
    """A stack cut down to L rows, and what that cost."""

    rows_GLD: Tensor
    delta_G: Tensor
    """0 <= S'S - B'B <= delta * I."""
    lost_G: Tensor
    """Trace of S'S - B'B, from the eigenvalues."""


def add_outer_(upper_GDD: Tensor, rows_GND: Tensor) -> None:
    """Add X'X to the upper triangle, block row by block row: the lower one is not worth its half of the products."""
    width = upper_GDD.shape[-1]
    block = max(64, math.ceil(width / 8))
    for start in range(0, width, block):
        left_GND = rows_GND[..., start : start + block]
        upper_GDD[:, start : start + block, start:].baddbmm_(left_GND.mT, rows_GND[..., start:])


def mirrored(upper_DD: Tensor) -> Tensor:
    """The symmetric matrix that has this upper triangle."""
    return upper_DD.triu() + upper_DD.triu(1).mT


def shrink(rows_GND: Tensor, size: int, alpha: float = 1.0) -> Shrunk:
    """The `size` strongest directions of each stack, with delta = lambda_{size + 1} taken off their squared lengths.

    With this delta (and not lambda_size) nothing is lost while the rank is at most `size`. `alpha` < 1 takes delta off
    the last ceil(alpha * size) directions only (Desai, Ghashami and Phillips, arXiv 1501.06561): 0 <= S'S - B'B <=
    delta * I still holds. `size` must be below N.
    """
    num_rows, width = rows_GND.shape[-2:]
    tall = num_rows > width
    gram_GKK = rows_GND.mT @ rows_GND if tall else rows_GND @ rows_GND.mT
    eigenvalue_GK, vector_GKK = torch.linalg.eigh(gram_GKK)
    eigenvalue_GK, vector_GKK = eigenvalue_GK.flip(-1).clamp_min(0), vector_GKK.flip(-1)
    delta_G = _delta(eigenvalue_GK, size)
    kept_GL = eigenvalue_GK[:, :size].clone()
    kept_GL[:, size - math.ceil(alpha * size) :] -= delta_G[:, None]
    kept_GL.clamp_min_(0)
    lost_G = eigenvalue_GK.sum(-1) - kept_GL.sum(-1)
    direction_GLK = vector_GKK[..., :size].mT
    if tall:
        return Shrunk(kept_GL.sqrt()[..., None] * direction_GLK, delta_G, lost_G)
    # Where the eigenvalue is rounding, so is the ratio: the row is noise times at most 1.
    gain_GL = (kept_GL / eigenvalue_GK[:, :size].clamp_min(torch.finfo(torch.float64).tiny)).sqrt()
    return Shrunk((gain_GL[..., None] * direction_GLK) @ rows_GND, delta_G, lost_G)


def _delta(eigenvalue_GK: Tensor, size: int) -> Tensor:
    """lambda_{size + 1}, and exactly 0 where it is rounding: a stack of rank `size` is kept whole."""
    if size >= eigenvalue_GK.shape[-1]:
        return torch.zeros_like(eigenvalue_GK[:, 0])
    delta_G = eigenvalue_GK[:, size]
    return torch.where(delta_G > eigenvalue_GK.shape[-1] * ROUNDING * eigenvalue_GK[:, 0], delta_G, 0.0)
