"""Criteria that compare a weight w_f with w_i, its value at an earlier moment such as the fit's start:

    small_final                 -|w_f|
    large_init                  |w_i|
    small_init                  -|w_i|
    large_init_large_final      min(a |w_f|, |w_i|)
    small_init_small_final      -max(a |w_f|, |w_i|)
    magnitude_increase          |w_f| - |w_i|
    movement                    |w_f - w_i|
    *_same_sign                 the score where w_i and w_f have the same sign, else 0
    *_diff_sign                 the score where they have not, else 0

Large final is `magnitude`. The factor a makes the two cuts equally deep: of the weights that are alive, as many have a
larger |w_f| than the cut as have a larger |w_i|. So it follows from the amount, and needs no search: an entry is worth
the smaller of its two ranks. Equal scores, such as the zeros of the other sign, are ordered at random.

Zhou et al. 2019, "Deconstructing Lottery Tickets: Zeros, Signs, and the Supermask", section 2.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from lightning_compress.pruning.channels import Channels, channel_sums

_Formula = Callable[[Tensor, Tensor], Tensor]  # of w_i and w_f


def _increase(start: Tensor, now: Tensor) -> Tensor:
    return now.abs() - start.abs()


def _same_sign(formula: _Formula) -> _Formula:
    return lambda start, now: torch.where(start.sign() == now.sign(), formula(start, now), 0.0)


def _diff_sign(formula: _Formula) -> _Formula:
    return lambda start, now: torch.where(start.sign() != now.sign(), formula(start, now), 0.0)


_FORMULAS: dict[str, _Formula] = {
    "small_final": lambda start, now: -now.abs(),
    "large_init": lambda start, now: start.abs(),
    "small_init": lambda start, now: -start.abs(),
    "magnitude_increase": _increase,
    "movement": lambda start, now: (now - start).abs(),
    "magnitude_increase_same_sign": _same_sign(_increase),
    "magnitude_increase_diff_sign": _diff_sign(_increase),
    "large_final_same_sign": _same_sign(lambda start, now: now.abs()),
    "large_final_diff_sign": _diff_sign(lambda start, now: now.abs()),
}
BY_TWO_RANKS: dict[str, float] = {"large_init_large_final": 1.0, "small_init_small_final": -1.0}
FROM_START = (*_FORMULAS, *BY_TWO_RANKS)
NEEDS_CHANGE = ("magnitude_increase", "movement", *(name for name in FROM_START if name.endswith("_sign")))


def compared(criterion: str, start: Tensor, now: Tensor) -> Tensor:
    """Score weights by one of the formulas that take each entry by itself.

    Args:
        criterion: The criterion's name.
        start: The weights at the earlier moment, w_i.
        now: The weights, w_f.

    Example:
        >>> start, now = torch.tensor([1.0, -2.0, 3.0]), torch.tensor([2.0, 4.0, 1.0])
        >>> compared("magnitude_increase", start, now), compared("large_final_same_sign", start, now)
        (tensor([ 1.,  2., -2.]), tensor([2., 0., 1.]))
    """
    return _FORMULAS[criterion](start.detach(), now.detach())


def scores_from_start(
    criterion: str,
    weights: Mapping[str, Tensor],
    start: Mapping[str, Tensor],
    *,
    generator: torch.Generator,
    scope: str = "global",
    alive: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Return the order of weights by a criterion of this module as numbers, of which no two are equal.

    Args:
        criterion: The criterion's name.
        weights: The weights, w_f, by name.
        start: The weights at the earlier moment, w_i, by the same names.
        generator: The CPU generator that orders equal scores.
        scope: "global" compares all entries, "layer" those of one tensor.
        alive: Masks (True stays) of the entries among which the cuts of two ranks are equally deep.

    Raises:
        ValueError: A score is NaN, or the criterion compares with an earlier moment and no weight has changed since.

    Example:
        >>> start = {"w": torch.tensor([1.0, 4.0, 3.0, 2.0])}
        >>> now = {"w": torch.tensor([40.0, 10.0, 30.0, 20.0])}
        >>> scores_from_start("large_init_large_final", now, start, generator=torch.Generator())["w"].argmax().item()
        2
    """
    if criterion in NEEDS_CHANGE and all(torch.equal(weight, start[name]) for name, weight in weights.items()):
        raise ValueError(
            f"criterion={criterion!r} compares weights with those of an earlier moment, and none has changed since: "
            "training steps must come before the first pruning (start_epoch > 0, or no pretrained=True)."
        )
    groups = [list(weights)] if scope == "global" else [[name] for name in weights]
    found: dict[str, Tensor] = {}
    for names in groups:
        now, before = [weights[name].detach() for name in names], [start[name] for name in names]
        if criterion in BY_TWO_RANKS:
            sign = BY_TWO_RANKS[criterion]
            living = None if alive is None else [alive[name] for name in names]
            ranks = [_ranks([sign * one.abs() for one in side], names, generator, living) for side in (now, before)]
            scores = [torch.minimum(final, initial) for final, initial in zip(*ranks, strict=True)]
        else:
            scores = [compared(criterion, one, other) for one, other in zip(before, now, strict=True)]
        found |= dict(zip(names, _ranks(scores, names, generator), strict=True))
    return found


def channel_scores_from_start(
    criterion: str, weights: Mapping[str, Tensor], start: Mapping[str, Tensor], channels: Sequence[Channels]
) -> dict[str, Tensor]:
    """Return the scores of channels, by the criteria that take each weight by itself: sums over their weights."""
    return {
        group.name: torch.stack(
            [channel_sums(compared(criterion, start[one.tensor], weights[one.tensor]), one) for one in group.weights]
        ).sum(0)
        for group in channels
    }


def _ranks(
    scores: Sequence[Tensor],
    names: Sequence[str],
    generator: torch.Generator,
    alive: Sequence[Tensor] | None = None,
) -> list[Tensor]:
    """Return the place of every entry among all, from 0; equal ones are in random order, dead ones come first."""
    for name, score in zip(names, scores, strict=True):
        if bool(score.isnan().any()):
            raise ValueError(f"Scores are NaN: {name}. Look for a diverged loss or gradient.")
    if alive is not None:
        scores = [
            score.masked_fill(~one.to(score.device), -torch.inf) for score, one in zip(scores, alive, strict=True)
        ]
    flat = torch.cat([score.flatten() for score in scores])
    shuffled = torch.randperm(flat.numel(), generator=generator).to(flat.device)
    order = shuffled[(flat[shuffled] + 0.0).argsort(stable=True)]  # -0.0 + 0.0 is 0.0
    dtype = torch.float32 if flat.numel() <= 2**24 else torch.float64  # all places are exact numbers
    places = torch.empty(flat.numel(), dtype=dtype, device=flat.device)
    places[order] = torch.arange(flat.numel(), dtype=dtype, device=flat.device)
    parts = torch.split(places, [score.numel() for score in scores])
    return [part.view(score.shape) for part, score in zip(parts, scores, strict=True)]
