"""One budget for many layers: which of its options each layer takes.

The loss of a layer is - log(1 - e), where e is the share of its outputs' variance that is lost, so that the sum over
the layers is minus the log of the product of what they keep (Zhang et al. 2016). On the lower convex hull of a layer's
options each step saves less cost per loss than the step before; so taking the best step of all layers again and again,
down to the budget, is optimal for each cost that it meets: all layers stop at one water level.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

DENSE = "dense"


@dataclass(frozen=True)
class Option:
    """One way to compute a layer.

    Attributes:
        form: The name of the form, or "dense": the layer as it is.
        numbers: The form's ranks.
        cost: Parameters, multiply-accumulates or seconds.
        lost: The share of the variance of the layer's outputs that it loses, 0 to 1.
    """

    form: str
    numbers: tuple[int, ...]
    cost: float
    lost: float

    @property
    def loss(self) -> float:
        """What the layer adds to the loss of the network."""
        return -math.log1p(-min(self.lost, 1 - 1e-12))


def hull(options: Sequence[Option]) -> list[Option]:
    """Return the lower convex hull of a layer's options over cost and loss, from the most expensive to the cheapest.

    Example:
        >>> options = [Option("dense", (), 9, 0.0), Option("a", (3,), 6, 0.3), Option("a", (2,), 4, 0.31)]
        >>> options += [Option("b", (9,), 10, 0.4)]
        >>> [option.cost for option in hull(options)]
        [9, 4]
    """
    found: list[Option] = []
    for option in sorted(options, key=lambda one: (-one.cost, one.loss)):
        if found and option.cost == found[-1].cost:
            continue
        while found and option.loss <= found[-1].loss:
            found.pop()
        while len(found) > 1 and _slope(found[-1], option) <= _slope(found[-2], found[-1]):
            found.pop()
        found.append(option)
    return found


def _slope(high: Option, low: Option) -> float:
    """Return the loss for each unit of cost that is saved."""
    return (low.loss - high.loss) / (high.cost - low.cost)


class BudgetError(ValueError):
    """A budget that can't be met.

    Attributes:
        least: The least cost that is possible.
    """

    def __init__(self, least: float, budget: float) -> None:
        super().__init__(f"a cost of {budget:g} can't be met: the least possible is {least:g}.")
        self.least = least


def spend(layers: Mapping[str, Sequence[Option]], budget: float) -> dict[str, Option]:
    """Return an option for each layer: together they cost at most the budget and lose as little as they can.

    Args:
        layers: The options of each layer.
        budget: The most that they may cost together.

    Raises:
        BudgetError: The cheapest options cost more.

    Example:
        >>> easy = [Option("dense", (), 10, 0.0), Option("a", (2,), 6, 0.01), Option("a", (1,), 3, 0.1)]
        >>> hard = [Option("dense", (), 10, 0.0), Option("a", (2,), 6, 0.3), Option("a", (1,), 3, 0.6)]
        >>> {name: option.cost for name, option in spend({"easy": easy, "hard": hard}, 13).items()}
        {'easy': 3, 'hard': 10}
    """
    hulls = {name: hull(options) for name, options in layers.items()}
    least = sum(steps[-1].cost for steps in hulls.values())
    if least > budget * (1 + 1e-12):
        raise BudgetError(least, budget)
    at = dict.fromkeys(hulls, 0)
    cost = sum(steps[0].cost for steps in hulls.values())
    queue = [(_slope(steps[0], steps[1]), name) for name, steps in hulls.items() if len(steps) > 1]
    heapq.heapify(queue)
    while cost > budget and queue:
        _, name = heapq.heappop(queue)
        steps, at[name] = hulls[name], at[name] + 1
        cost += steps[at[name]].cost - steps[at[name] - 1].cost
        if at[name] + 1 < len(steps):
            heapq.heappush(queue, (_slope(steps[at[name]], steps[at[name] + 1]), name))
    return _spend_rest(layers, {name: steps[at[name]] for name, steps in hulls.items()}, budget)


def _spend_rest(layers: Mapping[str, Sequence[Option]], chosen: dict[str, Option], budget: float) -> dict[str, Option]:
    """Spend what the last step has left over on the options that gain most, one layer after the other."""
    while True:
        rest = budget - sum(option.cost for option in chosen.values())
        better = [
            (_slope(option, chosen[name]) if option.cost > chosen[name].cost else math.inf, name, option)
            for name, options in layers.items()
            for option in options
            if option.loss < chosen[name].loss and option.cost - chosen[name].cost <= rest
        ]
        if not better:
            return chosen
        _, name, option = max(better, key=lambda one: one[0])
        chosen[name] = option


def rank_grid(most: int) -> list[int]:
    """Return the ranks that are considered: all up to 64, then multiples of 8, then of 64.

    Example:
        >>> rank_grid(3), rank_grid(90)[-4:], rank_grid(600)[-3:]
        ([1, 2, 3], [72, 80, 88, 90], [512, 576, 600])
    """
    ranks = [r for r in range(1, most + 1) if r <= 64 or (r <= 512 and r % 8 == 0) or r % 64 == 0]
    return ranks if not ranks or ranks[-1] == most else [*ranks, most]
