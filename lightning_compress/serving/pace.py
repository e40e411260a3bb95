"""How much longer than in the table the settings take now: by the load of the machine, by the setting, by chance."""

from __future__ import annotations

import math
import statistics
from collections import deque

_NEAR = 3  # runs whose median is followed
_OWN = 0.2  # largest logarithm of a setting's own ratio
_FORGET = 0.005  # share of its own ratio that a setting loses with every run of another one
_HAND_OVER = 0.06  # share of its own ratio that a setting hands over to the load with every run
_FIRST = 3  # runs after a switch whose deviation is a matter of the setting, not of the machine
_NOISE = 0.05  # logarithm of the headroom until noise is known
_FOLLOW = 0.1  # by how much a missed budget lowers the share of runs that may go beyond the headroom
_LEAST, _MOST = -0.05, 0.5  # between which that share stays; below 0 it is a debt of misses
_TAIL = 0.02  # the smallest share whose quantile is taken


class Pace:
    """Estimates the ratio of measured to expected seconds for every setting, from the runs of whichever is used.

        log ratio = load + own[setting] + noise

    `load` is an exponential average of the median of the last three runs, so that a single run never moves it, and two
    slow runs do. Deviations in the first runs after a switch are put down to `own`, because a table may be wrong for
    one setting, and those after that to the machine. `own` is bounded and slowly forgotten.

    The headroom is a quantile of the noise: of the last runs a share `beyond` took longer. That share follows the
    budgets (adaptive conformal inference):

        beyond <- beyond + 0.1 ((1 - within) - (1 if the run missed its budget, else 0))

    So the headroom grows after misses, and shrinks where budgets are kept with room to spare, as settings are few.

    Args:
        within: The share of budgets to keep.
        gain: The share of a deviation that one run corrects.
        window: The number of runs from which the noise is estimated.

    References:
        Gibbs and Candes 2021, "Adaptive Conformal Inference Under Distribution Shift" (arXiv 2106.00170).

    Example:
        >>> pace = Pace()
        >>> for _ in range(20):
        ...     pace.add("full", 2.0)
        >>> round(pace.factor("full"), 2), round(pace.factor("half"), 2)
        (2.0, 2.0)
    """

    def __init__(self, *, within: float = 0.95, gain: float = 0.5, window: int = 100) -> None:
        self.within, self.gain = within, gain
        self.load = 0.0
        self.own: dict[str, float] = {}
        self._recent: deque[tuple[str, float]] = deque([("", 0.0)] * (_NEAR - 1), _NEAR)  # the table stands at first
        self._noise: deque[float] = deque(maxlen=window)
        self._beyond = 1 - within
        self._last, self._runs = "", 0.0

    def add(self, name: str, ratio: float, *, missed: bool | None = None, hopeless: bool = False) -> None:
        """Take the ratio of measured to expected seconds of a run.

        Args:
            name: Of the setting that ran.
            ratio: The ratio.
            missed: Whether the run missed its budget; None: that would say nothing about the headroom.
            hopeless: Whether every other setting would have missed the budget as well, so that no headroom helps.
        """
        value = math.log(max(ratio, 1e-6))
        if missed is not None:
            self._beyond = min(max(self._beyond + _FOLLOW * (1 - self.within - missed), _LEAST), _MOST)
        if not hopeless:
            self._noise.append(value - math.log(self.factor(name)))
        if name != self._last:
            self._runs = 0 if self._last else math.inf  # there is no switch before the first run
        self._last, self._runs = name, self._runs + 1
        self._recent.append((name, value))
        level = statistics.median(value - self.own.get(one, 0.0) for one, value in self._recent)
        step = self.gain * (level - self.load)
        share = min(1.0, _FIRST / self._runs) if self._runs > 1 else 0.0  # the first run is outvoted by those before
        before = self.own.get(name, 0.0)
        self.own[name] = max(-_OWN, min(_OWN, before + share * step))
        self.load += step - (self.own[name] - before)
        self.own = {one: value * (1 - _FORGET) for one, value in self.own.items()}
        self.load += self.own[name] * _HAND_OVER
        self.own[name] *= 1 - _HAND_OVER

    def factor(self, name: str) -> float:
        """Return the ratio that a setting's next run is expected to have."""
        return math.exp(self.load + self.own.get(name, 0.0))

    @property
    def headroom(self) -> float:
        """The factor by which a run may take longer than expected, and keep the budget for which it was chosen."""
        if len(self._noise) < 10:
            return math.exp(_NOISE)
        place = math.ceil((1 - max(self._beyond, _TAIL)) * (len(self._noise) + 1))
        return math.exp(max(0.0, sorted(self._noise)[min(place, len(self._noise)) - 1]))
