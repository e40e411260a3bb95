"""Align the outputs of a student and its teachers: find the classes to compare and the positions that count.

Positions that don't count and forbidden classes are replaced before any computation. To multiply a loss by 0 afterwards
would not suffice: where a logit is infinite, 0 times its gradient is NaN.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_compress.core.precision import widened


class Aligned(NamedTuple):
    """Outputs of equal shapes, with the classes and positions to compare.

    Attributes:
        student: The student's outputs, in float32 or float64.
        teachers: The outputs of the teachers whose weight is not 0, in the student's dtype, without gradients.
        shares: The weights of these teachers, which sum to 1.
        dim: The dimension of the classes.
        left_out: A mask that is True at positions that don't count, of size 1 in the dimension of the classes.
        positions: The number of positions that count.
        divisor: The divisor of a mean over them: their number, but at least 1.
    """

    student: Tensor
    teachers: list[Tensor]
    shares: list[float]
    dim: int
    left_out: Tensor
    positions: Tensor
    divisor: Tensor

    def mean(self, values: list[Tensor]) -> Tensor:
        """Return the weighted mean of one tensor per teacher."""
        if len(values) == 1:
            return values[0]
        total = values[0] * self.shares[0]
        for value, share in zip(values[1:], self.shares[1:], strict=True):
            total += value * share
        return total

    def need_two_classes(self, because: str, instead: str) -> None:
        """Raise a ValueError, with a reason and an alternative for its message, if there is only one class."""
        if self.student.shape[self.dim] < 2:
            raise ValueError(
                f"Outputs of shape {tuple(self.student.shape)} have {self.student.shape[self.dim]} class in dimension "
                f"{self.dim}. {because}: {instead}, or give two classes or more."
            )


def align(
    student: Tensor,
    teacher: Tensor | Sequence[Tensor],
    weights: Sequence[float] | None,
    class_dim: int | None,
    mask: Tensor | None,
    *,
    forbidden: float,
    numbers: bool = False,
) -> Aligned:
    """Check and align the outputs of a student and its teachers.

    A logit of -inf, or the lowest number of its dtype, marks a class as forbidden. A position where all classes are
    forbidden does not count.

    Args:
        student: The student's outputs.
        teacher: The teacher's outputs, or a sequence with those of each teacher.
        weights: One weight per teacher; None: equal weights.
        class_dim: The dimension of the classes; None: 1, for outputs without positions.
        mask: 1 or True where a position counts; None: all count.
        forbidden: The value to write for forbidden classes. -inf: the student's forbidden classes are forbidden to its
            teachers, but not the reverse. 0.0: a class that is forbidden to one network is forbidden to all.
        numbers: Whether outputs of shape (N,) are allowed, as one number per sample.

    Raises:
        ValueError: Shapes, weights, class dimension or mask do not fit.
    """
    teachers = [teacher] if isinstance(teacher, Tensor) else list(teacher)
    shares = _shares(weights, len(teachers))
    is_numbers = numbers and student.dim() == 1
    dim = 1 if is_numbers else _class_dim(student.shape, class_dim, numbers)
    for i, outputs in enumerate(teachers):
        if outputs.shape != student.shape:
            raise ValueError(_misfit(student.shape, outputs.shape, dim, i if len(teachers) > 1 else None))
    if is_numbers:
        student, teachers = student.unsqueeze(1), [outputs.unsqueeze(1) for outputs in teachers]
    teachers = [outputs.detach() for outputs, share in zip(teachers, shares, strict=True) if share > 0]
    no_class = [_is_forbidden(outputs) for outputs in (student, *teachers)]
    if forbidden == 0.0:
        no_class = [reduce(torch.logical_or, no_class)] * len(no_class)
    else:
        no_class = [no_class[0], *(one.logical_or_(no_class[0]) for one in no_class[1:])]
    left_out = reduce(torch.logical_or, (one.all(dim, keepdim=True) for one in no_class))
    if mask is not None:
        left_out |= ~_counts(mask, student.shape, dim).unsqueeze(dim)
    student = widened(student)
    student, *teachers = (
        torch.where(left_out, 0.0, torch.where(one, forbidden, outputs.to(student.dtype)))
        for one, outputs in zip(no_class, (student, *teachers), strict=True)
    )
    positions = left_out.logical_not().sum()
    shares = [share for share in shares if share > 0]
    return Aligned(student, teachers, shares, dim, left_out, positions, positions.clamp(min=1))


def _is_forbidden(outputs: Tensor) -> Tensor:
    lowest = torch.finfo(outputs.dtype).min if outputs.is_floating_point() else -math.inf
    return outputs.detach() <= lowest


def _counts(mask: Tensor, shape: torch.Size, dim: int) -> Tensor:
    """Return a mask of booleans for outputs of a shape, after a check."""
    expected = shape[:dim] + shape[dim + 1 :]
    if mask.shape != expected:
        raise ValueError(
            f"The mask has shape {tuple(mask.shape)}; expected {tuple(expected)}, the shape of the outputs, "
            f"{tuple(shape)}, without the dimension {dim} of their classes."
        )
    return checked_mask(mask)


def checked_mask(mask: Tensor) -> Tensor:
    """Return a mask as booleans.

    Raises:
        ValueError: The mask holds other values than 0 and 1, as labels and masks that are added to logits do.

    Example:
        >>> checked_mask(torch.tensor([1.0, 0.0]))
        tensor([ True, False])
    """
    if mask.dtype == torch.bool:
        return mask
    counts = mask == 1
    other = (counts | (mask == 0)).logical_not_()
    if other.any():
        raise ValueError(
            f"The mask holds {mask[other][0].item():g}; expected 1 or True where a position counts, and 0 or False "
            f"where it doesn't. Labels with -100 for positions to be ignored give one by labels != -100; a mask of 0 "
            f"and -inf, which is added to logits, by mask == 0."
        )
    return counts


def named_mask(kwargs: Mapping[str, Any], name: str) -> Tensor | None:
    """Return the mask with that name from the keyword arguments of a network's call; None if it is None.

    Raises:
        ValueError: No argument has that name, or it is not a mask.
    """
    if name not in kwargs:
        raise ValueError(
            f"mask={name!r} is no keyword argument that the network was called with, which are: "
            f"{', '.join(kwargs) or 'none'}. Pass it by its name."
        )
    given = kwargs[name]
    if given is not None and not isinstance(given, Tensor):
        raise ValueError(f"mask={name!r} is a {type(given).__name__}; expected a tensor, or None.")
    try:
        return None if given is None else checked_mask(given)
    except ValueError as error:
        raise ValueError(f"mask={name!r}: {error}") from error


def _class_dim(shape: torch.Size, class_dim: int | None, numbers: bool) -> int:
    given = f"The student's outputs have shape {tuple(shape)}"
    if len(shape) < 2:
        instead = "" if numbers or len(shape) == 0 else " One number per sample is compared by logit_regression_loss."
        raise ValueError(f"{given}; expected (N, C), samples and classes, and more dimensions for positions.{instead}")
    if class_dim is None:
        if len(shape) > 2:
            raise ValueError(
                f"{given}, and which dimension holds the classes is unknown. Give class_dim=-1 for tokens (N, T, C), "
                "class_dim=1 for pixels (N, C, H, W)."
            )
        return 1
    dim = class_dim + len(shape) if class_dim < 0 else class_dim
    if not 1 <= dim < len(shape):
        raise ValueError(
            f"{given}, where class_dim={class_dim} cannot hold the classes: expected 1 to {len(shape) - 1}, or -1."
        )
    return dim


def _misfit(student: torch.Size, teacher: torch.Size, dim: int, number: int | None) -> str:
    whose = "the teacher's" if number is None else f"those of teacher {number}"
    text = f"The student's outputs have shape {tuple(student)}, {whose} {tuple(teacher)}"
    if len(student) != len(teacher) or student[dim : dim + 1] == teacher[dim : dim + 1]:
        return f"{text}; both must be the same. Pass both the same batch, and choose the output to compare by output=."
    return (
        f"{text}: {student[dim]} classes against {teacher[dim]}. Both need the same classes in the same order: "
        "select the teacher's outputs for the student's classes, or learn from its features by hints instead."
    )


def _shares(weights: Sequence[float] | None, n: int) -> list[float]:
    if n == 0:
        raise ValueError("There is no teacher: expected a tensor, or a sequence of one tensor per teacher.")
    if weights is None:
        return [1 / n] * n
    given = [float(weight) for weight in weights]
    if len(given) != n:
        raise ValueError(f"weights={given} has {len(given)} entries for {n} teachers: give one weight per teacher.")
    if not all(0 <= weight < math.inf for weight in given) or sum(given) == 0:
        raise ValueError(f"weights={given}: they must be finite, 0 or more, and one must be above 0.")
    return [weight / sum(given) for weight in given]
