"""The record of a run's fits: their epochs, and the network as it was when the last ramp had ended."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from lightning_compress.report import Epoch
from lightning_compress.trainer.callback import techniques
from lightning_compress.trainer.effects import DeclaresEffects, Progress
from lightning_compress.trainer.unwrap import LOGGED


class Recorder(Callback):
    """Records every epoch, and keeps the weights of the moment when the last technique with a ramp came to its end.

    The phase of an epoch describes the network at the epoch's end: `phase` as long as no technique has changed the
    network, "compression" until all techniques that change weights are finished, and "recovery" afterwards. Wrappers
    change the loss, so they do not count here. Checkpoints contain the history and the weights, so that a resumed run
    has the record of its beginning. The recorder must come after the techniques in the Trainer's list of callbacks.

    Args:
        val_metric: Name under which the module logs the metric that is shown over the epochs.
        history: Earlier epochs of the run, such as those of the dense training.

    Attributes:
        phase: Phase of the epochs before any technique has changed the network.
        snapshot: The state dict when the last technique with a ramp had reached its end; None before.

    Example:
        >>> trainer = Trainer(callbacks=[Recorder("val_acc")], logger=False, enable_checkpointing=False)
    """

    def __init__(self, val_metric: str, history: Sequence[Epoch] = ()) -> None:
        self.val_metric = val_metric
        self.phase = "dense"
        self.history = list(history)
        self.snapshot: dict[str, Tensor] | None = None
        self._reached: list[float] = []  # the fraction that each ramp had reached at the snapshot

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._keep_at_end_of_ramps(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._keep_at_end_of_ramps(trainer, pl_module)

    def _keep_at_end_of_ramps(self, trainer: Trainer, pl_module: LightningModule) -> None:
        ramps = [] if self.snapshot is not None else _ramps(trainer)
        if all(one.finished for one in ramps) and any(one.fraction > 0 for one in ramps):
            self.snapshot = {name: value.detach().cpu().clone() for name, value in pl_module.state_dict().items()}
            self._reached = [one.fraction for one in ramps]

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        metrics, found = trainer.callback_metrics, [one.progress() for one in techniques(trainer)]
        phase = "recovery" if all(one.finished for one in found) else "compression"
        self.history.append(
            Epoch(
                epoch=trainer.current_epoch,
                val_metric=float(metrics[self.val_metric]) if self.val_metric in metrics else None,
                numbers={
                    one.logged_name(trainer, name).removeprefix(LOGGED): float(number())
                    for one in trainer.callbacks  # type: ignore[attr-defined]  # a connector sets it
                    if isinstance(one, DeclaresEffects)
                    for name, number in one.progress().numbers.items()
                },
                phase=phase if any(one.fraction > 0 for one in found) else self.phase,
            )
        )

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # A technique may have gone back to an earlier network, as pruning with `stop` does. The recovered network does
        # not come from the snapshot then.
        if self.snapshot is not None and self._reached != [one.fraction for one in _ramps(trainer)]:
            self.snapshot = None

    def state_dict(self) -> dict[str, Any]:
        return {
            "history": [asdict(epoch) for epoch in self.history],
            "snapshot": self.snapshot,
            "reached": self._reached,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        try:
            history = [Epoch(**epoch) for epoch in state_dict["history"]]
            self.snapshot, self._reached = state_dict["snapshot"], state_dict["reached"]
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"The checkpoint's history of the run was not written by this version of lightning_compress ({error}): "
                f"resume with the version that wrote it, or start a new run from the checkpoint's weights."
            ) from error
        self.history = history


def _ramps(trainer: Trainer) -> list[Progress]:
    """Return the progress of the techniques that come to their end in the events of a ramp."""
    found = [one.progress() for one in techniques(trainer)]
    return [one for one in found if one.ramp]
