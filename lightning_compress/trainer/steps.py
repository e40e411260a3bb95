"""Convert epochs to optimizer steps, the unit of schedules that survives a resume."""

from __future__ import annotations

import math
from dataclasses import dataclass

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler


@dataclass(frozen=True, kw_only=True)
class Pace:
    """The relation of epochs and optimizer steps from one step on.

    Example:
        >>> slow, fast = Pace(step=0, epoch=0.0, steps_per_epoch=10), Pace(step=20, epoch=2.0, steps_per_epoch=40)
        >>> fast.step_at(slow.epoch_at(30))
        60
    """

    step: int
    epoch: float
    steps_per_epoch: int
    began: float = 0.0  # epochs that earlier fits have trained

    def epoch_at(self, step: int) -> float:
        """Return the number of epochs that are over after a step."""
        return self.epoch + (step - self.step) / self.steps_per_epoch

    def step_at(self, epoch: float) -> int:
        """Return the step after which a number of epochs is over."""
        return self.step + round((epoch - self.epoch) * self.steps_per_epoch)


def steps_per_epoch(trainer: Trainer) -> int | None:
    """Return the number of optimizer steps of the first epoch; None if the training loader has no length."""
    return None if math.isinf(trainer.num_training_batches) else _steps_in_epoch(trainer, 0)


def steps_per_epoch_early(trainer: Trainer) -> int | None:
    """Return `steps_per_epoch` before the fit has set up its training loader, which it sets up anew afterwards."""
    trainer.fit_loop.setup_data()
    found = steps_per_epoch(trainer)
    trainer.fit_loop._combined_loader = None  # else Lightning would not restore the loader's state in a resume
    return found


def epochs_done(trainer: Trainer) -> float:
    """Return how many epochs of this fit are over, at its start or where Lightning resumes it."""
    batches, epochs = trainer.fit_loop.epoch_loop.batch_progress, trainer.fit_loop.epoch_progress.current
    if math.isinf(trainer.num_training_batches):
        return float(trainer.current_epoch)
    inside = min(1.0, batches.current.ready / trainer.num_training_batches)
    if batches.is_last_batch:
        inside = 1.0 if epochs.ready > epochs.processed else 0.0  # type: ignore[attr-defined]
    return trainer.current_epoch + inside


def steps_done(trainer: Trainer) -> int:
    """Return how many batches have ended in an optimizer step.

    In automatic optimization that is `trainer.global_step`. In manual optimization a batch may step several optimizers,
    which all count in `global_step`, so batches are counted instead.
    """
    assert trainer.lightning_module is not None
    if trainer.lightning_module.automatic_optimization:
        return trainer.global_step
    processed: int = trainer.fit_loop.epoch_loop.batch_progress.total.processed  # type: ignore[attr-defined]
    return processed


def is_written(module: LightningModule) -> bool:
    """Whether the Trainer writes what this step logs: logging all adds a fifth to an epoch of a small network."""
    trainer = module._trainer
    if trainer is None:
        return False
    interval: int = trainer.log_every_n_steps  # type: ignore[attr-defined]  # a connector sets it
    return bool(interval) and (trainer.global_step + 1) % interval == 0


def steps_at(trainer: Trainer, epoch: float) -> int:
    """Return the number of optimizer steps that `epoch` epochs take, from the first epoch on; at least 1 after 0.

    Raises:
        ValueError: The length of an epoch is unknown (an iterable dataset) and `epoch` is not 0.
    """
    if epoch == 0:
        return 0
    if math.isinf(trainer.num_training_batches):
        raise ValueError(
            f"Epoch {epoch} can't be turned into steps: the training loader has no length. Give it one, set "
            f"Trainer(limit_train_batches=...) to a number of batches, or count in steps: every_n_steps=..., with "
            f"start_epoch and end_epoch left out and Trainer(max_steps=...)."
        )
    whole = int(epoch)
    steps = sum(_steps_in_epoch(trainer, index) for index in range(whole))
    return max(1, steps + round((epoch - whole) * _steps_in_epoch(trainer, whole)))


def planned_steps(trainer: Trainer) -> int | None:
    """Return the number of steps after which this fit ends by its own limits, or None where it has no limit."""
    limits = []
    if trainer.max_steps is not None and trainer.max_steps >= 0:
        # In manual optimization, max_steps counts the steps of all optimizers, but `steps_done` counts batches.
        per_batch = 1 if trainer.lightning_module.automatic_optimization else max(1, len(trainer.optimizers))
        limits.append(trainer.max_steps // per_batch)
    if trainer.max_epochs is not None and trainer.max_epochs >= 0 and not math.isinf(trainer.num_training_batches):
        limits.append(steps_at(trainer, float(trainer.max_epochs)))
    return min(limits, default=None)


def _steps_in_epoch(trainer: Trainer, epoch: int) -> int:
    accumulation = trainer.accumulate_grad_batches
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, GradientAccumulationScheduler):
            accumulation = callback.get_accumulate_grad_batches(epoch)
    return math.ceil(trainer.num_training_batches / accumulation)
