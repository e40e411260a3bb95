"""The rounds of a lottery ticket in one fit: train, prune a share of what is left, go back, and train again."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from lightning.pytorch import Trainer

from lightning_compress.trainer.steps import planned_steps, steps_at, steps_per_epoch


@dataclass(kw_only=True)
class Rounds:
    """The optimizer steps after which events are due; each happens before the batch that follows.

    Attributes:
        events: The steps at whose end a round ends: the network is pruned and goes back.
        keep_at: The step to which it goes back.
        length: Steps of the round before the first event; where there is none, of the first round.
        epochs: Steps of an epoch, as far as they are known.
        limits: `max_epochs` and `max_steps` of one round, which the module's `configure_optimizers` sees.
        taken: How many events have taken place.

    Example:
        >>> rounds = Rounds(events=[4, 7], keep_at=1, length=4, epochs=2, limits={})
        >>> [step for step in range(10) if rounds.take(step)]
        [4, 7]
        >>> rounds.finished
        True
    """

    events: list[int]
    keep_at: int
    length: int
    epochs: int | None
    limits: dict[str, int | None]
    taken: int = 0

    @property
    def start(self) -> int:
        """The step of the first event."""
        return self.events[0]

    @property
    def end(self) -> int:
        """The step of the last event."""
        return self.events[-1]

    @property
    def last(self) -> int:
        """The step of the last event that has taken place; -1 before the first one."""
        return self.events[self.taken - 1] if self.taken else -1

    @property
    def finished(self) -> bool:
        """Whether the last event has taken place."""
        return self.taken == len(self.events)

    def take(self, step: int) -> bool:
        """Whether an event is due after this step. If so, it counts as taken."""
        due = not self.finished and step >= self.events[self.taken]
        self.taken += due
        return due

    def progress(self, step: int) -> float:
        """Return the share of the events that have taken place."""
        return self.taken / len(self.events)

    def counts(self, step: int) -> bool:
        """Whether a criterion watches the step after this one: in the last epoch before an event."""
        return not self.finished and (self.epochs is None or step >= self.events[self.taken] - self.epochs)

    def schedule_ends(self, *, rewinds: bool) -> int:
        """Return the step at which the schedule of the learning rate has ended and is not taken back any more."""
        return self.end + self.length - self.keep_at if rewinds else self.length

    def moved(self, moment: Callable[[int], int], *, epochs: int | None) -> Rounds:
        """Return the rounds for a fit whose epochs have another number of steps from now on.

        Args:
            moment: Maps a planned step to a step at the new pace.
            epochs: The new number of steps.
        """
        return Rounds(
            events=[moment(step) for step in self.events],
            keep_at=moment(self.keep_at),
            length=moment(self.length),
            epochs=epochs,
            limits=self.limits,
            taken=self.taken,
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the rounds as plain numbers."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The wish for rounds, before it is known how long the fit is.

    Args:
        rounds: How often the network is pruned.
        round_epochs: Length of a round in epochs, from 0 on; None: equal parts of the fit.
        rewind_to: The epoch at which the later rounds begin.
        pretrained: Whether the first event comes before the first step.
    """

    rounds: int
    round_epochs: float | None
    rewind_to: float
    pretrained: bool

    def limits(self, trainer: Trainer, per_epoch: Callable[[], int | None]) -> dict[str, int | None]:
        """Return `max_epochs` and `max_steps` of one round.

        Args:
            trainer: The Trainer, with the limits of the whole fit.
            per_epoch: Returns the number of optimizer steps of an epoch, for rounds that don't end with an epoch.

        Raises:
            ValueError: The rounds do not fit into the fit, or the fit has no end.
        """
        epochs = trainer.max_epochs if trainer.max_epochs is not None and trainer.max_epochs >= 0 else None
        steps = trainer.max_steps if trainer.max_steps >= 0 else None
        if trainer.fast_dev_run:  # type: ignore[attr-defined]  # set by a connector
            return {"max_epochs": epochs, "max_steps": trainer.max_steps}
        if steps is None or self._ends_by_epochs(trainer, per_epoch):
            length = self.length(epochs, self.rewind_to, self.round_epochs, "max_epochs")
            if length == int(length):
                return {"max_epochs": int(length), "max_steps": -1}
            return {"max_epochs": math.ceil(length), "max_steps": self._steps(length, per_epoch())}
        back, wanted = float(self._steps(self.rewind_to, per_epoch() if self.rewind_to else None)), None
        if self.round_epochs is not None:
            wanted = float(self._steps(self.round_epochs, per_epoch()))
        if epochs is None:
            return {"max_epochs": trainer.max_epochs, "max_steps": int(self.length(steps, back, wanted, "max_steps"))}
        steps = min(steps, self._steps(epochs, per_epoch()))
        length = int(self.length(steps, back, wanted, "max_steps"))
        return {"max_epochs": min(epochs, math.ceil(length / (per_epoch() or 1))), "max_steps": length}

    def _ends_by_epochs(self, trainer: Trainer, per_epoch: Callable[[], int | None]) -> bool:
        """Whether `max_epochs` ends the fit, so that its parts are whole epochs."""
        if trainer.max_steps < 0 or trainer.max_epochs is None or trainer.max_epochs < 0:
            return trainer.max_steps < 0
        if not trainer.lightning_module.automatic_optimization:  # max_steps counts the steps of several optimizers
            return False
        return self._steps(trainer.max_epochs, per_epoch()) <= trainer.max_steps

    def length(self, total: int | None, back: float, wanted: float | None, limit: str) -> float:
        """Return the length of a round, in the unit of the other arguments.

        Args:
            total: The length of the fit; None: it has no end.
            back: Where the later rounds begin.
            wanted: The length that the user has set, or None.
            limit: The Trainer's argument that limits the fit, for messages.

        Raises:
            ValueError: The rounds do not fit.

        Example:
            >>> plan = Plan(rounds=3, round_epochs=None, rewind_to=1, pretrained=False)
            >>> plan.length(14, 1, None, "max_epochs"), plan.whole(4, 1)
            (4, 13)
        """
        if total is None and wanted is None:
            raise ValueError(
                "The fit has no planned end (max_epochs=-1 and max_steps=-1), so it can't be divided into rounds: set "
                "round_epochs, or Trainer(max_epochs=...) or Trainer(max_steps=...)."
            )
        later = self.rounds - self.pretrained  # rounds that begin at `back`
        least = wanted or math.floor(back) + 1
        if total is None or (total >= self.whole(least, back) and wanted is not None):
            return least
        length = math.floor((total + later * back) / (later + 1))
        if length < least or wanted is not None:
            first = "" if self.pretrained else "a round of dense training and "
            raise ValueError(
                f"LotteryTicketCallback: {first}rounds={self.rounds} with round_epochs={self.round_epochs} and "
                f"rewind_to={self.rewind_to} do not fit into {limit}={total}. Train for "
                f"{limit}={math.ceil(self.whole(least, back))} at least, or ask for fewer or shorter rounds."
            )
        return length

    def whole(self, length: float, back: float) -> float:
        """Return the length of a fit with rounds of this length, in the same unit."""
        return length + (self.rounds - self.pretrained) * (length - back)

    def of_fit(self, trainer: Trainer) -> Rounds:
        """Return the rounds of a fit whose loaders exist.

        Raises:
            ValueError: As `limits`; or epochs can't be turned into steps.
        """
        per_epoch = steps_per_epoch(trainer)
        limits = self.limits(trainer, lambda: per_epoch)
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            keep_at, length, events = 0, 1, list(range(1 - self.pretrained, self.rounds + 1 - self.pretrained))
        elif self._ends_by_epochs(trainer, lambda: per_epoch):
            given = self.round_epochs
            epochs = float(limits["max_epochs"] or 0) if given is None or given == int(given) else given
            keep_at, length = steps_at(trainer, self.rewind_to), steps_at(trainer, epochs)
            events = [steps_at(trainer, one) for one in self._ends(epochs, self.rewind_to)]
        else:
            keep_at = steps_at(trainer, self.rewind_to)
            wanted = None if self.round_epochs is None else float(steps_at(trainer, self.round_epochs))
            length = int(self.length(planned_steps(trainer), keep_at, wanted, "max_steps"))
            events = [int(one) for one in self._ends(length, keep_at)]
        return Rounds(events=events, keep_at=keep_at, length=length, epochs=per_epoch, limits=limits)

    def _ends(self, length: float, back: float) -> list[float]:
        first = 0.0 if self.pretrained else length
        return [first + (length - back) * number for number in range(self.rounds)]

    def _steps(self, epochs: float, per_epoch: int | None) -> int:
        if epochs == 0:
            return 0
        if per_epoch is None:
            raise ValueError(
                f"LotteryTicketCallback: {epochs} epochs can't be turned into steps, because the training loader has "
                f"no length. Give it one, or leave round_epochs and rewind_to out and set Trainer(max_steps=...)."
            )
        whole = int(epochs)  # rounds as `steps_at` does
        return max(1, whole * per_epoch + round((epochs - whole) * per_epoch))
