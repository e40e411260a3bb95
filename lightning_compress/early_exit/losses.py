"""Losses of exits: what they learn from the full network, and how much of their gradients reaches the layers before."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def soft_targets(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Return T^2 KL(softmax(teacher / T) || softmax(student / T)), averaged over samples and positions.

    Example:
        >>> soft_targets(torch.zeros(2, 3), torch.zeros(2, 3), 4.0).item()
        0.0
    """
    log_student = F.log_softmax(student.float() / temperature, -1).flatten(0, -2)
    log_teacher = F.log_softmax(teacher.float() / temperature, -1).flatten(0, -2)
    return temperature**2 * F.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True)


class _ScaledGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient * ctx.scale, None


def scale_gradient(x: Tensor, scale: float) -> Tensor:
    """Return x, whose gradient is multiplied by `scale` on its way back.

    Paper:
        Li et al., Improved techniques for training adaptive deep networks (1908.06294), section 3.1.

    Example:
        >>> x = torch.ones(2, requires_grad=True)
        >>> scale_gradient(x, 0.25).sum().backward(); x.grad
        tensor([0.2500, 0.2500])
    """
    scaled: Tensor = _ScaledGradient.apply(x, scale)  # type: ignore[no-untyped-call]
    return scaled
