"""Least squares in the metric of a layer's inputs, which the fits of all blocks share.

A convolution with weight W, of shape (O, I, K) for K taps, answers W x for each patch x of its input. A block whose
weight is W' differs from it by a mean square of

    E |(W' - W)(x - mean)|^2 = tr (W' - W) C (W' - W)^T

where C is the covariance of the patches, of shape (I, K, I, K). With C = identity it is the plain squared difference of
the weights. Blocks are products of small tensors, and the difference is quadratic in each of them: so one after the
other is set to its best value.
"""

from __future__ import annotations

import torch
from torch import Tensor

_RIDGE = 1e-10  # of the mean diagonal: what inputs never show keeps the value that it had


def moved(gram: Tensor, right: Tensor) -> Tensor:
    """Return the step to the minimum of 1/2 d^T gram d - right^T d, and none along directions that `gram` does not see.

    Args:
        gram: Symmetric positive semidefinite matrices, (..., n, n).
        right: (..., n, m), one column for each problem.

    Example:
        >>> moved(torch.tensor([[4.0, 0.0], [0.0, 0.0]]).double(), torch.tensor([[2.0], [0.0]]).double())
        tensor([[0.5000],
                [0.0000]], dtype=torch.float64)
    """
    scale = gram.diagonal(dim1=-2, dim2=-1).mean(-1)
    ridge = torch.where(scale > 0, scale * _RIDGE, torch.ones_like(scale))
    eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    return torch.cholesky_solve(right, torch.linalg.cholesky(gram + ridge[..., None, None] * eye))


def white(weight: Tensor) -> Tensor:
    """Return the covariance of inputs that are not correlated: (I, K, I, K) for a weight of shape (O, I, K)."""
    _, inputs, taps = weight.shape
    return torch.eye(inputs * taps, dtype=weight.dtype, device=weight.device).view(inputs, taps, inputs, taps)


def difference(approximation: Tensor, weight: Tensor, covariance: Tensor) -> Tensor:
    """Return for each output the mean square by which two layers differ: (O,)."""
    gap = (approximation - weight).flatten(1)
    n = gap.shape[1]
    return ((gap @ covariance.reshape(n, n)) * gap).sum(1)
