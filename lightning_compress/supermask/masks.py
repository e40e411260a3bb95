"""Masks from scores, and the gradients of the scores.

    edge_popup   m = 1 for the k largest |s| of a layer, else 0            dL/ds = dL/dW w sign(s)
    signed       m = sign(s) for the k largest |s| of a layer, else 0      dL/ds = dL/dW w
    bernoulli    m ~ Bernoulli(p), p = sigmoid(GAIN s)                     dL/ds = dL/dW w GAIN p (1 - p)

W = w m are the weights that the network computes with, and w never changes. The gradients are straight-through: every
entry gets one, whether it remains or not.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor

from lightning_compress.core.keep_largest import keep_largest

Method = Literal["edge_popup", "bernoulli", "signed"]
GAIN = 30.0  # with it SGD's learning rate 0.1 acts as 90 on logits, and Adam's 0.001 as 0.03


def check_method(method: str) -> None:
    """Raise a ValueError for an unknown method."""
    if method not in get_args(Method):
        raise ValueError(f"method={method!r} is unknown; expected one of {', '.join(map(repr, get_args(Method)))}.")


def entries_kept(amount: float, count: int) -> int:
    """Return how many of the entries remain when a fraction is removed: at least one.

    Example:
        >>> entries_kept(0.96, 1000), entries_kept(0.999, 10)
        (40, 1)
    """
    return min(count, max(1, round((1 - amount) * count)))


def first_scores(
    method: Method, like: Tensor, *, amount: float, fan_in: int, generator: torch.Generator | None = None
) -> Tensor:
    """Return the scores before training: uniform as Kaiming's, or the logit of 1 - amount for all entries.

    Args:
        method: The method.
        like: The weight.
        amount: The fraction of the entries to remove.
        fan_in: The number of inputs of an output of the layer.
        generator: A CPU generator, or None for torch's own.
    """
    if method == "bernoulli":
        return torch.full_like(like, math.log((1 - amount) / amount) / GAIN)
    drawn = torch.rand(like.shape, dtype=torch.float32, generator=generator).mul_(2).sub_(1)
    return drawn.mul_(fan_in**-0.5).to(like)


def largest(scores: Tensor, kept: int, *, signs: bool, alive: Tensor | None = None) -> Tensor:
    """Return the int8 mask of the `kept` largest |scores|: 1, or the sign of the score if `signs`; 0 elsewhere.

    Args:
        scores: The scores of a layer.
        kept: How many entries remain.
        signs: Whether entries may be inverted.
        alive: False where an entry can't remain.

    Example:
        >>> largest(torch.tensor([0.3, -0.9, 0.1, 0.5]), 2, signs=True)
        tensor([ 0, -1,  0,  1], dtype=torch.int8)
    """
    dead = 0 if alive is None else int(alive.numel() - alive.count_nonzero())
    drop = max(scores.numel() - kept, dead)
    (mask,) = keep_largest([scores], drop, absolute=True, alive=[alive])
    return mask.to(torch.int8).mul_(torch.where(scores < 0, -1, 1)) if signs else mask.to(torch.int8)


def same_sign(initial: Tensor, trained: Tensor, kept: int) -> Tensor:
    """Return the mask of the largest trained weights among those that kept their initial sign, for no training at all.

    With signed constants as weights, this is the best supermask without training of Zhou et al. 2019, section 5.

    Args:
        initial: The weights before a training of the whole network.
        trained: The same weights after it.
        kept: How many entries remain, at most.

    Example:
        >>> same_sign(torch.tensor([0.1, -0.1, 0.1]), torch.tensor([0.3, 0.9, 0.2]), 1)
        tensor([1, 0, 0], dtype=torch.int8)
    """
    agree = trained.sign() == initial.sign()
    return largest(trained, min(kept, int(agree.count_nonzero())), signs=False, alive=agree)


def probabilities(scores: Tensor) -> Tensor:
    """Return the probability that each entry remains, in float32 or float64."""
    wide = scores if scores.dtype == torch.float64 else scores.float()
    return torch.sigmoid(wide * GAIN)


def sampled(scores: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Return a random int8 mask in which every entry remains with its own probability.

    Args:
        scores: The scores of a layer.
        generator: A CPU generator, or None for torch's own. The numbers are drawn on the CPU, so that they are the
            same on every device.
    """
    return below(scores, torch.rand(scores.shape, dtype=torch.float32, generator=generator).to(scores.device))


def below(scores: Tensor, thresholds: Tensor) -> Tensor:
    """Return the int8 mask of the entries whose probability is above their threshold: 1, or 0 elsewhere.

    With thresholds that are drawn once, evenly from 0 to 1, this is one sample that changes only with the scores.

    Example:
        >>> below(torch.tensor([0.1, -0.1]), torch.tensor([0.5, 0.5]))
        tensor([1, 0], dtype=torch.int8)
    """
    return (thresholds < probabilities(scores)).to(torch.int8)


def score_gradient_(method: Method, gradient: Tensor, weights: Tensor, scores: Tensor) -> None:
    """Turn the gradient with respect to the masked weights into the scores' gradient, in place."""
    gradient.mul_(weights)
    if method == "edge_popup":
        gradient.mul_(torch.where(scores < 0, -1, 1).to(gradient))
    elif method == "bernoulli":
        chances = probabilities(scores)
        gradient.mul_((chances * (1 - chances)).mul_(GAIN).to(gradient))
