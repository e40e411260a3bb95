"""What a search for widths has found: its decisions, the widths after them, and the same as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Literal

Unit = Literal["share", "macs", "ms"]
Counts = dict[str, int]


@dataclass(frozen=True)
class Decision:
    """One step of a search.

    Attributes:
        group: Name of the group that became narrower.
        channels: The number of channels that it has from now on.
        loss: The held-out loss after the step.
        cost: The network's cost after the step, in the unit of the search.
        candidates: By name of each group that could have become narrower the loss and the cost after that.
    """

    group: str
    channels: int
    loss: float
    cost: float
    candidates: Mapping[str, tuple[float, float]]


@dataclass
class FoundWidths:
    """What a search has found, and how.

    Attributes:
        sizes: By name of each group that can become narrower its number of channels in the full network.
        unit: Of costs: "share" of the full network's multiply-accumulates, "macs" or "ms".
        step: The share of its channels that a group lost in one step.
        loss: The full network's held-out loss.
        cost: The full network's cost.
        least: The share of its channels that each group kept at least.
        norms: How the statistics of norms were found.
        decisions: All steps, in order.
    """

    sizes: Counts
    unit: Unit
    step: float
    loss: float
    cost: float
    least: float
    norms: str
    decisions: list[Decision] = field(default_factory=list)

    @property
    def now(self) -> Decision | FoundWidths:
        """The last decision, which has the loss and cost of what is found; or the search, if there is none."""
        return self.decisions[-1] if self.decisions else self

    def counts(self, budget: float | None = None) -> Counts:
        """Return by group the number of channels after all steps, or after the first steps that meet a budget.

        Raises:
            ValueError: The search has not come as far as the budget.
        """
        counts, cost = dict(self.sizes), self.cost
        for decision in self.decisions:
            if budget is not None and cost <= budget:
                break
            counts[decision.group], cost = decision.channels, decision.cost
        if budget is not None and cost > budget:
            raise ValueError(f"The search has come to {cost:.4g} {self.unit}, which is more than {budget!r}.")
        return counts

    def widths(self, budget: float | None = None) -> dict[str, float]:
        """Return by group the width, as `set_width` and `extract` take it: see `counts`."""
        return {name: count / self.sizes[name] for name, count in self.counts(budget).items()}

    def to_json(self) -> str:
        """Return everything as JSON, from which `from_json` makes the same."""
        return json.dumps(asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> FoundWidths:
        """Return what `to_json` has written."""
        held = json.loads(text)
        for one in held["decisions"]:
            one["candidates"] = {name: tuple(pair) for name, pair in one["candidates"].items()}
        return cls(**held | {"decisions": [Decision(**one) for one in held["decisions"]]})
