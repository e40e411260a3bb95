"""The fit of a fire module without a nonlinearity: a 1x1 convolution squeezes, 1x1 and K-tap ones expand.

    W'[o, i, k] = sum_s expand[o, s, k] squeeze[s, i]

where the outputs of the 1x1 part have a filter only at the centre tap. Which outputs these are is chosen: those that
lose least by it. Shapes: squeeze (S, I), expand (O, S, K).
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_compress.conv_substitution.least_squares import difference, moved


def fire_weight(squeeze: Tensor, expand: Tensor) -> Tensor:
    """Return the weight (O, I, K) of the parts."""
    return torch.einsum("osk,si->oik", expand, squeeze)


def start_squeeze(weight: Tensor, width: int) -> Tensor:
    """Return the directions of the inputs that a weight (O, I, K) reads most: (width, I), orthonormal."""
    _, _, rows = torch.linalg.svd(weight.transpose(1, 2).flatten(0, 1), full_matrices=False)
    start: Tensor = rows[:width].clone()
    return start


def fit_fire(
    weight: Tensor, covariance: Tensor, squeeze: Tensor, points: int, *, rounds: int = 4
) -> tuple[Tensor, Tensor, Tensor]:
    """Fit a fire module to a layer's inputs, from a given squeeze, all by least squares.

    Args:
        weight: (O, I, K).
        covariance: Of the patches, (I, K, I, K).
        squeeze: (S, I).
        points: How many outputs get a 1x1 filter.
        rounds: How often the squeeze is fitted, a channel after the other.

    Returns:
        The squeeze; the expansion (O, S, K), zero but at the centre tap for outputs of the 1x1 part; and these outputs.
    """
    squeeze = squeeze.clone()
    plain = torch.einsum("oik,si->osk", weight, squeeze)
    whole = _expand(weight, covariance, squeeze, plain)
    centre = _expand(weight, covariance, squeeze, _at_centre(plain))
    losses = [difference(fire_weight(squeeze, one), weight, covariance) for one in (centre, whole)]
    chosen = (losses[0] - losses[1]).argsort(stable=True)[:points].sort().values
    expand = whole
    expand[chosen] = centre[chosen]
    others = torch.ones(len(weight), dtype=torch.bool, device=weight.device)
    others[chosen] = False
    for _ in range(rounds):
        _fit_squeeze(weight, covariance, squeeze, expand)
        for some in (chosen, others.nonzero()[:, 0]):
            expand[some] = _expand(weight[some], covariance, squeeze, expand[some])
    return squeeze, expand, chosen


def _at_centre(filters: Tensor) -> Tensor:
    only = torch.zeros_like(filters)
    only[..., filters.shape[-1] // 2] = filters[..., filters.shape[-1] // 2]
    return only


def _expand(weight: Tensor, covariance: Tensor, squeeze: Tensor, expand: Tensor) -> Tensor:
    """Fit the taps of an expansion that are used by least squares."""
    used = expand.abs().sum((0, 1)).nonzero()[:, 0]
    n = len(squeeze)
    if not len(used):
        return expand
    half = torch.einsum("si,ikjl->skjl", squeeze, covariance[:, used])
    gram = torch.einsum("skjl,tj->sktl", half[..., used], squeeze).reshape(n * len(used), -1)
    gap = weight - fire_weight(squeeze, expand)
    step = moved(gram, torch.einsum("skjl,ojl->sko", half, gap).reshape(n * len(used), -1))
    fitted = expand.clone()
    fitted[:, :, used] += step.T.reshape(len(weight), n, len(used))
    return fitted


def _fit_squeeze(weight: Tensor, covariance: Tensor, squeeze: Tensor, expand: Tensor) -> None:
    """Set one squeezed channel after the other, in place."""
    gap = weight - fire_weight(squeeze, expand)
    for s in range(len(squeeze)):
        filters = expand[:, s]  # (O, K)
        mixed = torch.einsum("ok,ojl->kjl", filters, gap)
        right = torch.einsum("kjl,jlik->i", mixed, covariance)
        gram = torch.einsum("kl,ikjl->ij", filters.T @ filters, covariance)
        step = moved(gram, right[:, None])[:, 0]
        squeeze[s] += step
        gap -= filters[:, None] * step[:, None]
