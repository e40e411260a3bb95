"""The metric of a report: its name, its unit, and the direction in which it gets better."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, get_args

Mode = Literal["max", "min"]

SHARES = frozenset(["acc", "accuracy", "f1", "precision", "recall", "auc", "auroc", "iou", "dice", "top1", "top5"])
LOSSES = frozenset(["loss", "error", "err", "mse", "mae", "rmse", "nll", "perplexity", "ppl", "wer", "cer", "fid"])


@dataclass(frozen=True)
class Metric:
    """The way in which a logged metric is shown.

    Attributes:
        name: Name under which the module logs the metric.
        mode: "max" or "min", the direction in which the metric gets better; None where that is unknown.
        share: Whether the metric is shown in per cent.
    """

    name: str = "test_acc"
    mode: Mode | None = "max"
    share: bool = True

    @classmethod
    def of(cls, name: str, values: Iterable[float | None], *, mode: Mode | None = None) -> Metric:
        """Derive unit and direction of a metric from the words in its name.

        Accuracy, F1, recall and the like are shares, and larger is better; they are shown in per cent if all values lie
        between 0 and 1. For losses and errors smaller is better. Any other metric is shown without a unit.

        Args:
            name: Name under which the module logs the metric.
            values: All values that will be shown; None where the metric was not measured.
            mode: The direction in which the metric gets better; None derives it from the name.

        Raises:
            ValueError: `mode` is neither "max" nor "min".

        Example:
            >>> Metric.of("test_acc", [0.99, None]), Metric.of("test_loss", [1.43]).mode
            (Metric(name='test_acc', mode='max', share=True), 'min')
            >>> Metric.of("test_acc", [99.0]).share, Metric.of("val_energy", [3.0]).mode
            (False, None)
        """
        if mode is not None and mode not in get_args(Mode):
            raise ValueError(f"metric_mode={mode!r} of {name!r} must be 'max', 'min' or null.")
        words = set(re.split(r"[^a-z0-9]+", re.sub(r"(?<=[a-z0-9])(?=[A-Z])", " ", name).lower()))
        of_share, of_loss = bool(words & SHARES), bool(words & LOSSES)
        known: Mode | None = "min" if of_loss else "max" if of_share else None
        share = of_share and not of_loss and all(0 <= value <= 1 for value in values if value is not None)
        return cls(name, mode or known, share)

    @property
    def label(self) -> str:
        """The name of the metric with its unit."""
        return f"{self.name} (%)" if self.share else self.name

    def scaled(self, value: float) -> float:
        """Return the value in the unit in which it is shown."""
        return 100 * value if self.share else value

    def show(self, value: float | None) -> str:
        """Return a value with its unit, or a dash.

        Example:
            >>> Metric.of("test_acc", [0.98611]).show(0.98611), Metric.of("test_loss", [1.4344]).show(1.4344)
            ('98.61 %', '1.434')
        """
        if value is None:
            return "-"
        return f"{100 * value:.2f} %" if self.share else f"{value:.4g}"

    def change(self, before: float | None, after: float | None, *, word: bool = True) -> str:
        """Return the signed difference with its unit, followed by "(better)" or "(worse)" unless `word` is False.

        Example:
            >>> Metric.of("test_acc", [0.99, 0.98]).change(0.99, 0.98)
            '-1.00 points (worse)'
            >>> Metric.of("test_loss", [0.25, 0.2]).change(0.25, 0.2)
            '-0.05 (better)'
        """
        if before is None or after is None:
            return "-"
        difference = f"{100 * (after - before):+.2f}" if self.share else f"{after - before:+.4g}"
        if not word:
            return difference
        difference += " points" if self.share else ""
        if self.mode is None or before == after or math.isnan(after - before):
            return difference
        return f"{difference} ({'better' if (after > before) == (self.mode == 'max') else 'worse'})"
