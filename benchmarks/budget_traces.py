"""A controller on simulated machines: how often it keeps its budget, how accurately, beside bounds and controls.

No real time passes, and every number follows from the seeds. A stream of 1,000 batches comes at fixed times; the budget
steps every 50 batches. The machine's speed is a function of time: calm in the first and the third quarter, but for rare
pauses; in the others it jumps between the full speed, a half and a third, and stays at each for a time that is drawn
from an exponential distribution: much shorter than a batch, as long as some batches, or much longer. A batch takes
until the speed has added up to the work of its setting, so each setting has its own time for each batch.

    all-knowing       the most accurate setting that keeps the budget for this batch: an upper bound
    best static       the most accurate setting that keeps as many budgets as the controller, in hindsight
    ... and budget    the same with one setting for each of the budgets, chosen in hindsight of the whole trace

The constants of `serving.pace` were chosen on seeds 100 to 111; the default seeds are others.

    python benchmarks/budget_traces.py
"""

from __future__ import annotations

import argparse
import math
import random
import statistics
import warnings
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import accumulate, product

import torch
from _support import Found
from rich.console import Console
from torch import Tensor

from lightning_compress import BudgetController
from lightning_compress.serving import Setting

WORK = {"first exit": 0.011, "40 %": 0.021, "60 %": 0.029, "full": 0.039}  # seconds at full speed
ACCURACY = {"first exit": 0.642, "40 %": 0.713, "60 %": 0.741, "full": 0.750}
SHARES = (1.5, 0.6, 0.4, 1.1, 0.6, 1.6, 0.9, 0.6, 1.2, 0.9)  # budgets, in times of the full network's
BATCHES, EACH, PERIOD = 1000, 50, 0.1  # seconds between two batches
STAYS = {"short": 0.004, "some batches": 0.3, "long": 5.0}  # mean seconds at one speed, on a loaded machine
X = torch.zeros(1, 1)


class Machine:
    """A machine whose speed is a function of time, drawn in advance."""

    def __init__(self, seed: int, stay: float) -> None:
        numbers = random.Random(seed)
        self.times, self.speeds = [0.0], [1.0]
        quarter = BATCHES * PERIOD / 4
        while self.times[-1] < 4 * quarter + 10:
            now = self.times[-1]
            if int(now / quarter) % 2:
                length = numbers.expovariate(1 / stay)
                self.speeds.append(numbers.choices([1.0, 1 / 2, 1 / 3], [0.5, 0.35, 0.15])[0])
            else:
                calm = self.speeds[-1] < 1 or now == 0
                length = numbers.expovariate(1 / 8.0) if calm else 0.02  # a pause every eight seconds
                self.speeds.append(1.0 if calm else 0.25)
            border = (int(now / quarter) + 1) * quarter
            self.times.append(min(now + length, border + 1e-9) if now < border else now + length)
        self.speeds = [*self.speeds[1:], 1.0]
        parts = zip(self.times, self.times[1:], self.speeds, strict=False)
        self.done = [0.0, *accumulate((end - start) * speed for start, end, speed in parts)]  # work until each time
        self.chance = [numbers.lognormvariate(0, 0.02) for _ in range(BATCHES)]

    def seconds(self, batch: int, work: float) -> float:
        """How long a setting takes for a batch."""
        start = batch * PERIOD
        begin = bisect_right(self.times, start) - 1
        goal = self.done[begin] + (start - self.times[begin]) * self.speeds[begin] + work * self.chance[batch]
        end = bisect_right(self.done, goal) - 1
        return self.times[end] + (goal - self.done[end]) / self.speeds[end] - start


def budgets() -> list[float]:
    full = WORK["full"]
    return [SHARES[i // EACH % len(SHARES)] * full for i in range(BATCHES)]


def controlled(taken: Mapping[str, Sequence[float]], **options: float) -> list[str]:
    """The settings that a controller chooses."""
    now, batch = 0.0, 0

    def run(name: str, x: Tensor) -> Tensor:
        nonlocal now
        now += taken[name][batch]
        return x

    settings = [Setting(name, partial(run, name), ACCURACY[name]) for name in WORK]
    table = {name: {1: seconds} for name, seconds in WORK.items()}
    controller = BudgetController(settings, table=table, clock=lambda: now, **options)  # type: ignore[arg-type]
    for batch, budget in enumerate(budgets()):  # noqa: B007  # `run` reads it
        controller.budget_ms = 1000 * budget
        controller(X)
    return [one.setting for one in controller.history]


def all_knowing(taken: Mapping[str, Sequence[float]]) -> list[str]:
    chosen = []
    for batch, budget in enumerate(budgets()):
        fits = [name for name in WORK if taken[name][batch] <= budget]
        chosen.append(max(fits, key=ACCURACY.__getitem__, default=min(WORK, key=WORK.__getitem__)))
    return chosen


def best_static(taken: Mapping[str, Sequence[float]], kept: float) -> list[str]:
    """The most accurate setting that keeps so many budgets; the fastest one if none does."""
    for name in sorted(WORK, key=ACCURACY.__getitem__, reverse=True):
        if statistics.mean(within(taken, [name] * BATCHES)) >= kept:
            return [name] * BATCHES
    return [min(WORK, key=WORK.__getitem__)] * BATCHES


def best_by_budget(taken: Mapping[str, Sequence[float]], kept: float) -> list[str]:
    """The most accurate choice of one setting for each budget that keeps so many budgets in all."""
    shares = sorted(set(SHARES))
    of_batch = [shares.index(SHARES[i // EACH % len(SHARES)]) for i in range(BATCHES)]
    counts = [of_batch.count(i) for i in range(len(shares))]
    misses = [
        {name: sum(not one for one, k in zip(within(taken, [name] * BATCHES), of_batch, strict=True) if k == i)
         for name in WORK} for i in range(len(shares))
    ]  # fmt: skip
    allowed = (1 - kept) * BATCHES + 1e-9
    best, most = ["first exit"] * len(shares), -math.inf
    for choice in product(WORK, repeat=len(shares)):
        if sum(misses[i][name] for i, name in enumerate(choice)) <= allowed:
            right = sum(counts[i] * ACCURACY[name] for i, name in enumerate(choice))
            if right > most:
                best, most = list(choice), right
    return [best[k] for k in of_batch]


def within(taken: Mapping[str, Sequence[float]], chosen: Sequence[str]) -> list[bool]:
    return [taken[name][batch] <= budget for batch, (name, budget) in enumerate(zip(chosen, budgets(), strict=True))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(20)), help="of the machines")
    parser.add_argument("--json", help="write the table here")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")  # nothing fits at times
    found = Found()
    for kind, stay in STAYS.items():
        rows: dict[str, list[tuple[float, float, float, float]]] = {}
        for seed in arguments.seeds:
            machine = Machine(seed, stay)
            taken = {name: [machine.seconds(i, work) for i in range(BATCHES)] for name, work in WORK.items()}
            mine = controlled(taken)
            kept = statistics.mean(within(taken, mine))
            others = {
                "controller": mine,
                "best static of as many": best_static(taken, kept),
                "best static and budget": best_by_budget(taken, kept),
                "all-knowing": all_knowing(taken),
            }
            for name, chosen in (others | {one: [one] * BATCHES for one in WORK}).items():
                kept_by = within(taken, chosen)
                calm = [one for i, one in enumerate(kept_by) if i // (BATCHES // 4) % 2 == 0]
                loaded = [one for i, one in enumerate(kept_by) if i // (BATCHES // 4) % 2]
                accuracy = statistics.mean(ACCURACY[one] for one in chosen)
                numbers = (statistics.mean(kept_by), statistics.mean(calm), statistics.mean(loaded), accuracy)
                rows.setdefault(name, []).append(numbers)
        for name, several in rows.items():
            kept_all, calm_all, loaded_all, accuracies = zip(*several, strict=True)
            found.add(
                f"speeds that stay {kind} ({stay:g} s), {len(several)} machines",
                name,
                within_budget=100 * statistics.mean(kept_all),
                worst=100 * min(kept_all),
                calm=100 * statistics.mean(calm_all),
                loaded=100 * statistics.mean(loaded_all),
                accuracy=100 * statistics.mean(accuracies),
            )
    found.show(Console(width=160), arguments.json)


if __name__ == "__main__":
    main()
