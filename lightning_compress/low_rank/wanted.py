"""What a user wants of low rank: how much, counted in which unit, and in which forms."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import get_args

from lightning_compress.core.given import real_number, whole_number
from lightning_compress.low_rank.costs import Cost
from lightning_compress.low_rank.sites import METHODS, Method

DEFAULT_BUDGET = 0.5


@dataclass(frozen=True)
class Wanted:
    """How much of the layers is wanted, by exactly one of three ways, after all checks.

    Attributes:
        rank: The rank of every layer, or of those that a pattern names.
        energy: The share of the variance of each layer's outputs that stays.
        budget: The share of the network's cost that stays; half of it where none of the three is given.
        cost: The unit of a cost.
        method: The form of convolutions.

    Raises:
        ValueError: One is out of range, or more than one is given.
    """

    rank: int | Mapping[str, int] | None = None
    energy: float | None = None
    budget: float | None = None
    cost: Cost = "parameters"
    method: Method = "auto"

    def __post_init__(self) -> None:
        given = [name for name in ("rank", "energy", "budget") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"Pass one of rank, energy and budget; got {' and '.join(given)}.")
        ranks = self.rank.values() if isinstance(self.rank, Mapping) else [self.rank]
        for one in ranks if self.rank is not None else ():
            whole_number(one, "rank is a whole number, 1 or more, or one for each pattern", least=1)
        if self.rank == {}:
            raise ValueError("rank={} names no layer: pass a rank, or one for each pattern.")
        if self.energy is not None:
            real_number(self.energy, "energy is the share of the variance that stays, above 0 to 1", above=0, most=1)
        if self.budget is not None:
            real_number(self.budget, "budget is the share of the cost that stays, above 0 to 1", above=0, most=1)
        for name, allowed in (("cost", get_args(Cost)), ("method", METHODS)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}; got {getattr(self, name)!r}.")
        if not given:
            object.__setattr__(self, "budget", DEFAULT_BUDGET)
