"""Hints: a layer of the student learns to make the features that a layer of its teacher makes.

    FitNet                mean over entries of (r(v) - u)^2                  v, u: features of the student, the teacher
    attention transfer    || Q(v) / ||Q(v)|| - Q(u) / ||Q(u)|| ||^2           Q_x = sum over channels c of v_cx^2

Where v has other channels than u, or a larger map, a regressor r brings it to u's shape, and learns along. Attention
maps Q compare only where the features are large, at the positions x; they need no regressor and no equal channels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from lightning_compress.distillation.losses import at_least_float32, unit_vectors

_CONVOLUTIONS: dict[int, Callable[[int, int, Any], nn.Module]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


def fitnet_loss(student_features: Tensor, teacher_features: Tensor) -> Tensor:
    """Compute the mean over all entries of (v - u)^2; the gradient reaches the student's features alone.

    The paper takes 1/2 ||v - u||^2 of a sample, which is larger by half the number of a sample's entries. With the mean
    one weight does for small and large layers.

    Args:
        student_features: v, of any shape, after the regressor if there is one.
        teacher_features: u, in the same shape.

    Raises:
        ValueError: The shapes differ.

    References:
        Romero et al. 2015, "FitNets: Hints for Thin Deep Nets", equation 3.

    Example:
        >>> import torch
        >>> fitnet_loss(torch.tensor([[1.0, 2.0], [0.0, 0.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
        tensor(1.2500)
    """
    if student_features.shape != teacher_features.shape:
        raise ValueError(
            f"The student's features have shape {tuple(student_features.shape)}, the teacher's "
            f"{tuple(teacher_features.shape)}: a regressor is needed, which brings the student's to the teacher's "
            "shape (regressor: true), or attention_transfer, if only the numbers of channels differ."
        )
    student = at_least_float32(student_features)
    total = F.mse_loss(student, teacher_features.detach().to(student.dtype), reduction="sum")
    return total / max(student.numel(), 1)


def attention_transfer_loss(student_features: Tensor, teacher_features: Tensor) -> Tensor:
    """Compute || Q(v)/||Q(v)|| - Q(u)/||Q(u)|| ||^2 averaged over samples, Q the sum of squares over channels.

    The paper writes half the distance itself; its square, as in the authors' code, has a gradient that vanishes where
    the maps agree. A sample whose features are all 0 has the map 0.

    Args:
        student_features: v, of shape (N, C, ...): channels, then positions.
        teacher_features: u, of the same N and positions; C may be another.

    Raises:
        ValueError: There are no positions, or the samples or positions differ.

    References:
        Zagoruyko and Komodakis 2017, "Paying More Attention to Attention", equation 2.

    Example:
        >>> import torch
        >>> v, u = torch.zeros(1, 2, 2, 2), torch.zeros(1, 5, 2, 2)
        >>> v[0, :, 0, 0] = -3.0; u[0, 1, 0, 0] = 0.1  # both look at the upper left corner
        >>> attention_transfer_loss(v, u)
        tensor(0.)
    """
    v, u = student_features.shape, teacher_features.shape
    shapes = f"The student's features have shape {tuple(v)}, the teacher's {tuple(u)}"
    if len(v) < 3 or len(u) < 3:
        raise ValueError(f"{shapes}. Attention maps need positions: expected (N, C, ...), such as (N, C, H, W).")
    if v[0] != u[0] or v[2:] != u[2:]:
        raise ValueError(
            f"{shapes}: the samples and positions must be the same, only the channels (dimension 1) may differ. Take "
            "layers with maps of one size."
        )
    difference = _attention(student_features) - _attention(teacher_features.detach())
    return difference.square().sum() / max(v[0], 1)


def _attention(features: Tensor) -> Tensor:
    return unit_vectors(at_least_float32(features).square().sum(1).flatten(1), dim=1)


def regressor(
    student_shape: Sequence[int], teacher_shape: Sequence[int], *, channel_dim: int | None = None
) -> nn.Module:
    """Make the layer that brings a student's features to the shape of its teacher's.

        channels last      a linear layer on the last dimension
        channels first     a convolution without padding, kernel (H_s - H_t + 1, W_s - W_t + 1): 1 x 1 for equal sizes

    The convolution has fewer parameters than a linear layer on the whole map, which is why the paper takes it. It is
    linear, so that it can meet features of any sign; the paper lets the nonlinearity of the teacher's layer follow.

    Args:
        student_shape: Shape of the student's features with the batch, whose size does not matter.
        teacher_shape: Likewise of the teacher's.
        channel_dim: 1 or -1. By default 1, as in (N, D), (N, C, H, W); it must be given for 3 dimensions, where it
            tells (N, C, L), 1, from (N, T, D), -1.

    Raises:
        ValueError: No such layer leads from one shape to the other, or the channels' dimension is unknown.

    References:
        Romero et al. 2015, "FitNets: Hints for Thin Deep Nets", section 2.2.

    Example:
        >>> regressor((8, 16, 14, 14), (8, 64, 8, 8))
        Conv2d(16, 64, kernel_size=(7, 7), stride=(1, 1))
        >>> regressor((8, 50, 312), (8, 50, 768), channel_dim=-1)
        Linear(in_features=312, out_features=768, bias=True)
    """
    v, u = tuple(student_shape), tuple(teacher_shape)
    shapes = f"The student's features have shape {v}, the teacher's {u}"
    if len(v) != len(u) or len(v) < 2:
        raise ValueError(f"{shapes}; expected two of the same number of dimensions, 2 or more: a batch and channels.")
    if channel_dim is None and len(v) == 3:
        raise ValueError(f"{shapes}. Give channel_dim=-1 for tokens (N, T, D), channel_dim=1 for sequences (N, C, L).")
    if channel_dim not in (None, 1, -1):
        raise ValueError(f"channel_dim={channel_dim}: expected 1 or -1.")
    if len(v) == 2 or channel_dim == -1:
        if v[1:-1] != u[1:-1]:
            raise ValueError(
                f"{shapes}: with channels last (channel_dim=-1), only the last dimension may differ. Take layers with "
                "as many positions."
            )
        return nn.Linear(v[-1], u[-1])
    kernel = tuple(larger - smaller + 1 for larger, smaller in zip(v[2:], u[2:], strict=True))
    if min(kernel) < 1:
        raise ValueError(
            f"{shapes}: a convolution without padding cannot enlarge a map. Take an earlier layer of the student, or a "
            "later one of the teacher."
        )
    if len(kernel) not in _CONVOLUTIONS:
        raise ValueError(f"{shapes}; expected at most 3 dimensions after the channels, (N, C, D, H, W).")
    return _CONVOLUTIONS[len(kernel)](v[1], u[1], kernel)
