"""The two updates of a sketch, on G sites at once: add an outer product; shrink a stack of rows (Frequent Directions).

Liberty, KDD 2013 (arXiv 1206.0594); Ghashami, Liberty, Phillips and Woodruff, SICOMP 2016 (arXiv 1501.01711). All of
it is float64: products of float32 or bfloat16 numbers are exact in it, no scale overflows, TF32 cannot reach it, and
errors do not add up. (In float32 a gain just below 1 is rounded to 1 at every shrink: the sketch gains energy.)

Shapes: G sites, N rows of a stack, D width, L rows of a sketch, K = min(N, D).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

NULL = 1e-12
"""Eigenvalues below this share of the largest are rounding."""
TINY = torch.finfo(torch.float64).tiny


class Shrunk(NamedTuple):
    """A stack cut down to L orthogonal rows, and what that cost."""

    rows_GLD: Tensor
    squared_GL: Tensor
    """Squared lengths of the rows."""
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


def shrink(rows_GND: Tensor, size: int, alpha: float = 1.0, *, squared_GL: Tensor | None = None) -> Shrunk:
    """The `size` strongest directions of each stack, with delta = lambda_{size + 1} taken off their squared lengths.

    With this delta (and not lambda_size) nothing is lost while the rank is at most `size`. `alpha` < 1 takes delta off
    the last ceil(alpha * size) directions only (Desai, Ghashami and Phillips, arXiv 1501.06561): 0 <= S'S - B'B <=
    delta * I still holds. `size` must be below N. If the first rows are the result of a shrink, `squared_GL` is its.
    """
    tall = rows_GND.shape[1] > rows_GND.shape[2]
    eigenvalue_GK, vector_GKK = _columns_gram_eigh(rows_GND) if tall else _rows_gram_eigh(rows_GND, squared_GL)
    eigenvalue_GK = eigenvalue_GK.clamp_min_(0)  # weakest first
    delta_G = _delta(eigenvalue_GK, size)
    top_GL = eigenvalue_GK[:, -size:]
    kept_GL = top_GL.clone()
    kept_GL[:, : math.ceil(alpha * size)] -= delta_G[:, None]
    kept_GL.clamp_min_(0)
    lost_G = eigenvalue_GK.sum(-1) - kept_GL.sum(-1)
    # Where the eigenvalue is rounding, so is the ratio: the row is noise times at most 1.
    gain_GL = kept_GL.sqrt() if tall else (kept_GL / top_GL.clamp_min(TINY)).sqrt_()
    direction_GLK = (vector_GKK[..., -size:] * gain_GL[:, None]).mT
    return Shrunk(direction_GLK if tall else direction_GLK @ rows_GND, kept_GL, delta_G, lost_G)


class Eigh(NamedTuple):
    """Eigenvalues, weakest first, and their eigenvectors as columns."""

    eigenvalue_GK: Tensor
    vector_GKK: Tensor


def _rows_gram_eigh(rows_GND: Tensor, squared_GL: Tensor | None) -> Eigh:
    """Of S S', its upper triangle only (LAPACK is faster there): and of orthogonal rows its diagonal only."""
    num_sites, num_rows, _ = rows_GND.shape
    num_known = 0 if squared_GL is None else squared_GL.shape[1]
    upper_GNN = rows_GND.new_zeros(num_sites, num_rows, num_rows)
    if squared_GL is not None:
        upper_GNN.diagonal(dim1=1, dim2=2)[:, :num_known] = squared_GL
    upper_GNN[:, :, num_known:] = (rows_GND[:, num_known:] @ rows_GND.mT).mT
    return Eigh(*torch.linalg.eigh(upper_GNN, UPLO="U"))


def _columns_gram_eigh(rows_GND: Tensor) -> Eigh:
    """Of S'S, where that is the smaller one."""
    upper_GDD = rows_GND.new_zeros(rows_GND.shape[0], rows_GND.shape[2], rows_GND.shape[2])
    add_outer_(upper_GDD, rows_GND)
    return Eigh(*torch.linalg.eigh(upper_GDD, UPLO="U"))


def _delta(eigenvalue_GK: Tensor, size: int) -> Tensor:
    """lambda_{size + 1}, and exactly 0 where it is rounding: a stack of rank `size` is kept whole."""
    if size >= eigenvalue_GK.shape[-1]:
        return torch.zeros_like(eigenvalue_GK[:, 0])
    delta_G = eigenvalue_GK[:, -size - 1]
    return torch.where(delta_G > NULL * eigenvalue_GK[:, -1], delta_G, 0.0)
