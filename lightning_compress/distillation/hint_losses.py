"""Losses of hints: a layer of the student learns to compute the features of a layer of the teacher.

    FitNet                mean over entries of (r(v) - u)^2                  v, u: features of the student, the teacher
    attention transfer    || Q(v) / ||Q(v)|| - Q(u) / ||Q(u)|| ||^2           Q_x = sum over channels c of v_cx^2

Where v has another number of channels than u, or a larger map, a regressor r maps it to u's shape and is trained with
the student. Attention maps Q only compare how large the features are at each position x: they need neither a regressor
nor equal channels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_compress.core.losses import unit_vectors
from lightning_compress.core.precision import widened

_CONVOLUTIONS: dict[int, Callable[[int, int, Any], nn.Module]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


def fitnet_loss(student_features: Tensor, teacher_features: Tensor, *, left_out: Tensor | None = None) -> Tensor:
    """Compute the mean over all entries of (v - u)^2; the gradient reaches the student's features alone.

    The paper uses 1/2 ||v - u||^2 per sample, which is larger by half the number of a sample's entries. With the mean,
    one weight suits small and large layers.

    Args:
        student_features: v, of any shape, after the regressor if there is one.
        teacher_features: u, in the same shape.
        left_out: True at positions that don't count, as returned by the function `left_out`.

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
            f"{tuple(teacher_features.shape)}: a regressor is needed, which maps the student's features "
            "to the teacher's shape (regressor: true), or attention_transfer, if only the numbers of channels differ."
        )
    student = widened(student_features)
    teacher = teacher_features.detach().to(student.dtype)
    entries: int | Tensor = max(student.numel(), 1)
    if left_out is not None:
        student, teacher = selected(student, left_out), selected(teacher, left_out)
        entries = left_out.expand_as(student).logical_not().sum().clamp(min=1)
    return F.mse_loss(student, teacher, reduction="sum") / entries


def attention_transfer_loss(
    student_features: Tensor, teacher_features: Tensor, *, left_out: Tensor | None = None
) -> Tensor:
    """Compute || Q(v)/||Q(v)|| - Q(u)/||Q(u)|| ||^2 averaged over samples, Q the sum of squares over channels.

    The paper writes half the distance itself; the gradient of its square, as in the authors' code, vanishes where the
    maps agree. A sample whose features are all 0 has the map 0.

    Args:
        student_features: v, of shape (N, C, ...): channels, then positions.
        teacher_features: u, of the same N and positions; C may be another.
        left_out: True at positions that don't count, where the maps are set to 0.

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
    teacher_features = teacher_features.detach()
    if left_out is not None:
        student_features, teacher_features = (selected(one, left_out) for one in (student_features, teacher_features))
    difference = _attention(student_features) - _attention(teacher_features)
    return difference.square().sum() / max(v[0], 1)


def _attention(features: Tensor) -> Tensor:
    return unit_vectors(widened(features).square().sum(1).flatten(1), dim=1)


def selected(features: Tensor, left_out: Tensor) -> Tensor:
    """Return features with 0 at positions that don't count, where they may be infinite or NaN."""
    return torch.where(left_out, 0.0, features)


def left_out(mask: Tensor, shape: Sequence[int], channel_dim: int | None) -> Tensor | None:
    """Return a mask that is True at positions of features that don't count; None if the mask has other positions.

    Its size is 1 in the dimension of the channels.

    Args:
        mask: True where a position counts.
        shape: The shape of the features.
        channel_dim: The dimension of their channels; None: the dimension without which the shape is the mask's.

    Raises:
        ValueError: Two dimensions could be that of the channels.

    Example:
        >>> mask = torch.tensor([[True, True, False]])
        >>> left_out(mask, (1, 3, 8), None).shape, left_out(mask, (1, 8, 3), None).shape, left_out(mask, (1, 8), None)
        (torch.Size([1, 3, 1]), torch.Size([1, 1, 3]), None)
    """
    n = len(shape)
    candidates = {1, n - 1} if channel_dim is None else {channel_dim % n}
    dims = [dim for dim in candidates if 0 < dim < n and tuple(mask.shape) == (*shape[:dim], *shape[dim + 1 :])]
    if len(dims) > 1:
        raise ValueError(
            f"features of shape {tuple(shape)} need channel_dim=-1 for tokens (N, T, C), or 1 for (N, C, L), to know "
            f"which of their positions the mask is for."
        )
    return ~mask.unsqueeze(dims[0]) if dims else None


def regressor(
    student_shape: Sequence[int], teacher_shape: Sequence[int], *, channel_dim: int | None = None
) -> nn.Module:
    """Make a layer that maps a student's features to the shape of its teacher's.

        channels last      a linear layer on the last dimension
        channels first     a convolution without padding, kernel (H_s - H_t + 1, W_s - W_t + 1): 1 x 1 for equal sizes

    The paper uses a convolution, because it has fewer parameters than a linear layer on the whole map. Here no
    nonlinearity follows it, so that it can match features of any sign; in the paper, that of the teacher's layer does.

    Args:
        student_shape: Shape of the student's features, with a batch dimension of any size.
        teacher_shape: Shape of the teacher's features, likewise.
        channel_dim: 1 or -1. By default 1, as in (N, D), (N, C, H, W); it must be given for 3 dimensions, where it
            distinguishes (N, C, L), 1, from (N, T, D), -1.

    Raises:
        ValueError: No such layer maps one shape to the other, or the dimension of the channels is unknown.

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
