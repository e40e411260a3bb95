"""Prune until the metric drops: judge the networks of a fit, and restore the last one that kept the metric."""

from __future__ import annotations

import copy
from typing import Any, Literal

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from lightning_compress.pruning.masked import MaskedParameters
from lightning_compress.pruning.stopping import StopRule, StopState
from lightning_compress.trainer.distributed import broadcast
from lightning_compress.trainer.monitors import validate_before_training


class Backtracker:
    """Judges the network at every validation of a fit, and keeps a copy of the newest one that kept the metric.

    `begin` comes before the first step and `judge` after every validation, which `begin` may run itself. The caller
    prunes nothing while `state.awaits_validation` is true, notes with `state.pruned` that it has pruned, and calls
    `go_back` when `judge` says "failed" or, at the end of the fit, `state.must_go_back` says so.

    Args:
        rule: When a network is still good enough.
        trains_densely: Whether the network trains before anything is pruned, so that the dense one is to be judged as
            it is then.

    Attributes:
        state: What has been judged, with the copy in `state.kept`: the module's state dict, masks, latent values, and
            the amount that was removed.
    """

    def __init__(self, rule: StopRule, *, trains_densely: bool) -> None:
        self.state = StopState(rule)
        self._trains_densely = trains_densely

    def begin(self, trainer: Trainer, pl_module: LightningModule, masked: MaskedParameters, amount: float) -> None:
        """Judge and keep the network that the fit begins with, unless a checkpoint has brought another one.

        Raises:
            ValueError: The baseline is not known and cannot be measured now.
        """
        state = self.state
        if state.kept is not None:
            return
        if state.baseline is None:
            # As Lightning's sanity check, so that loggers and other callbacks' monitors don't count it.
            validate_before_training(trainer)
        if state.baseline is None:
            raise ValueError(
                f"stop compares {state.rule.monitor!r} with that of the network that came in, which can't be "
                f"validated while a checkpoint from the middle of a validation is resumed: set stop's baseline."
            )
        self._keep(pl_module, masked, amount)
        # A network that trains densely at first is to be known as it is when pruning begins.
        state.awaits_validation = self._trains_densely and state.rule.baseline is None
        rank_zero_info(f"stop: the dense network has {state.rule.monitor}={state.baseline:.6g}.")

    def judge(
        self, trainer: Trainer, pl_module: LightningModule, masked: MaskedParameters, amount: float
    ) -> Literal["failed", "grew"] | None:
        """Judge the network that has just been validated with `amount` removed, and keep it if it is good enough.

        Returns:
            "failed" if the caller must go back, "grew" if the metric held at a larger amount than before, else None.
        """
        if trainer.sanity_checking and self.state.baseline is not None:
            return None  # Lightning's own sanity check judges nothing
        value = float(broadcast(self.state.rule.read(trainer.callback_metrics).to(pl_module.device)))
        verdict = self.state.judge(value, amount)
        if verdict == "failed" and amount > self.state.kept_amount:
            return "failed"
        if trainer.sanity_checking or verdict in ("failed", "recovering"):
            return None
        if amount == 0 and verdict != "better":
            return None  # a dense network that got worse is not gone back to
        self._keep(pl_module, masked, amount)
        return "grew" if verdict == "better" and amount > 0 else None

    def go_back(self, pl_module: LightningModule, *, again: bool) -> dict[str, Any]:
        """Load the newest network that kept the metric into the module.

        Args:
            pl_module: The LightningModule.
            again: Whether the fit has gone back to it before, so that nothing needs to be said.

        Returns:
            What the caller has to restore with it: "amount", and the masks' "keep" and "latent".
        """
        kept = self.state.kept
        assert kept is not None
        if not again:
            rank_zero_info(f"stop: going back to amount {kept['amount']:.4g}, the largest that kept the metric.")
        pl_module.load_state_dict(kept["module"])
        return kept

    def _keep(self, pl_module: LightningModule, masked: MaskedParameters, amount: float) -> None:
        state = {"module": pl_module.state_dict(), "keep": masked.keep, "latent": masked.latent}
        self.state.kept = copy.deepcopy(state) | {"amount": amount}
