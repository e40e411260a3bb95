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
        baseline: The dense network's metric; by default that of the network that the fit begins with, validated before
            the first step, or of a dense one that was better in a validation before `start_epoch`.
        recovery: How many more validations an amount gets, during which nothing is pruned, before its failure counts.

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
    recovery: int = 1

    def __post_init__(self) -> None:
        if not self.max_drop >= 0:
            raise ValueError(f"stop's max_drop is how much worse the metric may get, 0 or more; got {self.max_drop!r}.")
        if self.mode not in ("max", "min"):
            raise ValueError(f"stop's mode must be 'max' or 'min'; got {self.mode!r}.")
        if isinstance(self.recovery, bool) or not isinstance(self.recovery, int) or self.recovery < 0:
            raise ValueError(f"stop's recovery is a number of validations, 0 or more; got {self.recovery!r}.")

    @classmethod
    def from_dict(cls, options: Mapping[str, Any]) -> StopRule:
        """Build the rule from the mapping a user writes.

        Raises:
            ValueError: A key is unknown or missing, or a value is out of range.
        """
        known = {"monitor", "max_drop", "mode", "baseline", "recovery"}
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


Verdict = Literal["better", "as good", "recovering", "failed"]


class StopState:
    """Follows a `StopRule` through a fit: what the dense network reached, and the newest state that kept it.

    Args:
        rule: When the network is still good enough.
    """

    def __init__(self, rule: StopRule) -> None:
        self.rule = rule
        self.baseline = rule.baseline
        self.kept: dict[str, Any] | None = None
        self.kept_amount = 0.0
        self.awaits_validation = False
        self.failures = 0  # validations in a row, at the present amount

    def judge(self, value: float, amount: float) -> Verdict:
        """Judge the network that was validated with `amount` removed.

        Raises:
            ValueError: The metric is NaN.

        Returns:
            "failed" when the metric dropped too far and stayed there, "recovering" while it may still come back,
            "better" when it held at a larger amount than ever before, or is that of a better dense network, else
            "as good".
        """
        if math.isnan(value):
            raise ValueError(f"stop monitors {self.rule.monitor!r}, which is NaN: the training has diverged.")
        if amount == 0.0 and self.rule.baseline is None and self._is_record(value):
            self.baseline = value
            self.awaits_validation, self.failures = False, 0
            return "better"
        assert self.baseline is not None, "the network that came in is judged before anything is pruned"
        if not self.rule.satisfied(value, baseline=self.baseline):
            self.failures += 1
            recovers = amount > self.kept_amount and self.failures <= self.rule.recovery
            self.awaits_validation = recovers
            return "recovering" if recovers else "failed"
        grew = amount > self.kept_amount
        self.kept_amount = amount
        self.awaits_validation, self.failures = False, 0
        return "better" if grew else "as good"

    def pruned(self) -> None:
        """Note that more has been removed: what is there has not been judged."""
        self.awaits_validation, self.failures = True, 0

    def must_go_back(self, amount: float) -> bool:
        """Whether the network at the end of a fit is not known to have kept the metric, and an earlier one is."""
        unknown = self.awaits_validation and amount > self.kept_amount
        return self.kept is not None and (self.failures > 0 or unknown)

    def _is_record(self, value: float) -> bool:
        if self.baseline is None:
            return True
        return value > self.baseline if self.rule.mode == "max" else value < self.baseline

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resume needs."""
        return {key: value for key, value in vars(self).items() if key != "rule"}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take what `state_dict` returned."""
        vars(self).update(state)
