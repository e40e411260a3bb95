"""Least squares on features of a patch, for every number of features at once.

The first part of a split computes features of each patch of the input, F x; the rest of it is fitted to what the layer
returned: H = W C F^T (F C F^T)^-1. The features are nested, so one Cholesky factor says how well 1, 2, ... of them do.
"""

from __future__ import annotations

import torch
from torch import Tensor

_RIDGE = 1e-10  # of the features' mean energy: what has less stays as it was
_NOTHING = 1e-13  # of what outputs and features have in common: rounding, which a singular Gram matrix would amplify


class Nested:
    """The least squares of a layer on its first 1 to R features.

    Args:
        weight: (O, positions x width): the layer.
        basis: (R, width): the features, which are computed at each position alike.
        covariance: Of the patches, in the order of the weight; None: the identity.
        start: (O, R, positions): the rest of the split before; it stays where the inputs say nothing.

    Attributes:
        explained: (R x positions, O): the first r x positions rows, squared and summed, are the energy of the outputs
            that the first r features can make.
    """

    def __init__(self, weight: Tensor, basis: Tensor, covariance: Tensor | None, start: Tensor) -> None:
        rank, width = basis.shape
        blocks = weight.reshape(len(weight), -1, width)
        self.positions, self.start = blocks.shape[1], start
        identity = torch.eye(self.positions).to(basis)
        if covariance is None:
            gram = torch.einsum("rw,sw,xy->rxsy", basis, basis, identity)
            common = torch.einsum("oxw,rw->orx", blocks, basis)
        else:
            parts = covariance.reshape(self.positions, width, self.positions, width)
            seen = torch.einsum("xvyw,rw->xvry", parts, basis)  # what patches have in common with features
            gram = torch.einsum("sv,xvry->sxry", basis, seen)
            common = torch.einsum("oxv,xvry->ory", blocks, seen)
        self.gram = gram.reshape(rank * self.positions, -1)
        self.common = common.reshape(len(weight), -1)
        ridge = _RIDGE * self.gram.diagonal().mean()
        self.root = torch.linalg.cholesky(self.gram + ridge * torch.eye(len(self.gram)).to(self.gram))
        self.explained = torch.linalg.solve_triangular(self.root, self.common.T, upper=False)

    def rest(self, rank: int) -> Tensor:
        """Return (O, rank, positions): what makes the outputs of the first features."""
        size = rank * self.positions
        start = self.start[:, :rank].reshape(len(self.start), size)
        missing = self.common[:, :size] - start @ self.gram[:size, :size]
        found = start
        if missing.norm() > _NOTHING * self.common[:, :size].norm():
            found = start + torch.cholesky_solve(missing.T, self.root[:size, :size]).T
        return found.reshape(len(found), rank, self.positions)


def mean_block(covariance: Tensor, positions: int) -> Tensor:
    """Return the mean over the positions of the covariance within one of them."""
    width = len(covariance) // positions
    return covariance.reshape(positions, width, positions, width).diagonal(dim1=0, dim2=2).mean(-1)


def energy(weight: Tensor, covariance: Tensor | None) -> Tensor:
    """Return the expected squared outputs of a linear layer (O, n) for inputs of some covariance."""
    return weight.square().sum() if covariance is None else ((weight @ covariance) * weight).sum()
