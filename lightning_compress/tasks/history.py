"""What a run remembers of its fits: the epochs, and the network as it was right after the last pruning."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from lightning_compress.report import Epoch
from lightning_compress.trainer.callback import techniques
from lightning_compress.trainer.effects import Progress

SPARSITY = "sparsity"  # the number of a technique that prunes


class Recorder(Callback):
    """Writes down every epoch, and keeps the weights of the moment when the last technique reached its final amount.

    Both travel in checkpoints, so that a resumed run knows what happened before. It has to stand after the techniques
    in the Trainer's list of callbacks.

    Args:
        val_metric: Name under which the module logs what is shown over the epochs.
        history: Epochs from before, as of the dense network.

    Attributes:
        phase: What an epoch is called that no technique says anything of.

    Example:
        >>> trainer = Trainer(callbacks=[Recorder("val_acc")], logger=False, enable_checkpointing=False)
    """

    def __init__(self, val_metric: str, history: Sequence[Epoch] = ()) -> None:
        self.val_metric = val_metric
        self.phase = "dense"
        self.history = list(history)
        self.snapshot: dict[str, Tensor] | None = None
        self._sparsity: list[float] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._look(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._look(trainer, pl_module)

    def _look(self, trainer: Trainer, pl_module: LightningModule) -> None:
        pruning = _pruning(trainer)
        if self.snapshot is None and pruning and all(one.finished for one in pruning):
            self.snapshot = {name: value.detach().cpu().clone() for name, value in pl_module.state_dict().items()}
            self._sparsity = [one.numbers[SPARSITY]() for one in pruning]

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        pruning, metrics = _pruning(trainer), trainer.callback_metrics
        phase = "recovery" if all(one.finished for one in pruning) else "pruning"
        self.history.append(
            Epoch(
                epoch=trainer.current_epoch,
                val_metric=float(metrics[self.val_metric]) if self.val_metric in metrics else None,
                sparsity=max((one.numbers[SPARSITY]() for one in pruning), default=0.0),
                phase=phase if pruning else self.phase,
            )
        )

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Pruning until a metric drops may have gone back to an earlier amount: that network was never snapped.
        if self.snapshot is not None and self._sparsity != [one.numbers[SPARSITY]() for one in _pruning(trainer)]:
            self.snapshot = None

    def state_dict(self) -> dict[str, Any]:
        return {
            "history": [asdict(epoch) for epoch in self.history],
            "snapshot": self.snapshot,
            "sparsity": self._sparsity,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        try:
            history = [Epoch(**epoch) for epoch in state_dict["history"]]
            self.snapshot, self._sparsity = state_dict["snapshot"], state_dict["sparsity"]
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"The checkpoint's history of the run is not one of this version of lightning_compress ({error}): go "
                f"on with the version that wrote it, or start a new run from its weights."
            ) from error
        self.history = history


def _pruning(trainer: Trainer) -> list[Progress]:
    """How far the techniques have come that take several events to a final sparsity."""
    found = [one.progress() for one in techniques(trainer)]
    return [one for one in found if SPARSITY in one.numbers]
