"""Prune until the metric drops: judge the networks of a fit, and restore the last one that kept the metric."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any, Literal

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from lightning_compress.core.distributed import broadcast
from lightning_compress.pruning.masked import MaskedParameters
from lightning_compress.pruning.stopping import StopRule
from lightning_compress.trainer.monitors import validate_before_training

_STATE = ("baseline", "kept", "kept_amount", "awaits_validation", "failures")


class Backtracker:
    """Judges the network at every validation of a fit, and keeps a copy of the newest one that kept the metric.

    `begin` comes before the first step and `judge` after every validation, which `begin` may run itself. The caller
    prunes nothing while `awaits_validation` is true, calls `pruned` when it has pruned, and calls `go_back` when
    `judge` returns "failed" or when `must_go_back` is true at the end of the fit.

    Args:
        rule: The rule that says whether a network is good enough.
        trains_densely: Whether the network trains before anything is pruned, so that the dense network is judged again
            when pruning begins.

    Attributes:
        rule: The rule.
        baseline: The dense network's metric; None until it is known.
        kept: The copy: the module's state dict, the masks, their latent values, and the amount that was removed.
        kept_amount: The largest amount that kept the metric.
        awaits_validation: Whether the network of now must be validated before more is pruned.
        failures: Validations in a row that failed at the present amount.
    """

    def __init__(self, rule: StopRule, *, trains_densely: bool) -> None:
        self.rule = rule
        self.baseline = rule.baseline
        self.kept: dict[str, Any] | None = None
        self.kept_amount = 0.0
        self.awaits_validation = False
        self.failures = 0
        self._trains_densely = trains_densely

    def begin(self, trainer: Trainer, pl_module: LightningModule, masked: MaskedParameters, amount: float) -> None:
        """Judge and keep the network that the fit begins with, unless a checkpoint has brought another one.

        Raises:
            ValueError: The baseline is not known and cannot be measured now.
        """
        if self.kept is not None:
            return
        if self.baseline is None:
            # As Lightning's sanity check, so that loggers and other callbacks' monitors don't count it.
            validate_before_training(trainer)
        if self.baseline is None:
            raise ValueError(
                f"stop compares {self.rule.monitor!r} with that of the network that came in, which can't be "
                f"validated while a checkpoint from the middle of a validation is resumed: set stop's baseline."
            )
        self._keep(pl_module, masked, amount)
        # A network that trains densely at first is judged once more when pruning begins.
        self.awaits_validation = self._trains_densely and self.rule.baseline is None
        rank_zero_info(f"stop: the dense network has {self.rule.monitor}={self.baseline:.6g}.")

    def judge(
        self, trainer: Trainer, pl_module: LightningModule, masked: MaskedParameters, amount: float
    ) -> Literal["failed", "grew"] | None:
        """Judge the network that has just been validated with `amount` removed, and keep it if it is good enough.

        Returns:
            "failed" if the caller must go back, "grew" if the metric held at a larger amount than before, else None.

        Raises:
            ValueError: The metric is NaN, or validation has not logged it.
        """
        if trainer.sanity_checking and self.baseline is not None:
            return None  # Lightning's own sanity check judges nothing
        value = float(broadcast(self.rule.read(trainer.callback_metrics).to(pl_module.device)))
        if math.isnan(value):
            raise ValueError(f"stop monitors {self.rule.monitor!r}, which is NaN: the training has diverged.")
        if amount == 0 and self.rule.baseline is None and self._is_record(value):
            self.baseline = value
            self.awaits_validation, self.failures = False, 0
            if not trainer.sanity_checking:
                self._keep(pl_module, masked, amount)
            return None
        assert self.baseline is not None, "the network that came in is judged before anything is pruned"
        grew = amount > self.kept_amount
        if not self.rule.satisfied(value, baseline=self.baseline):
            self.failures += 1
            self.awaits_validation = grew and self.failures <= self.rule.recovery  # it may recover
            return "failed" if grew and not self.awaits_validation else None
        self.kept_amount = amount
        self.awaits_validation, self.failures = False, 0
        if trainer.sanity_checking or amount == 0:
            return None  # the better dense network is kept
        self._keep(pl_module, masked, amount)
        return "grew" if grew else None

    def pruned(self) -> None:
        """Note that more has been removed, so that the network of now has not been judged."""
        self.awaits_validation, self.failures = True, 0

    def must_go_back(self, amount: float) -> bool:
        """Whether the network at the end of a fit is not known to have kept the metric, and an earlier one is."""
        unknown = self.awaits_validation and amount > self.kept_amount
        return self.kept is not None and (self.failures > 0 or unknown)

    def go_back(self, pl_module: LightningModule, *, again: bool) -> dict[str, Any]:
        """Load the newest network that kept the metric into the module.

        Args:
            pl_module: The LightningModule.
            again: Whether the fit has gone back to it before, so that nothing needs to be said.

        Returns:
            The values that the caller has to restore with it: "amount", and the masks' "keep" and "latent".
        """
        kept = self.kept
        assert kept is not None
        if not again:
            rank_zero_info(f"stop: going back to amount {kept['amount']:.4g}, the largest that kept the metric.")
        pl_module.load_state_dict(kept["module"])
        return kept

    def state_dict(self) -> dict[str, Any]:
        """Return everything that a resume needs."""
        return {name: getattr(self, name) for name in _STATE}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state_dict` returned."""
        vars(self).update(state)

    def _keep(self, pl_module: LightningModule, masked: MaskedParameters, amount: float) -> None:
        state = {"module": pl_module.state_dict(), "keep": masked.keep, "latent": masked.latent}
        self.kept = copy.deepcopy(state) | {"amount": amount}

    def _is_record(self, value: float) -> bool:
        if self.baseline is None:
            return True
        return value > self.baseline if self.rule.mode == "max" else value < self.baseline
