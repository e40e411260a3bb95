"""Thresholds that give the most accuracy for their cost, on a table of (score, right, cost).

A sample leaves at the first exit k whose score is at least T_k. For an exchange rate r of accuracy for cost,

    maximise over (T_1..T_K)    sum of right - r * sum of cost

is solved one exit at a time, exactly, with the others as they are: what each sample that arrives gains by leaving,
right here - right where it would leave later + r * cost saved, is summed in the order of the scores, and the largest
sum is the best T_k; an exit that gains less than its head costs is closed. Sweeps from the last exit to the first go on
until nothing changes, from the solutions next to this one and from all exits closed.

The rates are those of the lines between two solutions, so that they find the convex hull of (cost, accuracy). Budgets
between its corners are met by moving one threshold: all places of each of a corner's thresholds are candidates, and so
are the thresholds of MSDNet's sweep. The candidates that no cheaper one equals are the frontier, up to the cost of the
full network.

A place m of an exit stands for a threshold: samples with the m highest of its distinct scores leave, 0 closes it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Places = tuple[int, ...]
_CORNERS = 64  # of the hull: the range of costs is divided into as many parts
_MOVES = 1024  # places of one threshold that are candidates
_SWEEPS = 20


@dataclass(frozen=True)
class Frontier:
    """Candidates that no cheaper one equals, up to the cost of the full network: costs and accuracies ascend."""

    costs: Tensor
    accuracies: Tensor
    moves: Tensor  # (P, 3): a corner, an exit, and the place that replaces the corner's at that exit
    corners: tuple[Places, ...]

    def places(self, i: int) -> Places:
        """Return the places of a candidate."""
        corner, k, place = self.moves[i].tolist()
        return (*self.corners[corner][:k], place, *self.corners[corner][k + 1 :])


class Solver:
    """Finds thresholds for one table.

    Args:
        scores: (K, N). What is not a number never leaves.
        right: (K + 1, N), from 0 to 1.
        stages: Cost per sample of the K + 1 stages.
        heads: Cost per sample of the K heads.
    """

    def __init__(self, scores: Tensor, right: Tensor, stages: Sequence[float], heads: Sequence[float]) -> None:
        self.exits, self.samples = scores.shape
        self.right = right.double()
        self.stages, self.heads = [float(cost) for cost in stages], [float(cost) for cost in heads]
        ranked = [_ranks(row) for row in scores]
        self.order = torch.arange(self.samples)  # one that does not depend on that of the table, nor do rounded sums
        for row in (*self.right, *(ranks for ranks, _ in ranked)):
            self.order = self.order[row[self.order].argsort(stable=True)]
        self.right = self.right[:, self.order]
        self.ranks = [ranks[self.order] for ranks, _ in ranked]  # (N,): 0 for the highest score
        self.sizes = [size for _, size in ranked]  # how many distinct scores; the rank of what is not a number

    def exit_index(self, places: Places) -> Tensor:
        """Return where each sample of the table leaves, (N,), counted from 0."""
        return torch.empty_like(self.order).index_copy(0, self.order, self._leaving(places))

    def _leaving(self, places: Places) -> Tensor:
        index = torch.full((self.samples,), self.exits)
        for k in reversed(range(self.exits)):
            index[self.ranks[k] < places[k]] = k
        return index

    def outcome(self, places: Places) -> tuple[float, float]:
        """Return mean cost and accuracy."""
        cost, right = self._totals(places)
        return cost / self.samples, right / self.samples

    def _totals(self, places: Places) -> tuple[float, float]:
        index = self._leaving(places)
        arriving = self.samples - torch.cat([torch.zeros(1).long(), index.bincount(minlength=self.exits + 1).cumsum(0)])
        costs = [self.stages[k] + self._head(k, places) for k in range(self.exits + 1)]
        cost = sum(count * each for count, each in zip(arriving.tolist(), costs, strict=False))
        return cost, float(self.right.gather(0, index[None]).sum())

    def counts(self, places: Places) -> list[int]:
        """Return how many samples leave at each exit."""
        return self.exit_index(places).bincount(minlength=self.exits + 1).tolist()[:-1]

    def solve(self, rate: float, starts: Iterable[Places]) -> tuple[Places, float]:
        """Return the best places for an exchange rate, and their mean of right - rate * cost."""
        best: tuple[Places, float] | None = None
        for places in starts:
            value = -math.inf
            for _ in range(_SWEEPS):
                after, reached = self._sweep(places, rate)
                if reached <= value + 1e-12 * abs(value):
                    break
                places, value = after, reached
            if best is None or value > best[1]:
                best = places, value
        assert best is not None
        return best

    def frontier(self) -> Frontier:
        """Return the best candidates, from the cheapest to the most accurate."""
        closed: Places = (0,) * self.exits
        sweep = [places for _, places in q_sweep_places(self)]
        cheap, _ = self.solve(2 / min(cost for cost in self.stages if cost), [closed])
        sure, _ = self.solve(1e-9 / sum(self.stages), [closed, cheap, *sweep[::6]])
        corners = {places: self.outcome(places) for places in (cheap, sure)}
        smallest = (corners[sure][0] - corners[cheap][0]) / _CORNERS
        pairs = [(cheap, sure)]
        while pairs:
            one, other = pairs.pop()
            (cost, accuracy), (more, better) = corners[one], corners[other]
            if more - cost <= smallest or better <= accuracy:
                continue
            rate = (better - accuracy) / (more - cost)
            found, value = self.solve(rate, [one, other, closed])
            if value > accuracy - rate * cost + 1e-9 and found not in corners:
                corners[found] = self.outcome(found)
                pairs += [(one, found), (found, other)]
        return self._candidates([*corners, *sweep, closed], moved=len(corners))

    def _candidates(self, corners: list[Places], moved: int) -> Frontier:
        points = [self.outcome(places) for places in corners]
        costs, accuracies = ([torch.tensor(column, dtype=torch.double)] for column in zip(*points, strict=True))
        moves = [torch.tensor([[i, 0, places[0]] for i, places in enumerate(corners)])]
        for i, places in enumerate(corners[:moved]):
            for k in range(self.exits):
                cost, accuracy = self._moved(places, k)
                at = torch.linspace(0, len(cost) - 1, min(len(cost), _MOVES)).round().long()
                costs.append(cost[at])
                accuracies.append(accuracy[at])
                moves.append(torch.stack([torch.full_like(at, i), torch.full_like(at, k), at + 1], 1))
        cost, accuracy, move = torch.cat(costs), torch.cat(accuracies), torch.cat(moves)
        order = accuracy.argsort(descending=True, stable=True)
        order = order[cost[order].argsort(stable=True)]
        cost, accuracy, move = cost[order], accuracy[order], move[order]
        before = torch.cat([torch.tensor([-1.0], dtype=torch.double), accuracy.cummax(0).values[:-1]])
        keep = (accuracy > before + 1e-12) & (cost <= sum(self.stages) * (1 + 1e-12))
        return Frontier(cost[keep], accuracy[keep], move[keep], tuple(corners))

    def _sweep(self, places: Places, rate: float) -> tuple[Places, float]:
        """Set each exit's place to the best one, from the last exit to the first."""
        after = list(places)
        arriving = self._arriving(places)
        value = self.right[-1] - rate * self.stages[-1]  # of a sample that goes on
        for k in reversed(range(self.exits)):
            gains = self._by_place(k, (self.right[k] - value) * arriving[k])
            best = int(gains.argmax()) if len(gains) else 0
            pays = len(gains) > 0 and float(gains[best]) > rate * self.heads[k] * float(arriving[k].sum()) + 1e-12
            after[k] = best + 1 if pays else 0
            value = torch.where(self.ranks[k] < after[k], self.right[k], value)
            value = value - rate * (self.stages[k] + self._head(k, after))
        return tuple(after), float(value.mean())

    def _moved(self, places: Places, k: int) -> tuple[Tensor, Tensor]:
        """Return mean costs and accuracies with each place of one exit but 0, the others as they are."""
        arriving = self._arriving(places)[k]
        right, cost = self.right[-1], torch.full((self.samples,), self.stages[-1], dtype=torch.double)  # going on
        for j in reversed(range(k + 1, self.exits)):
            left = self.ranks[j] < places[j]
            right = torch.where(left, self.right[j], right)
            cost = cost.masked_fill(left, 0) + self.stages[j] + self._head(j, places)
        total_cost, total_right = self._totals((*places[:k], 0, *places[k + 1 :]))
        total_cost += self.heads[k] * float(arriving.sum())
        return (
            (total_cost - self._by_place(k, cost * arriving)) / self.samples,
            (total_right + self._by_place(k, (self.right[k] - right) * arriving)) / self.samples,
        )

    def _by_place(self, k: int, amounts: Tensor) -> Tensor:
        """Return the sum of amounts over the samples that leave, for the places 1, 2, ... of an exit."""
        return self.ranks[k].bincount(amounts, self.sizes[k] + 1)[: self.sizes[k]].cumsum(0)

    def _arriving(self, places: Places) -> list[Tensor]:
        """Return which samples arrive at each exit."""
        arriving = [torch.ones(self.samples, dtype=torch.bool)]
        for k in range(self.exits):
            arriving.append(arriving[-1] & (self.ranks[k] >= places[k]))
        return arriving

    def _head(self, k: int, places: Sequence[int]) -> float:
        return self.heads[k] if k < self.exits and places[k] else 0.0


def q_sweep_places(solver: Solver) -> list[tuple[float, Places]]:
    """Return (q, places) of MSDNet's budgeted batches: exit k gets a share of the samples that is proportional to q^k.

    As its code has it: q = 1/20 .. 39/20; at exit k = 1..K the surest floor(N p_k) of those that are left leave, with
    all that are as sure; none where that is 0, or more than are left.
    """
    found = []
    for step in range(1, 40):
        q = step / 20
        shares = [q**k for k in range(1, solver.exits + 2)]
        stay, places = torch.ones(solver.samples, dtype=torch.bool), []
        for k in range(solver.exits):
            count = math.floor(solver.samples * shares[k] / sum(shares))
            ranks = solver.ranks[k][stay].sort().values
            place = int(ranks[count - 1]) + 1 if 0 < count <= len(ranks) else 0
            places.append(min(place, solver.sizes[k]))
            stay &= solver.ranks[k] >= places[k]
        found.append((q, tuple(places)))
    return found


def thresholds(scores: Tensor, counts: Sequence[int]) -> tuple[float, ...]:
    """Return the thresholds at which as many samples leave at each exit, and a few more where scores are equal.

    A threshold is half-way between the last score that leaves and the next: new samples fall on either side. It is
    -inf where all samples leave that arrive, and inf at an exit where none leaves.

    Args:
        scores: (K, N), in float32.
        counts: How many samples shall leave at each exit; those that leave too early are missing later.

    Example:
        >>> thresholds(torch.tensor([[0.9, 0.7, 0.5, 0.1], [0.0, 0.0, 0.2, 0.6]]), [2, 1])
        (0.6000000238418579, 0.4000000059604645)
    """
    found, planned = [], 0
    stay = ~torch.zeros(scores.shape[1], dtype=torch.bool)
    for row, count in zip(scores.float(), counts, strict=True):
        planned += count
        arriving = row[stay & ~row.isnan()].sort(descending=True).values
        wanted = min(planned - int((~stay).sum()), len(arriving)) if count else 0
        if wanted <= 0:
            found.append(math.inf)
            continue
        last = arriving[wanted - 1]
        rest = arriving[arriving < last]
        middle = (last + rest[0]) / 2 if len(rest) else torch.tensor(-math.inf)
        found.append(float(middle if not len(rest) or rest[0] < middle <= last else last))
        stay &= ~(row >= found[-1])
    return tuple(found)


def _ranks(scores: Tensor) -> tuple[Tensor, int]:
    """Return the rank of each score among the distinct ones, 0 for the highest, and how many these are."""
    known = ~scores.isnan()
    distinct, ranks = torch.unique(-scores[known], return_inverse=True)
    found = torch.full(scores.shape, len(distinct))
    found[known] = ranks
    return found, len(distinct)
