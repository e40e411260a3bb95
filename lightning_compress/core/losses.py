"""Losses between a student and its teacher: s and t are their logits, or other outputs, for a sample's C classes.

    soft targets        T^2 * sum over c of p_c (log p_c - log q_c)       p = softmax(t / T), q = softmax(s / T)
    logit regression    1/2 * sum over c of (s_c - t_c)^2
    cosine              1 - s.t / (||s|| ||t||)

Each loss is averaged over the samples, and over positions such as tokens or pixels where outputs have them. Outputs in
half precision are converted to float32. Only the student gets a gradient.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_compress.core.aligned import align
from lightning_compress.core.precision import widened


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
    return (widened(logits) / _positive(temperature)).softmax(dim)


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

    With T^2, the gradient T (q - p) keeps its size when the temperature changes, so that its ratio to that of a loss on
    labels stays. A class with p = 0 contributes 0, whatever the student's output. A logit of -inf, or the lowest number
    of its dtype, marks a forbidden class. Classes forbidden to the student are forbidden to its teachers, whose
    probabilities are spread over the others. A position where all classes are forbidden does not count.

    Args:
        student_logits: s, of shape (N, C); or with positions, such as (N, T, C) or (N, C, H, W).
        teacher_logits: t, in the same shape; a sequence of tensors is an ensemble, whose probabilities are averaged.
        temperature: T > 0.
        weights: w, one per teacher, scaled to the sum 1; equal by default.
        class_dim: The dimension of C; it must be given where there are positions.
        mask: 1 or True where a position counts, 0 or False where it does not, such as padding; of the outputs' shape
            without the classes. Outputs at masked positions are not used. If no position counts, the loss is 0.

    Raises:
        ValueError: The temperature is not a positive number; there is one class only; the shapes of outputs, mask or
            weights do not fit; a mask has other values, as labels with -100; a weight is negative, or all are 0.

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
    given = align(student_logits, teacher_logits, weights, class_dim, mask, forbidden=-math.inf)
    given.need_two_classes("The softmax of a single logit is always 1", "take logit_regression_loss")
    log_q = (given.student / temperature).log_softmax(given.dim)
    if len(given.teachers) == 1:
        log_p = (given.teachers[0] / temperature).log_softmax(given.dim)
    else:
        log_p = given.mean([soften(logits, temperature, given.dim) for logits in given.teachers]).log()
    p = log_p.exp()
    nothing = (p == 0).logical_or_(given.left_out)
    divergence = (log_p - log_q).mul_(p).masked_fill_(nothing, 0.0)  # 0 * log(0 / 0) is NaN, and counts as 0
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

    Classes that are forbidden to one network, with a logit of -inf or the lowest number of its dtype, are left out.

    Args:
        student_logits: As for `soft_target_loss`, but one class, or one predicted number, is enough; its shape may
            then be (N,).
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
    given = align(student_logits, teacher_logits, weights, class_dim, mask, forbidden=0.0, numbers=True)
    difference = given.student - given.mean(given.teachers)
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

    The length of the vectors does not matter; a vector of length 0 has the cosine 0 with any other. Classes that are
    forbidden to one network, with a logit of -inf or the lowest number of its dtype, are left out.

    Args:
        student_outputs: As for `soft_target_loss`, but classes may be any features.
        teacher_outputs: As for `soft_target_loss`; for an ensemble, the losses are averaged.
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
    given = align(student_outputs, teacher_outputs, weights, class_dim, mask, forbidden=0.0)
    given.need_two_classes("A single number has no direction", "take logit_regression_loss")
    target = given.mean([unit_vectors(outputs, given.dim) for outputs in given.teachers])
    similarity = (unit_vectors(given.student, given.dim) * target).sum()
    return (given.positions - similarity) / given.divisor


def unit_vectors(values: Tensor, dim: int) -> Tensor:
    """Divide the vectors along a dimension by their length; vectors of length 0 stay 0.

    Example:
        >>> unit_vectors(torch.tensor([[3.0, 4.0], [0.0, 0.0]]), dim=1)
        tensor([[0.6000, 0.8000],
                [0.0000, 0.0000]])
    """
    values = widened(values)
    length: Tensor = torch.linalg.vector_norm(values, dim=dim, keepdim=True)
    return values / length.masked_fill(length == 0, 1.0)


def _positive(temperature: float) -> float:
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature={temperature}: it must be a number above 0, such as 4.")
    return temperature
