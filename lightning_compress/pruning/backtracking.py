"""The half of a pruning callback that prunes until the metric drops, and then goes back to what kept it."""

from __future__ import annotations

import copy
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from lightning_compress.pruning.removing import RemovingCallback
from lightning_compress.pruning.stopping import StopWatch
from lightning_compress.trainer.distributed import broadcast
from lightning_compress.trainer.monitors import count_anew, validate_before_training


class BacktrackingCallback(RemovingCallback):
    """A callback that may follow a `StopWatch`; a subclass makes it, and says how much is pruned."""

    _stop: StopWatch | None
    _stopped: bool
    current_amount: float
    start_epoch: float

    def before_first_step(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._stop is not None and self._stop.kept is None and not self._stopped:
            if self._stop.baseline is None:
                # As Lightning's sanity check, so that loggers and other callbacks' monitors don't count it.
                validate_before_training(trainer)
            if self._stop.baseline is None:
                raise ValueError(
                    f"stop compares {self._stop.rule.monitor!r} with that of the network that came in, which can't be "
                    f"validated while a checkpoint from the middle of a validation is resumed: set stop's baseline."
                )
            self._stop.kept = self._snapshot(pl_module)
            # A network that trains densely at first is to be known as it is when pruning begins.
            self._stop.awaits_validation = self.start_epoch > 0 and self._stop.rule.baseline is None
            rank_zero_info(f"stop: the dense network has {self._stop.rule.monitor}={self._stop.baseline:.6g}.")
        super().before_first_step(trainer, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._stop is None or self._stopped or trainer.state.fn != "fit":
            return
        if trainer.sanity_checking and (self._masked is None or self._stop.baseline is not None):
            return  # Lightning's own
        value = float(broadcast(self._stop.rule.read(trainer.callback_metrics).to(pl_module.device)))
        verdict = self._stop.judge(value, self.current_amount)
        if verdict == "failed" and self.current_amount > self._stop.kept_amount:
            self._go_back(pl_module)
            trainer.should_stop = True
        elif trainer.sanity_checking or verdict in ("failed", "recovering"):
            return
        elif self.current_amount > 0 or verdict == "better":  # a dense network that got worse is not gone back to
            self._stop.kept = self._snapshot(pl_module)
            if verdict == "better" and self.current_amount > 0:
                count_anew(trainer, f"sparsity {self.sparsity:.4g} keeps {self._stop.rule.monitor}")

    def _snapshot(self, pl_module: LightningModule) -> dict[str, Any]:
        assert self._masked is not None
        state = {"module": pl_module.state_dict(), "keep": self._masked.keep, "latent": self._masked.latent}
        return copy.deepcopy(state) | {"amount": self.current_amount}

    def _go_back(self, pl_module: LightningModule) -> None:
        """Restore the newest state that kept the metric; it is final."""
        assert self._stop is not None
        kept = self._stop.kept
        assert kept is not None
        if not self._stopped:
            rank_zero_info(f"stop: going back to amount {kept['amount']:.4g}, the largest that kept the metric.")
        self._stopped = True
        pl_module.load_state_dict(kept["module"])
        self.current_amount = kept["amount"]
        self._mask(kept["keep"], latent=kept["latent"])
