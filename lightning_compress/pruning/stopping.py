"""The rule behind `stop=`: when the network is still good enough to prune on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_compress.core.given import real_number, whole_number


@dataclass(frozen=True, kw_only=True)
class StopRule:
    """Allows more pruning while the monitored metric stays within `max_drop` of the dense network's.

    Args:
        monitor: Name of a metric that the LightningModule logs in validation.
        max_drop: Largest difference by which the metric may be worse than the dense network's.
        mode: Whether the metric is better when it is larger ("max") or smaller ("min").
        baseline: The dense network's metric; by default that of the network that the fit begins with, validated before
            the first step, or of a dense network that was better in a validation before `start_epoch`.
        recovery: Number of further validations that an amount gets, with no pruning in between, before its failure
            counts.

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
        real_number(self.max_drop, "stop's max_drop is how much worse the metric may get, 0 or more", least=0)
        if self.baseline is not None:
            real_number(self.baseline, "stop's baseline is the dense network's metric, a number, or None")
        if self.mode not in ("max", "min"):
            raise ValueError(f"stop's mode must be 'max' or 'min'; got {self.mode!r}.")
        whole_number(self.recovery, "stop's recovery is a number of validations, 0 or more", least=0)

    @classmethod
    def from_dict(cls, options: Mapping[str, Any]) -> StopRule:
        """Return the rule for the mapping that a user writes.

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
            ValueError: Validation has not logged it.
        """
        if self.monitor not in metrics:
            raise ValueError(
                f"stop monitors {self.monitor!r}, which validation did not log; it logged {sorted(metrics)}."
            )
        return torch.as_tensor(metrics[self.monitor], dtype=torch.float64)
