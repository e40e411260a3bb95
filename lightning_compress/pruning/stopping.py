"""Prune until the metric drops: what `stop=` decides."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class StopRule:
    """Keeps pruning while the monitored metric stays within `max_drop` of the dense network's.

    Args:
        monitor: A metric that the LightningModule logs in validation.
        max_drop: How much worse than the dense network the metric may become, in the metric's own unit.
        mode: Whether the metric is better when it is larger ("max") or smaller ("min").
        baseline: The dense network's metric; by default the one of the last validation before the first pruning.

    Raises:
        ValueError: A value is out of range.

    Example:
        >>> rule = StopRule(monitor="val_acc", max_drop=0.01)
        >>> rule.satisfied(0.975, baseline=0.98), rule.satisfied(0.965, baseline=0.98)
        (True, False)
    """

    monitor: str
    max_drop: float
    mode: Literal["max", "min"] = "max"
    baseline: float | None = None

    def __post_init__(self) -> None:
        if not self.max_drop >= 0:
            raise ValueError(f"stop's max_drop is how much worse the metric may get, 0 or more; got {self.max_drop!r}.")
        if self.mode not in ("max", "min"):
            raise ValueError(f"stop's mode must be 'max' or 'min'; got {self.mode!r}.")

    @classmethod
    def from_dict(cls, options: Mapping[str, Any]) -> StopRule:
        """Build the rule from the mapping a user writes.

        Raises:
            ValueError: A key is unknown or missing, or a value is out of range.
        """
        known = {"monitor", "max_drop", "mode", "baseline"}
        if unknown := set(options) - known:
            raise ValueError(f"stop has unknown keys {sorted(unknown)}; it takes {sorted(known)}.")
        if missing := {"monitor", "max_drop"} - set(options):
            raise ValueError(f"stop={dict(options)!r} lacks {sorted(missing)}.")
        return cls(**options)

    def satisfied(self, value: float, *, baseline: float) -> bool:
        """Whether `value` is at most `max_drop` worse than `baseline`."""
        drop = baseline - value if self.mode == "max" else value - baseline
        return drop <= self.max_drop

    def read(self, metrics: Mapping[str, Tensor]) -> Tensor:
        """Return the monitored metric.

        Raises:
            ValueError: It was not logged.
        """
        if self.monitor not in metrics:
            raise ValueError(
                f"stop monitors {self.monitor!r}, which validation did not log; it logged {sorted(metrics)}."
            )
        return torch.as_tensor(metrics[self.monitor], dtype=torch.float64)


class StopWatch:
    """Follows a `StopRule` through a fit: what the dense network reached, and the newest state that kept it.

    Args:
        rule: When the network is still good enough.
    """

    def __init__(self, rule: StopRule) -> None:
        self.rule = rule
        self.baseline = rule.baseline
        self.kept: dict[str, Any] | None = None
        self.kept_amount = 0.0
        self.awaits_validation = rule.baseline is None  # nothing goes before it is known how good the dense network is
        self.last_failed = False

    def judge(self, value: float, amount: float) -> Literal["better", "as good", "failed"]:
        """Judge the network that was validated with `amount` removed.

        Raises:
            ValueError: The metric is NaN.

        Returns:
            "failed" when the metric dropped too far, "better" when it held at a larger amount than ever before, else
            "as good".
        """
        if math.isnan(value):
            raise ValueError(f"stop monitors {self.rule.monitor!r}, which is NaN: the training has diverged.")
        self.awaits_validation = False
        if amount == 0.0 and self.rule.baseline is None:
            self.baseline = value
        assert self.baseline is not None
        self.last_failed = not self.rule.satisfied(value, baseline=self.baseline)
        if self.last_failed:
            return "failed"
        grew = amount > self.kept_amount
        self.kept_amount = amount
        return "better" if grew else "as good"

    def must_go_back(self, amount: float) -> bool:
        """Whether the network at the end of a fit is not known to have kept the metric, and an earlier one is."""
        unknown = self.awaits_validation and amount > self.kept_amount
        return self.kept is not None and (self.last_failed or unknown)

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resume needs."""
        return {key: value for key, value in vars(self).items() if key != "rule"}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take what `state_dict` returned."""
        vars(self).update(state)
