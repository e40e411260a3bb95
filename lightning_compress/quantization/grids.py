"""Quantization of weights to a symmetric grid of a few bits.

    W~_i = s_c q_i,   q_i = clamp(round(w_i / s_c), -L, L),   L = 2^(b-1) - 1        c: the output channel of w_i

With 6 to 8 bits, s_c = max |w| / L over the channel, so nothing is clamped. With 2 to 5 bits, s_c is a local minimum of
the sum of (w - W~)^2: the best of a few starting points f max |w| / L, each of which is improved by

    s_c <- sum of w_i q_i / sum of q_i^2        (the best scale for these q; then the best q for this scale)

Jacob et al. 2018 (arXiv 1712.05877), section 3; Krishnamoorthi 2018 (1806.08342), section 2; Nagel et al. 2021
(2106.08295), section 2.2 for symmetric grids and 2.5 for ranges of least squared error.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import Tensor

from lightning_compress.core.by_channel import by_channel
from lightning_compress.core.given import whole_number
from lightning_compress.core.precision import widened

Granularity = Literal["channel", "tensor"]

_SEARCHED = 5  # most bits for which the scale is searched; with more bits max |w| / L is nearly as good
_STARTS = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)  # the factors f
_IMPROVEMENTS = 6  # per starting point


def check_bits(name: str, bits: Any) -> None:
    """Raise a ValueError unless `bits` is a whole number from 2 to 8."""
    hint = "For one bit use BinaryWeightsCallback: " if name == "weight_bits" and bits == 1 else ""
    whole_number(bits, f"{hint}{name} must be a whole number from 2 to 8", least=2, most=8)


def check_granularity(granularity: str) -> None:
    """Raise a ValueError unless `granularity` is "channel" or "tensor"."""
    if granularity not in get_args(Granularity):
        raise ValueError(f"granularity must be 'channel' or 'tensor' (one scale for each); got {granularity!r}.")


def by_scale(w: Tensor, granularity: Granularity = "channel", groups: int | None = None) -> Tensor:
    """Return a four-dimensional view of a contiguous weight; entries that differ only in dims 1 and 3 share a scale.

    Args:
        w: A weight.
        granularity: "channel" for one scale per output channel, "tensor" for one scale in all.
        groups: The `groups` of a transposed convolution, whose output channels lie in dim 1; None for other layers.
    """
    return w.view(1, -1, 1, 1) if granularity == "tensor" else by_channel(w, groups)


@torch.no_grad()
def weight_scales(
    w: Tensor, bits: int, *, granularity: Granularity = "channel", groups: int | None = None, last: Tensor | None = None
) -> Tensor:
    """Return the scales s of a weight, shaped to multiply `by_scale` of the weight, in float32 or float64.

    The scales of 16-bit weights are rounded to the type of the weights, because files store such scales in a short
    form. A scale stays unrounded if rounding would move a point of the grid by more than a third of a step, as with
    weights so small that the rounded scale has few digits or is 0.

    Args:
        w: The real weights.
        bits: The bits b of a weight, 2 to 8.
        granularity: "channel" or "tensor", as for `by_scale`.
        groups: The groups of a transposed convolution, as for `by_scale`; None for other layers.
        last: The scales before the last optimizer step. With 2 to 5 bits they are improved once, without a search.

    Example:
        >>> w = torch.tensor([[0.1, -0.9, 1.1, 1.0], [0.0, 0.5, -0.5, 0.6]])
        >>> weight_scales(w, 2).flatten()  # the means of the three magnitudes that become 1
        tensor([1.0000, 0.5333])
        >>> weight_scales(w, 8).flatten() * 127
        tensor([1.1000, 0.6000])
    """
    top = 2 ** (bits - 1) - 1
    view = by_scale(widened(w).contiguous(), granularity, groups)
    covering: Tensor = view.abs().amax((1, 3), keepdim=True) / top
    if bits > _SEARCHED:
        return _in_type(covering, w.dtype, top)
    if last is not None:
        return _in_type(_improve(view, last.to(view.dtype), covering, top), w.dtype, top)
    best: Tensor = covering
    error = _error(view, covering, top)
    for start in _STARTS:
        scales = covering * start
        for _ in range(_IMPROVEMENTS):
            scales = _improve(view, scales, covering, top)
        found = _error(view, scales, top)
        best, error = torch.where(found < error, scales, best), torch.minimum(found, error)
    return _in_type(best, w.dtype, top)


@torch.no_grad()
def on_symmetric_grid(
    w: Tensor, scales: Tensor, bits: int, *, granularity: Granularity = "channel", groups: int | None = None
) -> Tensor:
    """Return the quantized weights W~: whole numbers times their scale, rounded to the dtype of w.

    Args:
        w: The real weights.
        scales: The scales that `weight_scales` returned.
        bits: The bits b of a weight, 2 to 8.
        granularity: "channel" or "tensor", as for `by_scale`.
        groups: The groups of a transposed convolution, as for `by_scale`; None for other layers.

    Example:
        >>> w = torch.tensor([[0.1, -0.9, 1.1, 1.0], [0.0, 0.5, -0.5, 0.6]])
        >>> on_symmetric_grid(w, weight_scales(w, 2), 2)
        tensor([[ 0.0000, -1.0000,  1.0000,  1.0000],
                [ 0.0000,  0.5333, -0.5333,  0.5333]])
    """
    view = by_scale(widened(w).contiguous(), granularity, groups)
    scales = scales.to(view.dtype)
    return _integers(view, scales, 2 ** (bits - 1) - 1).mul_(scales).to(w.dtype).view(w.shape)


def _in_type(scales: Tensor, dtype: torch.dtype, top: int) -> Tensor:
    """Round scales to the type of their weights, except where this moves a point by more than a third of a step."""
    rounded = scales.to(dtype).to(scales.dtype)
    return torch.where((rounded - scales).abs() * (3 * top) <= scales, rounded, scales)


def _integers(view: Tensor, scales: Tensor, top: int) -> Tensor:
    return (view / torch.where(scales > 0, scales, 1.0)).round_().clamp_(-top, top)


def _error(view: Tensor, scales: Tensor, top: int) -> Tensor:
    return (view - _integers(view, scales, top).mul_(scales)).square_().sum((1, 3), keepdim=True)


def _improve(view: Tensor, scales: Tensor, covering: Tensor, top: int) -> Tensor:
    integers = _integers(view, scales, top)
    squares = integers.square().sum((1, 3), keepdim=True)
    better = integers.mul_(view).sum((1, 3), keepdim=True) / squares.clamp(min=1)
    return torch.where(squares > 0, better, covering)  # all q may be 0, as after a long decay
