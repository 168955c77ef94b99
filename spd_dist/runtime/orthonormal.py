"""Orthonormal bases made the same way everywhere: fixed signs, fixed completion.

Shapes: D width of a site, R columns of a basis.
"""

from __future__ import annotations

import torch
from torch import Tensor


def signed(basis_DR: Tensor) -> Tensor:
    """The basis with each column's largest entry (the first of equals) positive."""
    if basis_DR.shape[1] == 0:
        return basis_DR
    largest_R = basis_DR.gather(0, basis_DR.abs().argmax(0, keepdim=True))
    return torch.where(largest_R < 0, -basis_DR, basis_DR)


def completed(basis_DR: Tensor, num_columns: int) -> Tensor:
    """The basis with columns added until it has `num_columns`: unit vectors in order, made orthogonal to what is there.

    A unit vector is passed over if less than 1 / (2 D) of it is new. If all of them were passed over with a direction
    still missing, the new parts, which sum to at least 1, would sum to less than 1/2: so the order always suffices.
    """
    width = len(basis_DR)
    columns_DR = basis_DR.double()
    for index in range(width):
        if columns_DR.shape[1] >= num_columns:
            break
        new_D = -(columns_DR @ columns_DR[index])
        new_D[index] += 1
        if new_D.square().sum() < 1 / (2 * width):
            continue
        new_D -= columns_DR @ (columns_DR.T @ new_D)  # a second pass, for orthogonality to the last bit
        columns_DR = torch.cat([columns_DR, (new_D / new_D.norm())[:, None]], dim=1)
    return columns_DR


def complement(basis_DR: Tensor) -> Tensor:
    """An orthonormal basis of everything orthogonal to `basis_DR`, float64, D - R columns."""
    rank = basis_DR.shape[1]
    if rank == 0:
        return torch.eye(len(basis_DR), dtype=torch.float64)
    full_DD = torch.linalg.qr(basis_DR.double(), mode="complete").Q
    return signed(full_DD[:, rank:])
