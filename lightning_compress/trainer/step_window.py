"""A ramp of events between two optimizer steps, for a technique that acts gradually."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from lightning.pytorch import Trainer

from lightning_compress.trainer.steps import planned_steps, steps_at

RECOVERY_SHARE = 1 / 3  # share of the planned steps after the ramp, where the user sets no end


class Events(Protocol):
    """The steps of a fit after which a technique acts."""

    @property
    def start(self) -> int:
        """The step of the first event."""

    @property
    def end(self) -> int:
        """The step of the last event."""

    @property
    def last(self) -> int:
        """The step of the last event that was taken."""

    @property
    def finished(self) -> bool:
        """Whether the last event has been taken."""

    def take(self, step: int) -> bool:
        """Whether an event is due after this step. If so, it counts as taken, and no step is taken twice."""

    def progress(self, step: int) -> float:
        """Return the position of `step` between the first and the last event, 0 to 1."""

    def counts(self, step: int) -> bool:
        """Whether what is measured in the step after `step` matters for an event."""

    def state_dict(self) -> dict[str, Any]:
        """Return the events as plain numbers."""


@dataclass(kw_only=True)
class Ramp:
    """Events every `interval` optimizer steps from `start` to `end`, both included.

    Example:
        >>> ramp = Ramp(start=10, end=25, interval=10)
        >>> [step for step in range(40) if ramp.take(step)]
        [10, 20, 25]
        >>> ramp.finished
        True
    """

    start: int
    end: int
    interval: int
    last: int = -1

    @classmethod
    def plan(cls, trainer: Trainer, *, start_epoch: float, end_epoch: float | None, every_n_steps: int | None) -> Ramp:
        """Convert epochs into steps of this fit; without `end_epoch` the ramp ends at two thirds of the planned steps.

        Raises:
            ValueError: The fit has no planned end, or the ramp would end before it starts.
        """
        start = steps_at(trainer, start_epoch)
        planned = planned_steps(trainer)
        if end_epoch is not None:
            end = steps_at(trainer, end_epoch)
        elif planned is None:
            raise ValueError(_no_end(trainer))
        else:
            end = max(round(planned * (1 - RECOVERY_SHARE)), 1)
            if end <= start and trainer.fast_dev_run:  # type: ignore[attr-defined]  # set by a connector
                end = start + 1
            if end <= start:
                raise ValueError(
                    f"start_epoch={start_epoch} is step {start}, but with end_epoch=None the ramp ends at two thirds "
                    f"of the {planned} planned steps, {end}. Set end_epoch, or start earlier."
                )
        return cls(start=start, end=end, interval=every_n_steps or steps_at(trainer, 1.0))

    @classmethod
    def of_fit(
        cls,
        trainer: Trainer,
        state: Mapping[str, Any] | None,
        earlier: Ramp | None,
        *,
        start_epoch: float,
        end_epoch: float | None,
        every_n_steps: int | None,
    ) -> Ramp:
        """Return the ramp of a checkpoint's `state_dict`, else that of an earlier fit, else one for this fit."""
        if state is not None:
            return cls(**state)
        return earlier or cls.plan(trainer, start_epoch=start_epoch, end_epoch=end_epoch, every_n_steps=every_n_steps)

    def followed(
        self, trainer: Trainer, moment: Callable[[int], int], *, end_epoch: float | None, every_n_steps: int | None
    ) -> Ramp:
        """Return the ramp for a fit whose epochs have another number of steps from now on, with its last step in it."""
        limited = end_epoch is None and trainer.max_steps >= 0
        return self.moved(
            moment,
            interval=every_n_steps or steps_at(trainer, 1.0),
            limit=planned_steps(trainer) if limited else None,
        )

    def moved(self, moment: Callable[[int], int], *, interval: int, limit: int | None) -> Ramp:
        """Return the ramp for a fit whose epochs have another number of steps from now on.

        Args:
            moment: Maps a planned step to a step at the new pace.
            interval: Steps between events.
            limit: The last step of the fit, if the ramp must end before it.
        """
        start, end = moment(self.start), moment(self.end)
        if limit is not None and end > limit and not self.finished:
            end = max(start, round(limit * (1 - RECOVERY_SHARE)))
        taken = self.last >= self.start
        return Ramp(start=start, end=end, interval=interval, last=moment(self.last) if taken else start - 1)

    def progress(self, step: int) -> float:
        """Return the position of `step` on the ramp, 0 to 1."""
        return 1.0 if step >= self.end else max(0.0, (step - self.start) / (self.end - self.start))

    def take(self, step: int) -> bool:
        """Whether an event is due after this step. If so, it counts as taken, and no step is taken twice."""
        due = self.is_due(step)
        if due:
            self.last = step
        return due

    def is_due(self, step: int) -> bool:
        """Whether an event is due after this step."""
        if self.finished or step <= self.last:
            return False
        return step >= self.end or (step >= self.start and (step - self.start) % self.interval == 0)

    def counts(self, step: int) -> bool:
        """Whether what is measured in the step after `step` matters for an event."""
        return step >= self.start - self.interval

    @property
    def finished(self) -> bool:
        """Whether the last event has been taken."""
        return self.last >= self.end

    def state_dict(self) -> dict[str, Any]:
        """Return the ramp as plain numbers."""
        return asdict(self)


def _no_end(trainer: Trainer) -> str:
    if trainer.max_epochs is None or trainer.max_epochs < 0:
        return "The fit has no planned end (max_epochs=-1 and max_steps=-1): set end_epoch, max_epochs or max_steps."
    return (
        f"The fit's length in steps is not known: the training loader has no length, so that "
        f"max_epochs={trainer.max_epochs} can't be turned into steps. Give the loader a length, or set "
        f"Trainer(limit_train_batches=...) to a number of batches or Trainer(max_steps=...)."
    )
