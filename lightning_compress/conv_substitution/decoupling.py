"""A convolution as a sum of depthwise and pointwise convolutions: network decoupling, and its fit to inputs.

Shapes: O outputs, I inputs, K taps, T terms. `separable` (MobileNet) filters each input channel and mixes afterwards;
`xception` mixes first and filters each output channel:

    separable  W'[o, i, k] = sum_t pointwise[o, t, i] depthwise[t, i, k]
    xception   W'[o, i, k] = sum_t pointwise[t, o, i] depthwise[t, o, k]

Without data each input channel's O x K matrix (xception: each output channel's I x K matrix) is cut to rank T by its
singular value decomposition, which is the best sum of T terms (Guo et al. 2018, 1808.05517), and exact for
T = min(O, K).
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_compress.conv_substitution.least_squares import moved

_CHUNK = 2**26  # numbers that may be held at once


def separable_weight(pointwise: Tensor, depthwise: Tensor) -> Tensor:
    """Return the weight (O, I, K) of terms with pointwise (O, T, I) and depthwise (T, I, K)."""
    return torch.einsum("oti,tik->oik", pointwise, depthwise)


def xception_weight(pointwise: Tensor, depthwise: Tensor) -> Tensor:
    """Return the weight (O, I, K) of terms with pointwise (T, O, I) and depthwise (T, O, K)."""
    return torch.einsum("toi,tok->oik", pointwise, depthwise)


def decouple_separable(weight: Tensor, terms: int) -> tuple[Tensor, Tensor]:
    """Return pointwise (O, T, I) and depthwise (T, I, K), the closest to a weight (O, I, K).

    Example:
        >>> weight = torch.ones(4, 2, 9).double()
        >>> torch.dist(separable_weight(*decouple_separable(weight, 1)), weight) < 1e-12
        tensor(True)
    """
    left, right = _terms(weight.transpose(0, 1), terms)  # (I, O, T), (I, T, K)
    return left.permute(1, 2, 0).contiguous(), right.transpose(0, 1).contiguous()


def decouple_xception(weight: Tensor, terms: int) -> tuple[Tensor, Tensor]:
    """Return pointwise (T, O, I) and depthwise (T, O, K), the closest to a weight (O, I, K)."""
    left, right = _terms(weight, terms)  # (O, I, T), (O, T, K)
    return left.permute(2, 0, 1).contiguous(), right.transpose(0, 1).contiguous()


def _terms(matrices: Tensor, terms: int) -> tuple[Tensor, Tensor]:
    """Return the factors (n, a, terms) and (n, terms, b) of matrices (n, a, b), of equal sizes."""
    u, s, v = torch.linalg.svd(matrices, full_matrices=False)
    root = s[:, :terms].sqrt()
    return u[:, :, :terms] * root[:, None], root[:, :, None] * v[:, :terms]


def fit_separable(
    weight: Tensor, covariance: Tensor, pointwise: Tensor, depthwise: Tensor, *, rounds: int = 2
) -> tuple[Tensor, Tensor]:
    """Fit terms to a layer's inputs, from given ones: pointwise by least squares, then filters, then pointwise again.

    Args:
        weight: (O, I, K).
        covariance: Of the patches, (I, K, I, K).
        pointwise: (O, T, I).
        depthwise: (T, I, K).
        rounds: How often the filters are fitted.
    """
    pointwise = _fit_pointwise(weight, covariance, pointwise, depthwise)
    for _ in range(rounds):
        depthwise = _fit_filters(weight, covariance, pointwise, depthwise)
        pointwise = _fit_pointwise(weight, covariance, pointwise, depthwise)
    return pointwise, depthwise


def _fit_pointwise(weight: Tensor, covariance: Tensor, pointwise: Tensor, depthwise: Tensor) -> Tensor:
    terms, inputs, _ = depthwise.shape
    half = torch.einsum("tik,ikjl->tijl", depthwise, covariance)
    gram = torch.einsum("tijl,sjl->tisj", half, depthwise).reshape(terms * inputs, terms * inputs)
    gap = (weight - separable_weight(pointwise, depthwise)).flatten(1) @ half.reshape(terms * inputs, -1).T
    return pointwise + moved(gram, gap.T).T.reshape(pointwise.shape)


def _fit_filters(weight: Tensor, covariance: Tensor, pointwise: Tensor, depthwise: Tensor) -> Tensor:
    """Fit the filters of one input channel after the other."""
    depthwise = depthwise.clone()
    gap = weight - separable_weight(pointwise, depthwise)
    for i in range(weight.shape[1]):
        mixed = pointwise[:, :, i]  # (O, T)
        right = torch.einsum("tjl,jlk->tk", torch.einsum("ot,ojl->tjl", mixed, gap), covariance[:, :, i])
        gram = torch.einsum("ts,kl->tksl", mixed.T @ mixed, covariance[i, :, i])
        step = moved(gram.reshape(right.numel(), -1), right.reshape(-1, 1)).view_as(right)
        depthwise[:, i] += step
        gap[:, i] -= mixed @ step
    return depthwise


def fit_xception(
    weight: Tensor, covariance: Tensor, pointwise: Tensor, depthwise: Tensor, *, rounds: int = 2
) -> tuple[Tensor, Tensor]:
    """Fit terms to a layer's inputs, from given ones, each output by itself; see `fit_separable`.

    Args:
        weight: (O, I, K).
        covariance: Of the patches, (I, K, I, K).
        pointwise: (T, O, I).
        depthwise: (T, O, K).
        rounds: How often the filters are fitted.
    """
    outputs, inputs, taps = weight.shape
    at_once = max(1, _CHUNK // (inputs * inputs * taps * len(depthwise) ** 2))
    pieces = []
    for first in range(0, outputs, at_once):
        some = slice(first, first + at_once)
        mixed, filters = pointwise[:, some], depthwise[:, some]
        for turn in range(2 * rounds + 1):
            gap = torch.einsum("oik,ikjl->ojl", weight[some] - xception_weight(mixed, filters), covariance)
            if turn % 2:
                half = torch.einsum("toi,ikjl->tokjl", mixed, covariance)
                gram = torch.einsum("tokjl,soj->otksl", half, mixed)
                right = torch.einsum("ojl,toj->otl", gap, mixed)
                filters = filters + _each(gram, right)
            else:
                half = torch.einsum("tok,ikjl->toijl", filters, covariance)
                gram = torch.einsum("toijl,sol->otisj", half, filters)
                right = torch.einsum("ojl,tol->otj", gap, filters)
                mixed = mixed + _each(gram, right)
        pieces.append((mixed, filters))
    return torch.cat([one for one, _ in pieces], 1), torch.cat([one for _, one in pieces], 1)


def _each(gram: Tensor, right: Tensor) -> Tensor:
    """Solve a problem (T n) for each output, and return the steps as (T, O, n)."""
    outputs, terms, n = right.shape
    steps = moved(gram.reshape(outputs, terms * n, terms * n), right.reshape(outputs, -1, 1))
    return steps.view(outputs, terms, n).transpose(0, 1)
