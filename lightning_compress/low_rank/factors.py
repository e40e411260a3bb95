"""The best approximation of lower rank of a matrix, for the inputs that it meets.

Of all matrices of rank r, W' = U_r U_r^T W changes the outputs of W least: U_r are the top eigenvectors of W C W^T,
and C is the covariance of the inputs. This is the theorem of Eckart and Young for W C^(1/2). It needs no inverse of C,
which may be singular. The expected squared change is the sum of the eigenvalues that were dropped; without C it is
plain SVD.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Factors(NamedTuple):
    """Two factors of a weight, and what its bias gains.

    Attributes:
        first: (r, n), which meets the inputs.
        second: (O, r), which makes the outputs. Column i of it is as long as row i of `first`.
        shift: (O,), by which the outputs' means would change otherwise; zeros without the mean of the inputs.
    """

    first: Tensor
    second: Tensor
    shift: Tensor


class Principal(NamedTuple):
    """The directions of the outputs of a matrix, in the order of their variance.

    Attributes:
        basis: (O, R) with orthonormal columns, where R is the highest rank that the matrix can have.
        losses: (R + 1,), the outputs' squared change if only the first 0, 1, ... R directions are kept.
    """

    basis: Tensor
    losses: Tensor


def exact(tensor: Tensor) -> Tensor:
    """Return a tensor in double precision, on a device that knows it."""
    tensor = tensor.detach()
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).to(torch.float64)


@torch.no_grad()
def principal(weight: Tensor, covariance: Tensor | None = None) -> Principal:
    """Return the directions of the outputs of a matrix for inputs of some covariance; None: the identity.

    Directions in which no output of these inputs varies come last, in the order of the singular values that are left:
    the highest rank is always the matrix itself, whatever the inputs were.

    Args:
        weight: (O, n) in double precision.
        covariance: (n, n); or the second moments about zero, where a mean can't be corrected by a bias.

    Example:
        >>> weight = torch.tensor([[2.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
        >>> principal(weight).losses
        tensor([5., 1., 0.], dtype=torch.float64)
        >>> principal(weight, torch.diag(torch.tensor([1.0, 9.0], dtype=torch.float64))).losses
        tensor([13.,  4.,  0.], dtype=torch.float64)
    """
    n_out, n_in = weight.shape
    most = min(n_out, n_in)
    if covariance is None:
        basis, values, _ = torch.linalg.svd(weight, full_matrices=False)
        return Principal(basis, _dropped(values.square()))
    if n_out <= n_in:
        energies, vectors = torch.linalg.eigh(weight @ covariance @ weight.T)
        basis, energies = vectors.flip(1), energies.flip(0).clamp_(min=0)
    else:  # a vocabulary has too many outputs for a square matrix of them
        spread, axes = torch.linalg.eigh(covariance)
        basis, values, _ = torch.linalg.svd((weight @ axes) * spread.clamp_(min=0).sqrt(), full_matrices=False)
        energies = values.square()
    varies = energies > max(n_out, n_in) * torch.finfo(torch.float64).eps * energies[0]
    clear = int(varies.count_nonzero())
    if clear < most:
        basis = basis[:, :clear]
        left, _, _ = torch.linalg.svd(weight - basis @ (basis.T @ weight), full_matrices=False)
        basis, _ = torch.linalg.qr(torch.cat([basis, left[:, : most - clear]], 1))
    return Principal(basis, _dropped(torch.where(varies, energies, 0.0)))


def _dropped(energies: Tensor) -> Tensor:
    """Return the sums of the last R, R - 1, ... 0 energies."""
    return torch.cat([energies.flip(0).cumsum(0).flip(0), energies.new_zeros(1)])


def errors(weight: Tensor, covariance: Tensor | None = None) -> Tensor:
    """Return the least expected squared change of the outputs for each rank from 0 to the highest.

    Args:
        weight: (O, n).
        covariance: (n, n), of the inputs; None: the identity.
    """
    return principal(exact(weight), None if covariance is None else exact(covariance)).losses


def factor(weight: Tensor, rank: int, covariance: Tensor | None = None, mean: Tensor | None = None) -> Factors:
    """Return the two factors of rank r whose product changes the outputs least.

    Args:
        weight: (O, n).
        rank: From 1 to the smaller size of the weight.
        covariance: (n, n), of the inputs; None: plain SVD.
        mean: (n,), of the inputs, for the shift of the bias.

    Raises:
        ValueError: The rank is out of range.

    Example:
        >>> weight = torch.tensor([[1.0, 2.0], [2.0, 4.0], [0.0, 0.0]])
        >>> first, second, _ = factor(weight, 1)
        >>> torch.allclose(second @ first, weight.double())
        True
    """
    if not 1 <= rank <= min(weight.shape):
        raise ValueError(
            f"rank must be from 1 to {min(weight.shape)} for a weight of {tuple(weight.shape)}; got {rank}."
        )
    weight = exact(weight)
    basis = principal(weight, None if covariance is None else exact(covariance)).basis[:, :rank]
    return balanced(basis.T @ weight, basis, weight, None if mean is None else exact(mean))


def balanced(first: Tensor, second: Tensor, weight: Tensor, mean: Tensor | None) -> Factors:
    """Return factors of which row i and column i are equally long, so that both train alike, and the bias's shift."""
    shift = weight.new_zeros(len(weight)) if mean is None else (weight @ mean) - second @ (first @ mean)
    return Factors(*even(first, second), shift)


def even(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Return two factors, (r, n) and (O, r), with the same product, of which row i and column i are equally long."""
    lengths = first.norm(dim=1), second.norm(dim=0)
    scale = torch.where((lengths[0] > 0) & (lengths[1] > 0), (lengths[1] / lengths[0]).sqrt(), 1.0)
    return first * scale[:, None], second / scale
