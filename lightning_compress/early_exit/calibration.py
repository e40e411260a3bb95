"""Calibrate a network's exits on a table of their outputs: temperatures first, then thresholds for a budget or a drop.

Samples are dealt to two halves, class by class. Each half gets scores with the temperatures of the other, so that no
sample meets temperatures that it has fitted, and all of them choose the thresholds. The rule has the mean of both
1 / T, and thresholds at which as many samples leave as the solver wants.

An allowed drop is met with one standard error to spare. The solver picks the luckiest of many thresholds, so that the
accuracy that it sees is too high; the error of the difference to the full network, sample by sample, is about as large.
Where no thresholds are as good on few samples, the safest ones do, those whose drop and error are the least, if both
together are within 0.3 points of what is allowed.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from itertools import combinations
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_compress.core.given import real_number
from lightning_compress.early_exit.rules import ExitRule, Rule, Unit, predict, streak
from lightning_compress.early_exit.solver import Solver, q_sweep_places, thresholds
from lightning_compress.early_exit.table import Outcome, Table, evaluate, settle
from lightning_compress.early_exit.temperatures import fit, fit_temperature, fit_temperatures, named

__all__ = ["Outcome", "Swept", "Table", "calibrate", "evaluate", "fit_temperature", "fit_temperatures", "q_sweep"]

_FEWEST = 20  # samples of a calibration
_POINTS = 30  # of a rule's frontier
_TOLERANCE = 0.003  # of an allowed drop
_UNSPENT = 0.03  # the share of a budget that may stay unspent without a word
_TRIED = 64  # choices, for the safest one
_ALL_SUBSETS = 6  # exits, of which patience tries every subset as the open ones


class Swept(NamedTuple):
    """A point of MSDNet's sweep, on the table that its thresholds are from."""

    mean_cost: float
    accuracy: float
    thresholds: tuple[float, ...]


def calibrate(
    table: Table,
    *,
    budget: float | None = None,
    accuracy_drop: float | None = None,
    rule: Rule = "confidence",
    unit: Unit = "macs",
    temperature: bool = True,
    slack: float = 1.0,
    seed: int = 0,
) -> ExitRule:
    """Return the rule that is most accurate within a budget, or cheapest within an allowed drop of accuracy.

    Args:
        table: Of samples that the network was not trained on.
        budget: The largest mean cost per sample, in `unit`.
        accuracy_drop: How far the accuracy may be below the full network's, a fraction: 0.003 is 0.3 points.
        rule: How confident an exit is; "custom" takes the scores of the table.
        unit: Of the costs of the table, for the rule to remember.
        temperature: Whether each exit gets a temperature; patience and custom scores need none.
        slack: How many standard errors an allowed drop has to spare.
        seed: Of the halves.

    Raises:
        ValueError: Not exactly one of budget and drop is given, a number is out of range, there are too few samples, or
            the budget is below the cost of leaving at the first exit.

    Example:
        >>> g = torch.Generator().manual_seed(0)
        >>> easy, targets = torch.rand(400, generator=g), torch.randint(2, (400,), generator=g)
        >>> wrong = torch.rand(400, generator=g) < 0.5 - 0.5 * easy
        >>> first = torch.where(wrong, -1.0, 1.0) * (2 * targets - 1) * easy
        >>> logits = [torch.stack([-z, z], 1) for z in (first, 9.0 * targets - 4.5)]
        >>> table = Table(logits=logits, targets=targets, stages=(10.0, 10.0), heads=(0.0,))
        >>> outcome = evaluate(table, calibrate(table, budget=15.0, rule="margin"))
        >>> outcome.mean_cost, outcome.shares, round(outcome.accuracy, 2)
        (14.9, (0.51, 0.49), 0.91)
    """
    _check(table, budget, accuracy_drop, slack)
    _check_rule(table, rule, temperature)
    right = table.quality()
    exits = len(table.heads)
    temperatures = (1.0,) * (exits + 1)
    choices: _Choices
    if rule == "patience":
        choices = _Patience(table, right)
    elif rule == "custom" or not temperature:
        scores = table.confidences(rule, temperatures)
        choices = _Scores(table, right, scores, scores)
    else:
        temperatures, scores = _cross_fitted(table, rule, seed)
        choices = _Scores(table, right, scores, table.confidences(rule, temperatures))
    best: int | None
    if budget is not None:
        best = _within(choices.costs, budget, table, unit)
    else:
        assert accuracy_drop is not None
        best = _allowed(choices, right, accuracy_drop, slack)
    chosen = (math.inf,) * exits if best is None else choices.thresholds(best)
    closed = [k + 1 for k, threshold in enumerate(chosen) if threshold == math.inf]
    if closed and best is not None:
        warnings.warn(
            f"No sample leaves at {'exit' if len(closed) == 1 else 'exits'} {', '.join(map(str, closed))} of {exits}: "
            "what it would gain is less than it costs. These heads are not run",
            stacklevel=2,
        )
    outcome = choices.outcome(chosen)
    frontier = _frontier(choices)
    return ExitRule(
        rule=rule,
        thresholds=chosen,
        temperatures=temperatures,
        frontier=tuple((point.mean_cost, at) for point, at in frontier),
        unit=unit,
        stages=tuple(map(float, table.stages)),
        heads=tuple(map(float, table.heads)),
        shares=outcome.shares,
        advantages=_advantages(outcome, right),
        frontier_shares=tuple(point.shares for point, _ in frontier),
        frontier_advantages=tuple(_advantages(point, right) for point, _ in frontier),
    )


def q_sweep(table: Table, *, temperatures: Sequence[float] | None = None) -> list[Swept]:
    """Return the thresholds of MSDNet's budgeted batches for q = 1/20 .. 39/20, with what they do to the table.

    The scores are those of `confidence`, without temperatures unless they are given. Unlike in the original, a head at
    whose exit nobody leaves costs nothing.

    References:
        Huang et al. 2018, "Multi-Scale Dense Networks for Resource Efficient Image Classification" (1703.09844), 4.2.
    """
    given = tuple(temperatures or (1.0,) * (len(table.heads) + 1))
    scores = table.confidences("confidence", given)
    solver = Solver(scores, table.quality(), table.stages, table.heads)
    distinct = [row[~row.isnan()].unique().flip(0) for row in scores]
    swept = []
    for _, places in q_sweep_places(solver):
        at = tuple(float(row[m - 1]) if m else math.inf for row, m in zip(distinct, places, strict=True))
        swept.append(Swept(*solver.outcome(places), at))
    return swept


class _Choices:
    """Thresholds to choose from, whose costs and accuracies ascend."""

    costs: Tensor
    accuracies: Tensor

    def __init__(self, table: Table, right: Tensor) -> None:
        self.table, self.right = table, right

    def exit_index(self, i: int) -> Tensor:
        """Return where each sample leaves with the choice, as the solver sees it."""
        raise NotImplementedError

    def thresholds(self, i: int) -> tuple[float, ...]:
        """Return the thresholds of a choice."""
        raise NotImplementedError

    def left(self, thresholds: Sequence[float]) -> Tensor:
        """Return which samples may leave at each exit, (K, N)."""
        raise NotImplementedError

    def outcome(self, thresholds: Sequence[float]) -> Outcome:
        """Return what thresholds do to the table."""
        open_exits = [k for k, threshold in enumerate(thresholds) if threshold < math.inf]
        return settle(self.left(thresholds), self.right, self.table.stages, self.table.heads, open_exits)


class _Scores(_Choices):
    """Of a rule with a score at each exit: `solved` are the scores that choose, `final` those of the rule."""

    def __init__(self, table: Table, right: Tensor, solved: Tensor, final: Tensor) -> None:
        super().__init__(table, right)
        self.final = final
        self.solver = Solver(solved, right, table.stages, table.heads)
        self.found = self.solver.frontier()
        self.costs, self.accuracies = self.found.costs, self.found.accuracies

    def exit_index(self, i: int) -> Tensor:
        return self.solver.exit_index(self.found.places(i))

    def thresholds(self, i: int) -> tuple[float, ...]:
        return thresholds(self.final, self.solver.counts(self.found.places(i)))

    def left(self, thresholds: Sequence[float]) -> Tensor:
        return self.final >= torch.tensor(thresholds)[:, None]


class _Patience(_Choices):
    """Of patience: which exits are open, and how many open ones in a row must agree."""

    def __init__(self, table: Table, right: Tensor) -> None:
        super().__init__(table, right)
        self.predicted = [predict(logits.detach()).cpu() for logits in table.logits[:-1]]
        tried = [(self.outcome(thresholds), thresholds) for thresholds in self._tried()]
        tried.sort(key=lambda one: (one[0].mean_cost, -one[0].accuracy))
        self.kept: list[tuple[Outcome, tuple[float, ...]]] = []
        for one in tried:
            if not self.kept or one[0].accuracy > self.kept[-1][0].accuracy:
                self.kept.append(one)
        self.costs = torch.tensor([outcome.mean_cost for outcome, _ in self.kept], dtype=torch.double)
        self.accuracies = torch.tensor([outcome.accuracy for outcome, _ in self.kept], dtype=torch.double)

    def _tried(self) -> Iterator[tuple[float, ...]]:
        exits = len(self.predicted)
        subsets: list[Sequence[int]] = [range(i, j) for i, j in combinations(range(exits + 1), 2)]
        if exits <= _ALL_SUBSETS:
            subsets = [some for size in range(1, exits + 1) for some in combinations(range(exits), size)]
        yield (math.inf,) * exits
        for some in subsets:
            for t in range(1, len(some) + 1):
                yield tuple(float(t) if k in some else math.inf for k in range(exits))

    def exit_index(self, i: int) -> Tensor:
        return self.kept[i][0].exit_index

    def thresholds(self, i: int) -> tuple[float, ...]:
        return self.kept[i][1]

    def left(self, thresholds: Sequence[float]) -> Tensor:
        before, left = None, []
        for predicted, threshold in zip(self.predicted, thresholds, strict=True):
            if threshold < math.inf:
                before = streak(predicted, before)
                left.append(before[:, 1] >= threshold)
            else:
                left.append(torch.zeros(len(predicted), dtype=torch.bool))
        return torch.stack(left)


def _check(table: Table, budget: float | None, accuracy_drop: float | None, slack: float) -> None:
    if (budget is None) == (accuracy_drop is None):
        raise ValueError(f"budget={budget}, accuracy_drop={accuracy_drop}: pass exactly one of them")
    if budget is not None:
        real_number(budget, "budget is the largest mean cost per sample, a positive number", above=0)
    if accuracy_drop is not None:
        real_number(accuracy_drop, "accuracy_drop is a fraction of the samples: 0.003 for 0.3 points", least=0, below=1)
    real_number(slack, "slack is a number of standard errors, 0 for none", least=0)
    if table.samples < _FEWEST:
        raise ValueError(
            f"{table.samples} samples are too few for a calibration: pass at least {_FEWEST}, better 2,000"
        )


def _check_rule(table: Table, rule: Rule, temperature: bool) -> None:
    if rule == "custom":
        return
    if not table.logits:
        raise ValueError(f'rule="{rule}": the table has no logits; pass rule="custom" for scores of your own')
    if table.targets is None and temperature and rule != "patience":
        raise ValueError("The table has no targets, which temperatures are fitted to: pass them, or temperature=False")


def _cross_fitted(table: Table, rule: Rule, seed: int) -> tuple[tuple[float, ...], Tensor]:
    """Return temperatures, and the scores that each half of the samples gets with those of the other half."""
    assert table.targets is not None
    order = torch.randperm(table.samples, generator=torch.Generator().manual_seed(seed))
    order = order[table.targets.cpu()[order].argsort(stable=True)]  # dealt out class by class
    scores = torch.empty(len(table.heads), table.samples)
    fitted, notes = [], {}
    for half, other in ((order[::2], order[1::2]), (order[1::2], order[::2])):
        here, there = table.part(half), table.part(other)
        assert here.targets is not None
        found = {name: fit(z, here.targets, name=name) for name, z in named(here.logits)}
        notes.update({name: note for name, (_, note) in found.items() if note})
        fitted.append([temperature for temperature, _ in found.values()])
        scores[:, other] = there.confidences(rule, fitted[-1])
    for note in notes.values():
        warnings.warn(note, stacklevel=3)
    return tuple(2 / (1 / one + 1 / two) for one, two in zip(*fitted, strict=True)), scores


def _within(costs: Tensor, budget: float, table: Table, unit: Unit) -> int:
    least, full = float(costs[0]), sum(table.stages)
    if budget < least * (1 - 1e-9):
        raise ValueError(
            f"budget={budget:.6g} {unit}: where all samples leave as early as they can, they cost {least:.6g} "
            "in the mean. Pass at least that, or add an earlier exit"
        )
    if budget >= full:
        warnings.warn(
            f"budget={budget:.6g} {unit}: the full network costs {full:.6g}, so that the budget bounds nothing. "
            "The rule is the most accurate one",
            stacklevel=3,
        )
    elif float(costs[-1]) < (1 - _UNSPENT) * budget:
        warnings.warn(
            f"budget={budget:.6g} {unit}: the most accurate thresholds cost {float(costs[-1]):.6g} in the mean, so "
            "that the rest of the budget stays unspent",
            stacklevel=3,
        )
    return int((costs <= budget * (1 + 1e-9)).sum()) - 1


def _allowed(choices: _Choices, right: Tensor, drop: float, slack: float) -> int | None:
    """Return the cheapest choice whose drop is allowed, or else the safest, or None for the full network."""
    samples, full = right.shape[1], float(right[-1].mean())

    def with_slack(i: int) -> tuple[float, float]:
        index = choices.exit_index(i)
        lost = right[-1] - right.gather(0, index[None])[0]
        unseen = 1 if bool((index < len(right) - 1).any()) else 0  # one more sample may differ
        squares = float((lost - lost.mean()).square().sum()) + unseen
        error = slack * math.sqrt(squares) / samples
        return float(lost.mean()) + error, error

    close = (choices.accuracies >= full - drop - _TOLERANCE).nonzero()[:, 0]
    tried: list[int] = close[torch.linspace(0, len(close) - 1, min(len(close), _TRIED)).long()].tolist()
    risks = [with_slack(i) for i in tried]
    for before, i, (worst, _) in zip([-1, *tried], tried, risks, strict=False):
        if worst <= drop + 1e-12:
            while i - before > 1:  # one between two of those that were tried may do
                middle = (before + i) // 2
                before, i = (before, middle) if with_slack(middle)[0] <= drop + 1e-12 else (middle, i)
            return i
    said = (
        f"accuracy_drop={drop}: on {samples} samples no thresholds are within it with {slack} standard errors to spare."
    )
    (worst, error), safest = min(zip(risks, tried, strict=True), default=((math.inf, 0.0), 0))
    if worst > drop + _TOLERANCE:
        said += " Every exit is closed. Allow more, pass more samples, or a smaller slack"
        warnings.warn(said, stacklevel=3)
        return None
    warnings.warn(f"{said} The safest ones lose {worst - error:.4f}, with an error of {error:.4f}", stacklevel=3)
    return safest


def _advantages(outcome: Outcome, right: Tensor) -> tuple[float, ...]:
    """Return by how much each exit is more often right than the full network, among those that leave there."""
    gained = right[:-1] - right[-1]
    return tuple(float(torch.where(outcome.exit_index == k, one, 0.0).mean()) for k, one in enumerate(gained))


def _frontier(choices: _Choices) -> list[tuple[Outcome, tuple[float, ...]]]:
    """Return a few of the choices, evenly spaced in cost: what they do to the table, and their thresholds."""
    wanted = torch.linspace(float(choices.costs[0]), float(choices.costs[-1]), _POINTS, dtype=torch.double)
    indices = sorted({max(int((choices.costs <= cost).sum()) - 1, 0) for cost in wanted})
    points = [(choices.outcome(at), at) for at in map(choices.thresholds, indices)]
    points.sort(key=lambda point: (point[0].mean_cost, -point[0].accuracy))
    kept: list[tuple[Outcome, tuple[float, ...]]] = []
    for outcome, at in points:
        if not kept or outcome.accuracy > kept[-1][0].accuracy:
            kept.append((outcome, at))
    return kept
