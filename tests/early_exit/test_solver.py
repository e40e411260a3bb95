"""The solver against all thresholds of small tables, by loops; what must hold for any table."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_compress.early_exit.solver import Solver, q_sweep_places, thresholds


def by_hand(
    scores: Tensor, right: Tensor, stages: Sequence[float], heads: Sequence[float], at: Sequence[float]
) -> tuple[float, float, list[int]]:
    """Return mean cost, accuracy and exits of each sample, one sample after the other."""
    cost, good, exits = 0.0, 0.0, []
    for i in range(scores.shape[1]):
        for k in range(len(heads) + 1):
            cost += stages[k]
            if k == len(heads):
                break
            if at[k] < math.inf:
                cost += heads[k]
                if float(scores[k, i]) >= at[k]:
                    break
        good += float(right[k, i])
        exits.append(k)
    return cost / scores.shape[1], good / scores.shape[1], exits


def random_table(exits: int, samples: int, seed: int, *, levels: int = 0) -> tuple[Tensor, Tensor]:
    """Return scores and right answers, in which sure exits are right more often; a few levels make ties."""
    g = torch.Generator().manual_seed(seed)
    scores = torch.rand(exits, samples, generator=g)
    chance = torch.cat([scores, torch.full((1, samples), 0.9)])
    right = (torch.rand(exits + 1, samples, generator=g) < chance).double()
    return ((scores * levels).floor() / levels if levels else scores), right


def every_place(scores: Tensor) -> list[list[float]]:
    return [[math.inf, *row[~row.isnan()].unique().tolist()] for row in scores]


@pytest.mark.parametrize("levels", [0, 3])
@pytest.mark.parametrize("exits", [1, 2, 3])
def test_it_finds_what_trying_all_thresholds_finds(exits: int, levels: int) -> None:
    stages, heads = [3.0, 1.0, 2.0, 4.0][: exits + 1], [0.3, 0.2, 0.4][:exits]
    missed = tried = 0
    for seed in range(6):
        scores, right = random_table(exits, {1: 40, 2: 14, 3: 7}[exits], seed, levels=levels)
        all_of_them = [by_hand(scores, right, stages, heads, at)[:2] for at in product(*every_place(scores))]
        all_of_them = [point for point in all_of_them if point[0] <= sum(stages) + 1e-9]
        solver = Solver(scores, right, stages, heads)
        found = solver.frontier()
        for rate in (0.003, 0.03, 0.1, 0.3):
            best = max(accuracy - rate * cost for cost, accuracy in all_of_them)
            mine = float((found.accuracies - rate * found.costs).max())
            assert mine <= best + 1e-9
            missed, tried = missed + (mine < best - 1e-9), tried + 1
        least = min(all_of_them)[0]
        for budget in (least + (sum(stages) - least) * step / 12 for step in range(13)):
            best = max(accuracy for cost, accuracy in all_of_them if cost <= budget + 1e-9)
            mine = float(found.accuracies[found.costs <= budget + 1e-9].max())
            assert mine <= best + 1e-9
            missed, tried = missed + (mine < best - 1e-9), tried + 1
    assert missed <= tried // 50


tables = st.tuples(st.integers(1, 4), st.integers(1, 40), st.integers(0, 10_000), st.sampled_from([0, 2, 5]))


@settings(max_examples=25, deadline=None)
@given(tables, st.booleans())
def test_the_frontier_ascends_and_says_what_a_loop_counts(shape: tuple[int, int, int, int], broken: bool) -> None:
    exits, samples, seed, levels = shape
    scores, right = random_table(exits, samples, seed, levels=levels)
    if broken:
        scores[seed % exits, :: 1 + seed % 3] = math.nan
    stages, heads = [2.0] + [1.5] * exits, [0.25] * exits
    solver = Solver(scores, right, stages, heads)
    found = solver.frontier()
    assert bool((found.costs.diff() > 0).all())
    assert bool((found.accuracies.diff() > 0).all())
    for i in {0, len(found.costs) // 2, len(found.costs) - 1}:
        at = thresholds(scores, solver.counts(found.places(i)))
        cost, accuracy, _ = by_hand(scores, right, stages, heads, at)
        assert cost <= float(found.costs[i]) + 1e-9  # an open exit at which nobody leaves is closed
        assert accuracy == pytest.approx(float(found.accuracies[i]))
    if not broken:
        assert float(found.costs[0]) == pytest.approx(stages[0] + heads[0])


@settings(max_examples=10, deadline=None)
@given(tables)
def test_the_order_of_samples_changes_nothing(shape: tuple[int, int, int, int]) -> None:
    exits, samples, seed, levels = shape
    scores, right = random_table(exits, samples, seed, levels=levels)
    order = torch.randperm(samples, generator=torch.Generator().manual_seed(seed))
    stages, heads = [2.0] + [1.5] * exits, [0.25] * exits
    one = Solver(scores, right, stages, heads).frontier()
    other = Solver(scores[:, order], right[:, order], stages, heads).frontier()
    assert torch.equal(one.costs, other.costs)
    assert torch.equal(one.accuracies, other.accuracies)
    places = one.places(len(one.costs) // 2)
    mine = Solver(scores, right, stages, heads).exit_index(places)
    assert torch.equal(mine[order], Solver(scores[:, order], right[:, order], stages, heads).exit_index(places))


def test_an_exit_whose_head_costs_more_than_it_saves_is_closed() -> None:
    scores, right = random_table(2, 500, 0)
    for heads in ([0.0, 50.0], [50.0, 0.0]):
        solver = Solver(scores, right, [1.0, 1.0, 1.0], heads)
        found = solver.frontier()
        dear = heads.index(50.0)
        assert all(found.places(i)[dear] == 0 for i in range(len(found.costs)))
        assert any(found.places(i)[1 - dear] for i in range(len(found.costs)))


def original(confidence: Tensor, q: float) -> list[float]:
    """The published code's thresholds, loop by loop; `confidence` is (K + 1, N)."""
    stages, samples = confidence.shape
    p = torch.exp(torch.log(torch.tensor([q])) * torch.arange(1, stages + 1))
    p /= p.sum()
    order = confidence.sort(dim=1, descending=True).indices
    gone, found = torch.zeros(samples), [1e8] * stages
    for k in range(stages - 1):
        count, out = 0, math.floor(samples * p[k])
        for i in range(samples):
            sample = order[k][i]
            if gone[sample] == 0:
                count += 1
                if count == out:
                    found[k] = float(confidence[k][sample])
                    break
        gone += (confidence[k] >= found[k]).type_as(gone)
    return [math.inf if t == 1e8 else t for t in found[:-1]]


@pytest.mark.parametrize("levels", [0, 8])
def test_the_q_sweep_is_that_of_the_published_code(levels: int) -> None:
    scores, right = random_table(4, 211, 3, levels=levels)
    solver = Solver(scores, right, [1.0] * 5, [0.1] * 4)
    swept = q_sweep_places(solver)
    assert [q for q, _ in swept] == [step / 20 for step in range(1, 40)]
    for q, places in swept:
        at = original(torch.cat([scores, torch.ones(1, 211)]), q)
        assert solver.exit_index(places).tolist() == by_hand(scores, right, [1.0] * 5, [0.1] * 4, at)[2]


@pytest.mark.parametrize("seed", range(4))
def test_it_is_at_least_as_accurate_as_the_q_sweep_at_every_budget(seed: int) -> None:
    scores, right = random_table(3, 400, seed, levels=[0, 20][seed % 2])
    solver = Solver(scores, right, [1.0, 2.0, 1.0, 3.0], [0.1, 0.2, 0.3])
    found = solver.frontier()
    better = 0
    for _, places in q_sweep_places(solver):
        cost, accuracy = solver.outcome(places)
        if cost > 7.0:  # more than the full network, for heads at which almost nobody leaves
            continue
        mine = float(found.accuracies[found.costs <= cost].max())
        assert mine >= accuracy
        better += mine > accuracy
    assert better > 25


def test_a_budget_is_met_closely() -> None:
    scores, right = random_table(3, 2000, 0)
    found = Solver(scores, right, [1.0, 2.0, 1.0, 3.0], [0.1, 0.2, 0.3]).frontier()
    for budget in torch.linspace(1.2, 3.0, 37).double():
        assert float(found.costs[found.costs <= budget].max()) > 0.995 * budget


def test_thresholds_lie_between_two_scores_in_float32() -> None:
    one = torch.tensor(1.0)
    scores = torch.stack([torch.nextafter(one, torch.tensor(0.0)), one, torch.tensor(math.nan), torch.tensor(0.5)])[
        None
    ]
    for count, left in ((0, 0), (1, 1), (2, 2), (3, 3), (4, 3)):
        (at,) = thresholds(scores, [count])
        assert int((scores >= at).sum()) == left
        assert torch.tensor(at, dtype=torch.float64) == torch.tensor(at, dtype=torch.float32)
