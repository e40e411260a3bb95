"""What a student's outputs lack to its teacher's: s and t are the logits, or other outputs, of a sample's C classes.

    soft targets        T^2 * sum over c of p_c (log p_c - log q_c)       p = softmax(t / T), q = softmax(s / T)
    logit regression    1/2 * sum over c of (s_c - t_c)^2
    cosine              1 - s.t / (||s|| ||t||)

Each is averaged over the samples, and over the positions where an output has any, such as tokens or pixels. Outputs of
half precision are taken as float32. The gradient reaches the student alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


def soften(logits: Tensor, temperature: float, dim: int = -1) -> Tensor:
    """Return softmax(logits / T): probabilities that come closer to each other as the temperature T grows.

    Args:
        logits: A tensor of any shape; half precision becomes float32.
        temperature: T > 0.
        dim: The dimension of the classes.

    Raises:
        ValueError: The temperature is not a positive number.

    References:
        Hinton et al. 2015, "Distilling the Knowledge in a Neural Network", equation 1.

    Example:
        >>> logits = torch.tensor([100.0, 10.0, 1.0])
        >>> [round(p, 2) for p in soften(logits, 1.0).tolist()]
        [1.0, 0.0, 0.0]
        >>> [round(p, 2) for p in soften(logits, 100.0).tolist()]
        [0.56, 0.23, 0.21]
    """
    return (at_least_float32(logits) / _positive(temperature)).softmax(dim)


def soft_target_loss(
    student_logits: Tensor,
    teacher_logits: Tensor | Sequence[Tensor],
    *,
    temperature: float = 4.0,
    weights: Sequence[float] | None = None,
    class_dim: int | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Compute the soft targets' loss, T^2 * KL(p || q): summed over classes, averaged over samples and positions.

        p = sum over teachers i of w_i softmax(t_i / T)        q = softmax(s / T)

    With T^2, the gradient T (q - p) keeps its size when the temperature changes, beside a loss on labels for example.
    A class of probability p = 0 contributes 0, whatever the student says: forbidden classes may have logits of -inf.

    Args:
        student_logits: s, of shape (N, C); or with positions, such as (N, T, C) or (N, C, H, W).
        teacher_logits: t, in the same shape; a sequence of tensors is an ensemble, whose probabilities are averaged.
        temperature: T > 0.
        weights: w, one per teacher, brought to the sum 1; equal by default.
        class_dim: The dimension of C; it must be given where there are positions.
        mask: 1 or True where a position counts, in the outputs' shape without the classes. If none does, the loss is 0.

    Raises:
        ValueError: The temperature is not a positive number; there is one class only; the shapes of outputs, mask or
            weights do not fit; a weight is negative, or all are 0.

    References:
        Hinton et al. 2015, "Distilling the Knowledge in a Neural Network", section 2.

    Example:
        >>> student, teacher = torch.tensor([[2.0, 0.0, 0.0]]), torch.tensor([[0.0, 2.0, 0.0]])
        >>> round(soft_target_loss(student, teacher, temperature=1.0).item(), 3)
        1.361
        >>> round(soft_target_loss(student, [teacher, student], temperature=1.0, weights=[1.0, 3.0]).item(), 3)
        0.114
    """
    temperature = _positive(temperature)
    given = _aligned(student_logits, teacher_logits, weights, class_dim, mask)
    given.need_two_classes("The softmax of a single logit is 1 whatever it is", "take logit_regression_loss")
    log_q = (given.student / temperature).log_softmax(given.dim)
    if len(given.teachers) == 1:
        log_p = (given.teachers[0] / temperature).log_softmax(given.dim)
    else:
        log_p = given.mean([soften(logits, temperature, given.dim) for logits in given.teachers]).log()
    if given.left_out is not None:
        log_p = log_p.masked_fill_(given.left_out, -math.inf)
    p = log_p.exp()
    divergence = (log_p - log_q).mul_(p).masked_fill_(p == 0, 0.0)  # 0 * log(0 / 0) is NaN, and means 0
    return divergence.sum() * temperature**2 / given.divisor


def logit_regression_loss(
    student_logits: Tensor,
    teacher_logits: Tensor | Sequence[Tensor],
    *,
    weights: Sequence[float] | None = None,
    class_dim: int | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Compute 1/2 * sum over classes of (s - t)^2, averaged over samples and positions; t = sum over i of w_i t_i.

    Args:
        student_logits: As for `soft_target_loss`; one class, or one number to be predicted, is enough.
        teacher_logits: As for `soft_target_loss`; an ensemble's logits are averaged.
        weights: As for `soft_target_loss`.
        class_dim: As for `soft_target_loss`.
        mask: As for `soft_target_loss`.

    Raises:
        ValueError: As `soft_target_loss`.

    References:
        Ba and Caruana 2014, "Do Deep Nets Really Need to be Deep?", section 2.2.

    Example:
        >>> logit_regression_loss(torch.tensor([[1.0, 2.0], [0.0, 0.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
        tensor(1.2500)
    """
    given = _aligned(student_logits, teacher_logits, weights, class_dim, mask)
    difference = given.student - given.mean(given.teachers)
    if given.left_out is not None:
        difference = difference.masked_fill(given.left_out, 0.0)
    return difference.square().sum() / 2 / given.divisor


def cosine_loss(
    student_outputs: Tensor,
    teacher_outputs: Tensor | Sequence[Tensor],
    *,
    weights: Sequence[float] | None = None,
    class_dim: int | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Compute 1 - cos(s, t) along the classes or features, averaged over samples and positions.

    The length of the vectors does not count; one of length 0 has the cosine 0 with any other.

    Args:
        student_outputs: As for `soft_target_loss`, of any features in place of classes.
        teacher_outputs: As for `soft_target_loss`; of an ensemble, the losses are averaged.
        weights: As for `soft_target_loss`.
        class_dim: As for `soft_target_loss`.
        mask: As for `soft_target_loss`.

    Raises:
        ValueError: As `soft_target_loss`.

    Example:
        >>> teacher = torch.tensor([[5.0, 0.0], [5.0, 0.0]])
        >>> cosine_loss(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), teacher)
        tensor(0.5000)
    """
    given = _aligned(student_outputs, teacher_outputs, weights, class_dim, mask)
    given.need_two_classes("A single number has no direction", "take logit_regression_loss")
    target = given.mean([unit_vectors(outputs, given.dim) for outputs in given.teachers])
    if given.left_out is not None:
        target = target.masked_fill(given.left_out, 0.0)
    similarity = (unit_vectors(given.student, given.dim) * target).sum()
    return (given.positions - similarity) / given.divisor


def unit_vectors(values: Tensor, dim: int) -> Tensor:
    """Divide the vectors along a dimension by their length; those of length 0 stay.

    Example:
        >>> unit_vectors(torch.tensor([[3.0, 4.0], [0.0, 0.0]]), dim=1)
        tensor([[0.6000, 0.8000],
                [0.0000, 0.0000]])
    """
    values = at_least_float32(values)
    length: Tensor = torch.linalg.vector_norm(values, dim=dim, keepdim=True)
    return values / length.masked_fill(length == 0, 1.0)


def at_least_float32(values: Tensor) -> Tensor:
    """Half precision becomes float32; float32 and float64 stay."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


class _Aligned(NamedTuple):
    """Outputs that fit each other.

    Attributes:
        student: In float32 at least.
        teachers: In the student's dtype, without gradient.
        shares: The teachers' weights, of sum 1.
        dim: The dimension of the classes.
        left_out: True at masked positions, with one class; None if there is no mask.
        positions: How many positions count.
        divisor: The same, but 1 at least: what a sum over them is divided by.
    """

    student: Tensor
    teachers: list[Tensor]
    shares: list[float]
    dim: int
    left_out: Tensor | None
    positions: int | Tensor
    divisor: int | Tensor

    def mean(self, values: list[Tensor]) -> Tensor:
        """Average what stands for the teachers."""
        if len(values) == 1:
            return values[0]
        total = values[0] * self.shares[0]
        for value, share in zip(values[1:], self.shares[1:], strict=True):
            total += value * share
        return total

    def need_two_classes(self, because: str, instead: str) -> None:
        if self.student.shape[self.dim] < 2:
            raise ValueError(
                f"Outputs of shape {tuple(self.student.shape)} have {self.student.shape[self.dim]} class in dimension "
                f"{self.dim}. {because}: {instead}, or give two classes or more."
            )


def _aligned(
    student: Tensor,
    teacher: Tensor | Sequence[Tensor],
    weights: Sequence[float] | None,
    class_dim: int | None,
    mask: Tensor | None,
) -> _Aligned:
    teachers = [teacher] if isinstance(teacher, Tensor) else list(teacher)
    shares = _shares(weights, len(teachers))
    dim = _class_dim(student.shape, class_dim)
    for i, outputs in enumerate(teachers):
        if outputs.shape != student.shape:
            raise ValueError(_misfit(student.shape, outputs.shape, dim, i if len(teachers) > 1 else None))
    student = at_least_float32(student)
    teachers = [outputs.detach().to(student.dtype) for outputs in teachers]
    expected = student.shape[:dim] + student.shape[dim + 1 :]
    if mask is None:
        positions = expected.numel()
        return _Aligned(student, teachers, shares, dim, None, positions, max(positions, 1))
    if mask.shape != expected:
        raise ValueError(
            f"The mask has shape {tuple(mask.shape)}; expected {tuple(expected)}, the shape of the outputs, "
            f"{tuple(student.shape)}, without the dimension {dim} of their classes."
        )
    counts = mask.bool()
    total = counts.sum()
    return _Aligned(student, teachers, shares, dim, ~counts.unsqueeze(dim), total, total.clamp(min=1))


def _class_dim(shape: torch.Size, class_dim: int | None) -> int:
    given = f"The student's outputs have shape {tuple(shape)}"
    if len(shape) < 2:
        raise ValueError(f"{given}; expected (N, C), samples and classes, and more dimensions for positions.")
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
    if len(student) != len(teacher) or student[dim] == teacher[dim]:
        return f"{text}; both must be the same. Do both see the same batch, and is each the output that is meant?"
    return (
        f"{text}: {student[dim]} classes against {teacher[dim]}. Both must tell the same classes apart, in the same "
        "order: select the teacher's outputs for the student's classes, or learn from its features by hints instead."
    )


def _shares(weights: Sequence[float] | None, n: int) -> list[float]:
    if n == 0:
        raise ValueError("There is no teacher: expected a tensor, or a sequence of one tensor per teacher.")
    if weights is None:
        return [1 / n] * n
    given = [float(weight) for weight in weights]
    if len(given) != n:
        raise ValueError(f"weights={given} are {len(given)}, the teachers {n}: give one weight per teacher.")
    if not all(0 <= weight < math.inf for weight in given) or sum(given) == 0:
        raise ValueError(f"weights={given}: they must be finite, 0 or more, and one must be above 0.")
    return [weight / sum(given) for weight in given]


def _positive(temperature: float) -> float:
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature={temperature}: it must be a number above 0, such as 4.")
    return temperature
