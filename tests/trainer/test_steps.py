from __future__ import annotations

from typing import Any

import pytest
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from support.small import BATCH, SAMPLES, ManualModule, SmallModule, plain, quiet_trainer

from lightning_compress.trainer.steps import planned_steps, steps_at, steps_done

EPOCH = SAMPLES // BATCH


class Watch(Callback):
    """Counts optimizer steps by a hook of its own, and asks the timeline at every epoch's end."""

    def __init__(self) -> None:
        self.planned: int | None = None
        self.at_epoch: list[int] = []
        self.counted: list[int] = []
        self.done: list[int] = []
        self.steps = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.planned = planned_steps(trainer)
        self.at_epoch = [steps_at(trainer, float(epoch)) for epoch in range(1, 4)]

    def on_before_optimizer_step(self, *args: Any) -> None:
        self.steps += 1

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.counted.append(self.steps)
        self.done.append(steps_done(trainer))


def watch(module: LightningModule | None = None, callbacks: tuple[Callback, ...] = (), **options: Any) -> Watch:
    seen = Watch()
    quiet_trainer(callbacks=[*callbacks, seen], **({"max_epochs": 3} | options)).fit(
        module or SmallModule(), plain(), plain()
    )
    return seen


@pytest.mark.parametrize("accumulate", [1, 5])
def test_epochs_become_the_steps_that_are_really_taken(accumulate: int) -> None:
    seen = watch(accumulate_grad_batches=accumulate)
    assert seen.at_epoch == seen.counted == seen.done
    assert seen.planned == seen.counted[-1]


def test_accumulation_that_changes_between_epochs() -> None:
    seen = watch(callbacks=(GradientAccumulationScheduler({0: 4, 2: 1}),))
    assert seen.at_epoch == seen.counted == [3, 6, 18]


def test_max_steps_cuts_the_plan() -> None:
    assert watch(max_steps=17).planned == 17


def test_manual_optimization_counts_batches() -> None:
    seen = watch(ManualModule())
    assert seen.done == seen.at_epoch == [EPOCH, 2 * EPOCH, 3 * EPOCH]
    assert seen.counted[-1] == 6 * EPOCH
