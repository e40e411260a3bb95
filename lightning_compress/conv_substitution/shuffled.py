"""The fit of a ShuffleNet block without a nonlinearity: grouped 1x1, channel shuffle, depthwise, grouped 1x1.

The first convolution has G groups of H / G outputs each; the shuffle deals them out, so that the hidden channel h
reads the input group h mod G. The last convolution reads H / G hidden channels in each of its groups:

    W'[o, i, k] = sum of last[o, h] filters[h, k] first[h, i] over the channels h of o's group that read i's group

Shapes: first (H, I / G), in the order after the shuffle; filters (H, K); last (O, H / G).
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_compress.conv_substitution.least_squares import moved

Parts = tuple[Tensor, Tensor, Tensor]


def shuffle_weight(first: Tensor, filters: Tensor, last: Tensor) -> Tensor:
    """Return the weight (O, I, K) of the parts."""
    maps = _maps(first, filters, len(first) // last.shape[1])
    pairs = zip(last.chunk(len(first) // last.shape[1]), maps.chunk(len(first) // last.shape[1]), strict=True)
    return torch.cat([torch.einsum("oh,hik->oik", rows, some) for rows, some in pairs])


def _maps(first: Tensor, filters: Tensor, groups: int) -> Tensor:
    """Return how each hidden channel is made from the inputs: (H, I, K)."""
    hidden, inputs = first.shape
    maps = first.new_zeros(hidden, groups, inputs, filters.shape[1])
    every = torch.arange(hidden, device=first.device)
    maps[every, every % groups] = first[:, :, None] * filters[:, None]
    return maps.flatten(1, 2)


def start_shuffle(weight: Tensor, hidden: int, groups: int) -> Parts:
    """Return parts that begin as singular vectors of the weight's blocks, one for each pair of groups.

    Args:
        weight: (O, I, K); the groups divide O and I.
        hidden: H, which the groups divide.
        groups: G.
    """
    outputs, inputs, taps = weight.shape
    first = weight.new_zeros(hidden, inputs // groups)
    filters = weight.new_zeros(hidden, taps)
    last = weight.new_zeros(outputs, hidden // groups)
    width = hidden // groups
    for to, block in enumerate(weight.chunk(groups)):
        for source in range(groups):
            places = [h for h in range(to * width, (to + 1) * width) if h % groups == source]
            part = block.chunk(groups, 1)[source]
            _, _, rows = torch.linalg.svd(part.flatten(1), full_matrices=False)
            for place, row in zip(places, rows, strict=False):
                u, s, v = torch.linalg.svd(row.view(-1, taps), full_matrices=False)
                first[place], filters[place] = u[:, 0] * s[0].sqrt(), v[0] * s[0].sqrt()
            for place in places[len(rows) :]:  # more hidden channels than the block has rows
                first[place, (place // groups) % (inputs // groups)] = 1
                filters[place, (place // groups) % taps] = 1
    return first, filters, last


def fit_shuffle(weight: Tensor, covariance: Tensor, parts: Parts, *, rounds: int = 4) -> Parts:
    """Fit the parts to a layer's inputs, from given ones: the last convolution first, all by least squares.

    Args:
        weight: (O, I, K).
        covariance: Of the patches, (I, K, I, K).
        parts: first, filters and last.
        rounds: How often first and filters are fitted, a hidden channel after the other.
    """
    first, filters, last = (one.clone() for one in parts)
    last = _fit_last(weight, covariance, first, filters, last)
    for _ in range(rounds):
        _fit_hidden(weight, covariance, first, filters, last)
        last = _fit_last(weight, covariance, first, filters, last)
    return first, filters, last


def _fit_last(weight: Tensor, covariance: Tensor, first: Tensor, filters: Tensor, last: Tensor) -> Tensor:
    groups = len(first) // last.shape[1]
    maps = _maps(first, filters, groups).flatten(1)
    flat = covariance.reshape(maps.shape[1], -1)
    fitted = []
    for rows, some, target in zip(last.chunk(groups), maps.chunk(groups), weight.flatten(1).chunk(groups), strict=True):
        half = some @ flat
        fitted.append(rows + moved(half @ some.T, half @ (target - rows @ some).T).T)
    return torch.cat(fitted)


def _fit_hidden(weight: Tensor, covariance: Tensor, first: Tensor, filters: Tensor, last: Tensor) -> None:
    """Set first and filters of one hidden channel after the other, in place."""
    width, inputs = last.shape[1], first.shape[1]
    groups = len(first) // width
    gap = weight - shuffle_weight(first, filters, last)
    for h in range(len(first)):
        block = gap.chunk(groups)[h // width]
        source = slice(h % groups * inputs, (h % groups + 1) * inputs)
        column = last.chunk(groups)[h // width][:, h % width]
        seen = covariance[:, :, source]
        own = covariance[source, :, source]
        size = column @ column

        def right(column: Tensor = column, block: Tensor = block, seen: Tensor = seen) -> Tensor:
            mixed = torch.einsum("o,oik->ik", column, block)
            return torch.einsum("ik,ikjl->jl", mixed, seen)

        gram = size * torch.einsum("k,ikjl,l->ij", filters[h], own, filters[h])
        step = moved(gram, (right() @ filters[h])[:, None])[:, 0]
        first[h] += step
        block[:, source] -= column[:, None, None] * (step[:, None] * filters[h])
        gram = size * torch.einsum("i,ikjl,j->kl", first[h], own, first[h])
        step = moved(gram, (first[h] @ right())[:, None])[:, 0]
        filters[h] += step
        block[:, source] -= column[:, None, None] * (first[h][:, None] * step)
