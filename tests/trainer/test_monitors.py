"""What counts anew when the network becomes another one."""

from __future__ import annotations

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping
from support.small import SmallModule, plain, quiet_trainer, shuffled

from lightning_compress import IterativePruningCallback
from lightning_compress.trainer.monitors import count_anew


def test_early_stopping_has_its_patience_back() -> None:
    stopping = EarlyStopping("val_acc", mode="max", patience=3)
    stopping.load_state_dict(stopping.state_dict() | {"wait_count": 2, "best_score": torch.tensor(0.9)})
    count_anew(quiet_trainer(callbacks=[stopping]), "a test")
    state = stopping.state_dict()
    assert state["wait_count"] == 0
    assert state["best_score"] == -torch.inf
    assert state["patience"] == 3


class Falling(SmallModule):
    def on_validation_epoch_end(self) -> None:
        self.log("quality", [0.9, 0.5, 0.5, 0.4, 0.4, 0.4, 0.4][self.trainer.current_epoch])


class Patience(Callback):
    def __init__(self, stopping: EarlyStopping) -> None:
        self.stopping = stopping
        self.counts: list[int] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: object) -> None:
        self.counts.append(int(self.stopping.wait_count))


def test_epochs_of_the_dense_network_do_not_use_up_its_patience() -> None:
    """0.9 of the first epoch is forgotten when the last weights go, after the third: then 0.5 is best."""
    stopping = EarlyStopping("quality", mode="max", patience=3)
    looking = Patience(stopping)
    callbacks = [IterativePruningCallback(0.5, end_epoch=3.0), stopping, looking]
    trainer = quiet_trainer(callbacks=callbacks, max_epochs=9, num_sanity_val_steps=0)
    trainer.fit(Falling(), shuffled(), plain())
    assert trainer.current_epoch == 6
    assert looking.counts[::12] == [0, 0, 1, 0, 1, 2]
    assert looking.counts[35] == 0  # the event's own step, before the validation
