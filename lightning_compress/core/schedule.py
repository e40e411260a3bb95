"""Schedules: the fraction that is removed, as a pure function of progress."""

from __future__ import annotations

import math
from typing import Any, Literal, get_args

from lightning_compress.core.given import real_number, whole_number

Schedule = Literal["one_shot", "linear", "cubic", "exponential", "cosine"]
SCHEDULES: tuple[Schedule, ...] = get_args(Schedule)


def amount_at(progress: float, amount: float, *, schedule: Schedule = "cubic") -> float:
    r"""Return the fraction of the original that is removed when `progress` of the ramp has passed.

    With p the progress and A the final amount:

    - one_shot: A, from the start;
    - linear: A p;
    - cubic: A (1 - (1 - p)^3), much at first and ever less (Zhu and Gupta 2017, section 3);
    - exponential: 1 - (1 - A)^p, equal stretches remove equal shares of the rest (Frankle and Carbin 2019);
    - cosine: A (1 - cos(pi p)) / 2.

    Args:
        progress: Position on the ramp, 0 to 1; outside, the value at the nearer end holds.
        amount: Final fraction of the original, 0 to 1.
        schedule: Shape of the ramp.

    Raises:
        ValueError: Unknown schedule, `amount` outside 0 to 1, or an exponential ramp to 1, which it never reaches.

    Example:
        >>> [round(amount_at(p, 0.9, schedule="cubic"), 3) for p in (0.0, 0.25, 0.5, 1.0)]
        [0.0, 0.52, 0.787, 0.9]
        >>> [round(amount_at(p, 0.75, schedule="exponential"), 3) for p in (0.0, 0.5, 1.0)]
        [0.0, 0.5, 0.75]
    """
    check_schedule(schedule, amount)
    p = min(max(progress, 0.0), 1.0)
    if schedule == "one_shot" or p == 1.0:
        return amount
    if schedule == "linear":
        return amount * p
    if schedule == "cubic":
        return amount * (1.0 - (1.0 - p) ** 3)
    if schedule == "exponential":
        return 1.0 - float((1.0 - amount) ** p)
    return amount * (1.0 - math.cos(math.pi * p)) / 2.0


def checked_amount(amount: Any) -> float:
    """Return a fraction to remove, or raise a ValueError."""
    return real_number(amount, "amount is the fraction of the original to remove, 0 to 1", least=0, most=1)


def check_schedule(schedule: str, amount: float) -> None:
    """Raise a ValueError unless the schedule is known, and `amount` a fraction that it can reach."""
    amount = checked_amount(amount)
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule must be one of {', '.join(SCHEDULES)}; got {schedule!r}.")
    if schedule == "exponential" and amount == 1.0:
        raise ValueError("schedule='exponential' never reaches amount=1.0: take another schedule or a smaller amount.")


def checked_epoch(epoch: Any, name: str = "start_epoch") -> float:
    """Return an epoch at which something may begin or end, or raise a ValueError."""
    return real_number(epoch, f"{name} must be 0 or later", least=0)


def checked_epochs(start_epoch: Any, end_epoch: Any, *, at_once: bool = False) -> tuple[float, float | None]:
    """Return the epochs between which something changes, or raise a ValueError; with `at_once` it is a single moment.

    Example:
        >>> checked_epochs(0, 2), checked_epochs(1.5, None)
        ((0.0, 2.0), (1.5, None))
    """
    start, end = checked_epoch(start_epoch), None if end_epoch is None else checked_epoch(end_epoch, "end_epoch")
    if end is not None and end <= start and not at_once:
        raise ValueError(f"end_epoch={end_epoch!r} must be later than start_epoch={start_epoch!r}.")
    return start, end


def check_interval(every_n_steps: Any) -> None:
    """Raise a ValueError unless the steps between events are None, for once an epoch, or a whole number."""
    if every_n_steps is not None:
        whole_number(every_n_steps, "every_n_steps must be a whole number, 1 or more, or None", least=1)
