"""Runs a network in the most accurate way that a budget of time allows, on a machine whose load changes."""

from __future__ import annotations

import math
import time
import warnings
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch

from lightning_compress.core.example_inputs import ExampleInputs, batch_size
from lightning_compress.core.given import real_number, whole_number
from lightning_compress.measure.footprint import accelerators_of, timed
from lightning_compress.serving.latencies import measure_latencies, seconds_at
from lightning_compress.serving.pace import Pace
from lightning_compress.serving.settings import Setting, check_mode, without_dominated

Battery = Callable[[float], float] | Mapping[float, float]


@dataclass(frozen=True)
class Served:
    """One batch that a controller has served.

    Attributes:
        setting: Name of the setting that ran.
        accuracy: That of the setting.
        batch_size: The number of samples.
        budget_ms: The budget, in milliseconds for the batch; None: there was none.
        ms: The milliseconds that it took.
        expected_ms: What was expected, without headroom.
        load: The estimated ratio of what runs take now to what the table says.
        fits: Whether some setting was expected to keep the budget.
    """

    setting: str
    accuracy: float
    batch_size: int
    budget_ms: float | None
    ms: float
    expected_ms: float
    load: float
    fits: bool


class BudgetController:
    """Serve batches with the most accurate setting of a network that keeps a budget, in milliseconds per batch.

    A setting is expected to take

        table[setting][batch size] * load * own[setting] * headroom

    where the table is measured on this machine, and the other factors follow the measured times of the batches that are
    served: see `serving.pace.Pace`. If the current setting is expected to miss the budget, the most accurate one that
    keeps it is taken at once. A more accurate setting is taken when it keeps the budget with `hysteresis` to spare, for
    `patience` batches in a row. When the budget itself steps by more than that, the choice is made afresh. If no
    setting keeps the budget, the fastest one runs, and a warning says so.

    Args:
        settings: Ways to run one network, with measured accuracies: see `measured_settings`. Settings that are neither
            faster nor more accurate than another one are dropped.
        example_inputs: A batch, with which the table is measured; None: there is a `table`.
        table: The seconds of every setting by name and batch size, as `controller.table` was; the sizes may be the
            strings that JSON makes of them.
        budget_ms: The budget in milliseconds per batch; None: the most accurate setting runs. It may be set later.
        battery: The budget by the level of a battery, from 0 to 1: a function, or a dict of levels and milliseconds
            between which straight lines lead.
        hysteresis: How much faster than the budget a more accurate setting must be to be taken.
        patience: For how many batches in a row.
        within: The share of batches whose budget is to be kept, where some setting can: the headroom follows it.
        batch_sizes: Those that are measured: see `measure`.
        repeats: The number of timed runs of each setting for each batch size.
        history: The number of batches of which `history` keeps what happened.
        clock: Returns the time in seconds.

    Raises:
        ValueError: There is no setting, two have one name, one is in training mode or missing from the table; neither
            or both of `example_inputs` and `table`; a number is out of range.

    Example:
        >>> settings = [Setting("half", lambda x: x, 0.90), Setting("full", lambda x: x, 0.95)]
        >>> table = {"half": {1: 0.002}, "full": {1: 0.004}}
        >>> controller = BudgetController(settings, table=table, budget_ms=3.0)
        >>> controller.choose(1).name, controller.choose(1, budget_ms=5.0).name
        ('half', 'full')
        >>> output = controller(torch.zeros(1, 8))
        >>> controller.history[-1].setting
        'full'
    """

    def __init__(
        self,
        settings: Sequence[Setting],
        example_inputs: ExampleInputs | None = None,
        *,
        table: Mapping[str, Mapping[int, float]] | None = None,
        budget_ms: float | None = None,
        battery: Battery | None = None,
        hysteresis: float = 0.05,
        patience: int = 3,
        within: float = 0.95,
        batch_sizes: Sequence[int] | None = None,
        repeats: int = 20,
        history: int = 10_000,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        names = [one.name for one in settings]
        if not names or len(set(names)) < len(names):
            raise ValueError(f"settings must be at least one, with different names; got {names}.")
        if (example_inputs is None) == (table is None):
            raise ValueError("Pass example_inputs=, with which the settings are timed now, or the table= of before.")
        hysteresis = real_number(hysteresis, "hysteresis must be at least 0", least=0)
        whole_number(patience, "patience must be a whole number, at least 1", least=1)
        within = real_number(within, "within must be a share above 0, at most 1", above=0, most=1)
        whole_number(repeats, "repeats must be a whole number, at least 1", least=1)
        whole_number(history, "history must be a whole number, 0 or more", least=0)
        if isinstance(battery, Mapping):
            if not battery:
                raise ValueError("battery={} has no level: pass milliseconds by level, such as {1.0: 20, 0.2: 5}.")
            for level, ms in battery.items():
                _checked_level(level)
                real_number(ms, "battery has milliseconds, above 0", above=0)
        for one in settings:
            check_mode(one)
        self.all_settings = tuple(settings)
        self.hysteresis, self.patience, self.within = hysteresis, patience, within
        self.history: deque[Served] = deque(maxlen=history)
        self._clock, self._battery = clock, battery
        self._budget: float | None = None
        self._current: Setting | None = None
        self._fits, self._waited = True, 0
        self._afresh = True
        if example_inputs is not None:
            self.measure(example_inputs, batch_sizes=batch_sizes, repeats=repeats)
        else:
            assert table is not None
            self._take({name: _by_size(name, sizes) for name, sizes in table.items()})
        self.budget_ms = budget_ms

    def measure(
        self, example_inputs: ExampleInputs, *, batch_sizes: Sequence[int] | None = None, repeats: int = 20
    ) -> None:
        """Measure the table anew, and forget what was learned about the load: see `serving.measure_latencies`."""
        self._take(
            measure_latencies(
                self.all_settings, example_inputs, batch_sizes=batch_sizes, repeats=repeats, clock=self._clock
            )
        )

    def _take(self, table: dict[str, dict[int, float]]) -> None:
        first = table.get(self.all_settings[0].name, {})
        for one in self.all_settings:
            sizes = table.get(one.name, {})
            known = sizes.keys() == first.keys() and all(0 < seconds < math.inf for seconds in sizes.values())
            if not sizes or not known:
                raise ValueError(
                    f"The table needs seconds above 0 of setting {one.name!r}, by the batch sizes that all settings "
                    f"have; got {sizes}."
                )
        self.table = {one.name: table[one.name] for one in self.all_settings}
        self.settings = without_dominated(self.all_settings, self.table)
        self.pace = Pace(within=self.within)
        self._current, self._afresh = None, True

    @property
    def budget_ms(self) -> float | None:
        """The budget in milliseconds per batch; None: there is none."""
        return self._budget

    @budget_ms.setter
    def budget_ms(self, value: float | None) -> None:
        if value is not None:
            real_number(
                value, "budget_ms is the milliseconds that a batch may take, above 0, or None", above=0, infinite=True
            )
        old, self._budget = self._budget, value
        step = old != value and (
            old is None or value is None or max(old / value, value / old) > 1 + self.hysteresis
        )  # smaller steps may be jitter
        self._afresh |= step

    def set_battery(self, level: float) -> None:
        """Set the budget by the level of the battery.

        Raises:
            ValueError: The controller was given no `battery`, or the level is not in 0 to 1.
        """
        if self._battery is None:
            raise ValueError("The controller knows no budget for a battery level: pass battery={1.0: 20, 0.2: 5}.")
        _checked_level(level)
        if callable(self._battery):
            self.budget_ms = self._battery(level)
            return
        known = sorted(self._battery.items())
        for (low, below), (high, above) in pairwise(known):
            if low <= level <= high:
                self.budget_ms = below + (above - below) * (level - low) / (high - low)
                return
        self.budget_ms = known[0][1] if level < known[0][0] else known[-1][1]

    def expected_ms(self, setting: Setting, size: int) -> float:
        """Return the milliseconds that a batch of this size is expected to take now, without headroom."""
        return 1000 * seconds_at(self.table[setting.name], size) * self.pace.factor(setting.name)

    def choose(self, size: int, *, budget_ms: float | None = None, battery: float | None = None) -> Setting:
        """Return the setting that serves the next batch of this size.

        Args:
            size: The number of samples.
            budget_ms: A new budget from now on; None: that of before.
            battery: A new level of the battery, instead of a budget.

        Raises:
            ValueError: There is no sample, or both a budget and a level are given, or one is out of range.
        """
        if not size > 0:
            raise ValueError(f"size is the number of samples of a batch, at least 1; got {size!r}.")
        if battery is not None and budget_ms is not None:
            raise ValueError(
                f"A level of the battery sets the budget itself: pass budget_ms={budget_ms!r} or battery={battery!r}, "
                f"and not both."
            )
        if battery is not None:
            self.set_battery(battery)
        if budget_ms is not None:
            self.budget_ms = budget_ms
        budget = math.inf if self._budget is None else self._budget
        needed = {one.name: self.expected_ms(one, size) * self.pace.headroom for one in self.settings}
        fitting = [one for one in self.settings if needed[one.name] <= budget]
        best = max(fitting, key=lambda one: (one.accuracy, -needed[one.name]), default=None)
        current, self._waited = self._current, self._waited + 1
        if best is None:
            chosen = min(self.settings, key=lambda one: needed[one.name])
            if self._fits:
                warnings.warn(
                    f"No setting keeps {budget:.3g} ms for {size} samples: the fastest one, {chosen.name!r}, is "
                    f"expected to need {needed[chosen.name]:.3g} ms and runs until one does.",
                    stacklevel=2,
                )
        elif self._afresh or current not in fitting:
            chosen = best
        else:
            assert current is not None
            spare = [one for one in fitting if needed[one.name] * (1 + self.hysteresis) <= budget]
            chosen = max([current, *spare], key=lambda one: one.accuracy)
            if chosen == current:
                self._waited = 0
            elif self._waited < self.patience:
                chosen = current
        self._current, self._fits, self._afresh = chosen, best is not None, False
        if chosen != current:
            self._waited = 0
        return chosen

    def _learn(self, setting: Setting, size: int, seconds: float) -> None:
        """Take the seconds of a run. The most accurate setting keeps any budget that is large enough, with no merit."""
        ratio = seconds / seconds_at(self.table[setting.name], size)
        if self._budget is None:
            self.pace.add(setting.name, ratio)
            return
        missed = 1000 * seconds > self._budget
        fastest = min(seconds_at(self.table[one.name], size) for one in self.settings)
        easy = not missed and setting.accuracy == max(one.accuracy for one in self.settings)
        hopeless = 1000 * fastest * ratio > self._budget
        self.pace.add(setting.name, ratio, missed=None if easy else missed, hopeless=hopeless)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the chosen setting returns for these inputs, without gradients; measure it and learn from it."""
        inputs = (*args, kwargs)
        size = batch_size(inputs)
        setting = self.choose(size)
        check_mode(setting)
        expected = self.expected_ms(setting, size)
        with torch.no_grad():
            output, seconds = timed(
                partial(setting.run, *args, **kwargs), accelerators_of(setting.run, inputs), self._clock
            )
        self._learn(setting, size, seconds)
        self.history.append(
            Served(
                setting=setting.name,
                accuracy=setting.accuracy,
                batch_size=size,
                budget_ms=self._budget,
                ms=1000 * seconds,
                expected_ms=expected,
                load=math.exp(self.pace.load),
                fits=self._fits,
            )
        )
        return output


def _checked_level(level: float) -> float:
    return real_number(level, "The level of a battery is from 0 to 1", least=0, most=1)


def _by_size(name: str, sizes: Mapping[Any, float]) -> dict[int, float]:
    """Return the row of a table whose batch sizes are numbers again, which JSON turns into strings."""
    try:
        found = {int(size): seconds for size, seconds in sizes.items()}
    except (TypeError, ValueError):
        found = {}
    if len(found) < len(sizes) or any(size < 1 for size in found):
        raise ValueError(
            f"The table needs batch sizes, whole numbers of at least 1, of setting {name!r}; got {list(sizes)}."
        )
    return found
