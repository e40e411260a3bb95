"""How much longer than in the table the settings take now: by the load of the machine, by the setting, by chance."""

from __future__ import annotations

import math
import statistics
from collections import deque

_NEAR, _WIDE = 3, 5  # runs whose median is followed; runs whose median a single run is compared with
_OWN = 0.2  # largest logarithm of a setting's own ratio
_FORGET = 0.005  # share of its own ratio that a setting loses with every run of another one
_HAND_OVER = 0.06  # share of its own ratio that a setting hands over to the load with every run
_FIRST = 3  # runs after a switch whose deviation is a matter of the setting, not of the machine
_NOISE = 0.05  # logarithm of the headroom until noise is known
_OUTLIER = math.log(2)  # runs that are so much slower than those around them are not planned for


class Pace:
    """Estimates the ratio of measured to expected seconds for every setting, from the runs of whichever is used.

        log ratio = load + own[setting] + noise

    `load` is an exponential average of the median of the last three runs, so that a single run never moves it, and two
    slow runs do. Deviations in the first runs after a switch are put down to `own`, because a table may be wrong for
    one setting, and those after that to the machine. `own` is bounded and slowly forgotten.

    Args:
        within: The share of runs that the headroom covers.
        gain: The share of a deviation that one run corrects.
        window: The number of runs from which the noise is estimated.

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
        self._recent: deque[tuple[str, float]] = deque([("", 0.0)] * (_WIDE - 1), _WIDE)  # the table stands at first
        self._noise: deque[float] = deque(maxlen=window)
        self._last, self._runs = "", 0.0

    def add(self, name: str, ratio: float) -> None:
        """Take the ratio of measured to expected seconds of a run."""
        if name != self._last:
            self._runs = 0 if self._last else math.inf  # there is no switch before the first run
        self._last, self._runs = name, self._runs + 1
        self._recent.append((name, math.log(max(ratio, 1e-6))))
        levels = [value - self.own.get(one, 0.0) for one, value in self._recent]
        noise = levels[_WIDE // 2] - statistics.median(levels)
        if noise < _OUTLIER:
            self._noise.append(noise)
        step = self.gain * (statistics.median(levels[-_NEAR:]) - self.load)
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
        """The factor by which all but a share of `1 - within` of the runs keep below what is expected."""
        if len(self._noise) < 10:
            return math.exp(_NOISE)
        ordered = sorted(self._noise)
        place = min(math.ceil(self.within * len(ordered)), len(ordered) - 1) - 1  # never the largest
        return math.exp(max(0.0, ordered[place]))
