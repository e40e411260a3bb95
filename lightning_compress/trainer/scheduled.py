"""A number that may follow a schedule during a fit."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, get_args

from lightning.pytorch import Trainer

from lightning_compress.core.given import real_number
from lightning_compress.core.schedule import Schedule, amount_at, check_schedule, checked_epochs
from lightning_compress.trainer.step_window import Ramp


@dataclass(kw_only=True)
class Scheduled:
    """A number that goes from `start` to `end` between two moments of the fit, and holds outside them.

    With p the progress between the moments and s the schedule's fraction (`amount_at` with amount 1):
    start + (end - start) s(p).

    Example:
        >>> Scheduled.of(4.0, "temperature").at(0)
        4.0
        >>> value = Scheduled.of({"start": 8.0, "end": 2.0, "schedule": "linear"}, "temperature")
        >>> value.ramp = Ramp(start=0, end=10, interval=1)
        >>> [value.at(step) for step in (0, 5, 20)]
        [8.0, 5.0, 2.0]
    """

    start: float
    end: float
    schedule: Schedule = "linear"
    start_epoch: float = 0.0
    end_epoch: float | None = None
    ramp: Ramp | None = field(default=None, repr=False)

    @classmethod
    def of(cls, value: float | Mapping[str, Any], argument: str) -> Scheduled:
        """Make a `Scheduled` from a plain number, or from a mapping with this class's arguments.

        Raises:
            ValueError: The mapping has other keys, or lacks start or end; the schedule is unknown; its end is not
                after its start.
        """
        if not isinstance(value, Mapping):
            given = real_number(value, f"{argument} is a number, or a mapping with start and end")
            return cls(start=given, end=given)
        known = ["start", "end", "schedule", "start_epoch", "end_epoch"]
        if set(value) - set(known) or not {"start", "end"} <= set(value):
            raise ValueError(
                f"{argument} is a number, or a mapping with start and end, and, if wanted, schedule "
                f"({', '.join(get_args(Schedule))}), start_epoch and end_epoch; got {dict(value)!r}."
            )
        made = cls(**value)
        check_schedule(made.schedule, 1.0)
        for name in ("start", "end"):
            real_number(value[name], f"The {name} of {argument} is a number")
        try:
            checked_epochs(made.start_epoch, made.end_epoch)
        except ValueError as error:
            raise ValueError(f"{argument}: {error}") from None
        return made

    @property
    def constant(self) -> bool:
        """Whether the number never changes."""
        return self.start == self.end

    def plan(self, trainer: Trainer, state: dict[str, Any] | None) -> None:
        """Convert epochs into steps of this fit, or load them from a checkpoint; a second fit keeps the first plan."""
        if state is not None:
            self.ramp = Ramp(**state)
        elif self.ramp is None and not self.constant:
            self.ramp = Ramp.plan(trainer, start_epoch=self.start_epoch, end_epoch=self.end_epoch, every_n_steps=1)

    def follow_epochs(self, moment: Callable[[int], int]) -> None:
        """Keep the same epochs where an epoch has another number of steps from now on."""
        if self.ramp is not None:
            self.ramp = self.ramp.moved(moment, interval=1, limit=None)

    def at(self, step: int) -> float:
        """Return the number after optimizer step number `step`."""
        if self.ramp is None or step < self.ramp.start:
            return self.start
        return self.start + (self.end - self.start) * amount_at(self.ramp.progress(step), 1.0, schedule=self.schedule)

    def progress(self, step: int) -> float:
        """Return the share of the way between the two moments, 0 to 1; 1 for a number that never changes."""
        if self.constant:
            return 1.0
        return 0.0 if self.ramp is None or step < self.ramp.start else self.ramp.progress(step)

    def state(self) -> dict[str, Any] | None:
        """Return the planned steps, which a resume needs."""
        return None if self.ramp is None else self.ramp.state_dict()
