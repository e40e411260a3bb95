"""The fit of a ghost block: which outputs are computed, and small filters that make the others from these.

The block computes P of the O outputs as the layer does. The others, its ghosts, are filters of D x D taps of one of
these outputs each. What is needed of the outputs is how each channel's neighbourhood goes with
every channel: `lags` of shape (O, D * D, O), and within each channel: (O, D * D, D * D).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_compress.conv_substitution.least_squares import moved


def pivots(gram: Tensor, count: int) -> Tensor:
    """Return the columns that QR with column pivoting of any X with gram = X^T X takes first.

    Example:
        >>> x = torch.tensor([[3.0, 3.0, 0.0], [0.0, 0.5, 1.0]]).double()
        >>> pivots(x.T @ x, 2)
        tensor([1, 2])
    """
    left = gram.clone()
    chosen = list[int]()
    free = torch.ones(len(gram), dtype=torch.bool, device=gram.device)
    for _ in range(count):
        rest = torch.where(free, left.diagonal(), -torch.inf)
        best = int(rest.argmax())
        chosen.append(best)
        free[best] = False
        if left[best, best] > 0:
            column = left[:, best].clone()
            left -= torch.outer(column, column / column[best])
    return torch.tensor(chosen, device=gram.device)


def fit_ghosts(
    lags: Tensor, within: Tensor, chosen: Tensor, rounds: Sequence[int]
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Choose for each output that is not computed the computed one from which it is made, and fit its filter.

    Args:
        lags: (O, D * D, O): the second moment of a tap of one channel's neighbourhood with another channel.
        within: (O, D * D, D * D): that of the taps of each channel.
        chosen: The outputs that are computed.
        rounds: How many ghosts are made in each round, in which a computed output has one ghost at most.

    Returns:
        For each round the ghosts; the position in `chosen` of what each is made from; their filters (ghosts, D * D).
    """
    left = torch.ones(lags.shape[2], dtype=torch.bool, device=lags.device)
    left[chosen] = False
    others = left.nonzero()[:, 0]
    right = lags[chosen][:, :, others]  # (P, D * D, R)
    filters = moved(within[chosen], right)
    gains = (filters * right).sum(1)  # (P, R): how much smaller the squared error gets
    every, found = torch.arange(len(others), device=lags.device), []
    for count in rounds:
        sources = assign(gains[:, every])
        made = (sources >= 0).nonzero()[:, 0]
        assert len(made) == count
        found.append((others[every[made]], sources[made], filters[sources[made], :, every[made]]))
        every = every[sources < 0]
    return found


def assign(gains: Tensor) -> Tensor:
    """Return a row for each column, or -1 for as many columns as there are too many.

    No exchange of two rows, or of a row that is taken and one that is free, gains more; gains are 0 or more.

    Example:
        >>> assign(torch.tensor([[5.0, 4.0], [4.0, 0.0]]))  # 4 + 4 and not 5 + 0
        tensor([1, 0])
    """
    rows, columns = gains.shape
    n = max(rows, columns)
    square = gains.new_zeros(n, n)
    square[:rows, :columns] = gains
    taken, found = [False] * n, [-1] * n
    for place in square.flatten().argsort(descending=True, stable=True).tolist():
        row, column = divmod(place, n)
        if found[column] < 0 and not taken[row]:
            found[column], taken[row] = row, True
    sources = torch.tensor(found, device=gains.device)
    every = torch.arange(n, device=gains.device)
    for _ in range(n * n):
        now, swapped = square[sources, every], square[sources]  # [a, b]: column b with the row of column a
        better = swapped + swapped.T - now[:, None] - now
        best = int(better.argmax())
        if not float(better.flatten()[best]) > 1e-12 * float(square.max()):
            break
        pair = list(divmod(best, n))
        sources[pair] = sources[pair[::-1]]
    sources = sources[:columns]
    return torch.where(sources < rows, sources, -1)


def white_lags(weight: Tensor, *, stride: tuple[int, ...], dilation: tuple[int, ...], size: int) -> Tensor:
    """Return the `lags` (O, D ** dims, O) of a convolution's outputs where its inputs are white noise.

    Args:
        weight: (O, I, *kernel).
        stride: Of the convolution.
        dilation: Of the convolution.
        size: D, which is odd.
    """
    dims = weight.dim() - 2
    spread = weight
    for dim, step in enumerate(dilation):
        spread = _spread(spread, dim + 2, step)
    convolve = (F.conv1d, F.conv2d, F.conv3d)[dims - 1]
    reach = [size // 2 * step for step in stride]
    found = convolve(spread, spread, padding=reach)  # [a, b, lag]: channel a read at lag - reach, with b
    for dim, step in enumerate(stride):
        places = torch.arange(0, size, device=weight.device) * step
        found = found.index_select(dim + 2, places)
    # channel a at a tap d is the same noise as b when b's filter is moved by d: a's filter is read at -d
    return found.flatten(2).flip(2).permute(0, 2, 1)


def _spread(weight: Tensor, dim: int, step: int) -> Tensor:
    """Put zeros between a filter's taps."""
    shape = list(weight.shape)
    shape[dim] = (shape[dim] - 1) * step + 1
    wide = weight.new_zeros(shape)
    wide[(slice(None),) * dim + (slice(None, None, step),)] = weight
    return wide


def white_within(weight: Tensor, *, stride: tuple[int, ...], dilation: tuple[int, ...], size: int) -> Tensor:
    """Return the second moments (O, D ** dims, D ** dims) of each channel's neighbourhood for white noise."""
    dims = weight.dim() - 2
    wide = white_lags(weight, stride=stride, dilation=dilation, size=2 * size - 1)
    own = wide.diagonal(dim1=0, dim2=2).T  # (O, lags)
    taps = torch.cartesian_prod(*[torch.arange(size)] * dims).view(-1, dims)
    lag = taps[:, None] - taps[None] + size - 1  # between two taps
    strides = torch.tensor([(2 * size - 1) ** d for d in reversed(range(dims))])
    return own[:, ((lag * strides).sum(-1)).to(own.device)]
