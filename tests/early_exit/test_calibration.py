"""A calibration against loops by hand; what it refuses and says; whether it holds on samples that it has not seen."""

from __future__ import annotations

import json
import math
import warnings
from dataclasses import replace
from itertools import combinations

import pytest
import torch
from torch import Tensor

from lightning_compress.early_exit import ExitRule, Outcome, Table, calibrate, evaluate, leaves, q_sweep, score
from lightning_compress.early_exit.rules import Rule

STAGES, HEADS = (2.0, 1.0, 1.0, 1.0), (0.1, 0.05, 0.05)


def drawn(samples: int, seed: int, *, classes: int = 5, easy: float = 2.0) -> Table:
    """Return a table of three exits that get better, whose logits are too large and share most of their noise."""
    g = torch.Generator().manual_seed(seed)
    targets = torch.randint(classes, (samples,), generator=g)
    ease, shared = torch.randn(samples, generator=g), torch.randn(samples, classes, generator=g)
    logits = []
    for k in range(4):
        z = 0.8 * shared + 0.6 * torch.randn(samples, classes, generator=g)
        z[torch.arange(samples), targets] += (easy + 0.5 * k + ease).clamp(min=0)
        logits.append((2 + k) * z)
    return Table(logits=logits, targets=targets, stages=STAGES, heads=HEADS)


def one_by_one(table: Table, rule: ExitRule) -> Outcome:
    """Run a rule as a network does with a batch of one."""
    assert table.targets is not None
    index, cost, right = [], 0.0, 0
    for i in range(table.samples):
        before, at = None, 0
        for k in range(4):
            cost += table.stages[k]
            at = k
            if k in rule.open:
                cost += table.heads[k]
                left, before = leaves(rule, k, table.logits[k][i : i + 1], before=before)
                if left.item():
                    break
        index.append(at)
        right += int(table.logits[at][i].argmax() == table.targets[i])
    exits = torch.tensor(index)
    shares = tuple((exits.bincount(minlength=4) / table.samples).tolist())
    return Outcome(accuracy=right / table.samples, mean_cost=cost / table.samples, shares=shares, exit_index=exits)


@pytest.fixture(scope="module")
def table() -> Table:
    return drawn(600, 0)


@pytest.mark.filterwarnings("ignore:No sample leaves")
@pytest.mark.parametrize("rule", ["confidence", "entropy", "margin", "patience"])
def test_evaluating_is_running_the_rule_one_by_one(table: Table, rule: Rule) -> None:
    found = calibrate(table, budget=3.4, rule=rule)
    got, expected = evaluate(table, found), one_by_one(table, found)
    assert got.exit_index.tolist() == expected.exit_index.tolist()
    assert got.mean_cost == pytest.approx(expected.mean_cost)
    assert got.accuracy == pytest.approx(expected.accuracy)
    assert got.shares == pytest.approx(expected.shares)
    assert found.shares == pytest.approx(got.shares)
    assert found.rule == rule
    assert found.costs[-1] == pytest.approx(5 + sum(HEADS[k] for k in found.open))


@pytest.mark.filterwarnings("ignore:No sample leaves")
@pytest.mark.parametrize("rule", ["confidence", "entropy", "margin", "patience"])
def test_no_budget_is_exceeded_and_a_larger_one_is_never_worse(table: Table, rule: Rule) -> None:
    before = 0.0
    for budget in (2.1, 3.0, 4.0, 4.9):
        found = calibrate(table, budget=budget, rule=rule, temperature=False)
        outcome = evaluate(table, found)
        assert outcome.mean_cost <= budget + 1e-9
        assert outcome.accuracy >= before
        before = outcome.accuracy
        with_temperatures = evaluate(table, calibrate(table, budget=budget, rule=rule))
        assert with_temperatures.mean_cost <= budget + 1e-9
        if rule != "patience" and budget < 3.5:
            assert outcome.mean_cost > 0.98 * budget
            assert with_temperatures.mean_cost > 0.98 * budget


@pytest.mark.parametrize("seed", range(3))
def test_it_beats_the_q_sweep_at_its_budgets(seed: int) -> None:
    table, better = drawn(500, seed), 0
    for cost, accuracy, thresholds in q_sweep(table)[::4]:
        rule = ExitRule(rule="confidence", thresholds=thresholds, temperatures=(1.0,) * 4)
        outcome = evaluate(table, rule)
        assert (outcome.mean_cost, outcome.accuracy) == pytest.approx((cost, accuracy))
        if cost <= 5:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                mine = evaluate(table, calibrate(table, budget=cost, temperature=False))
            assert mine.accuracy >= accuracy - 1e-12
            assert mine.mean_cost <= cost + 1e-9
            better += mine.accuracy > accuracy
    assert better >= 4


def test_the_q_sweep_closes_an_exit_whose_share_is_less_than_a_sample(table: Table) -> None:
    swept = q_sweep(table.part(torch.arange(20)))
    assert swept[0].thresholds[1:] == (math.inf, math.inf)  # q = 0.05: 95 %, then 4.75 % of 20
    assert swept[0].mean_cost == pytest.approx((19 * 2.1 + 1 * 5.1) / 20)


@pytest.mark.filterwarnings("ignore:No sample leaves")
def test_patience_is_the_best_of_all_open_exits_and_lengths(table: Table) -> None:
    tried = []
    for size in range(4):
        for some in combinations(range(3), size):
            for t in range(1, size + 1):
                thresholds = tuple(float(t) if k in some else math.inf for k in range(3))
                rule = ExitRule(rule="patience", thresholds=thresholds, temperatures=(1.0,) * 4)
                outcome = one_by_one(table, rule)
                tried.append((outcome.mean_cost, outcome.accuracy))
    for budget in (2.2, 3.2, 3.4, 4.9):
        best = max(accuracy for cost, accuracy in tried if cost <= budget)
        assert evaluate(table, calibrate(table, budget=budget, rule="patience")).accuracy == pytest.approx(best)


@pytest.mark.filterwarnings("ignore:No sample leaves")
def test_a_larger_drop_is_never_dearer_and_none_is_exceeded_without_slack(table: Table) -> None:
    full = float(table.quality()[-1].mean())
    before = math.inf
    for drop in (0.0, 0.01, 0.03, 0.1):
        outcome = evaluate(table, calibrate(table, accuracy_drop=drop, slack=0.0, temperature=False))
        assert outcome.accuracy >= full - drop - 1e-9
        assert outcome.mean_cost <= before
        before = outcome.mean_cost
        careful = evaluate(table, calibrate(table, accuracy_drop=drop, temperature=False))
        assert careful.mean_cost >= outcome.mean_cost


@pytest.mark.filterwarnings("ignore:No sample leaves")
def test_promises_hold_on_samples_never_used() -> None:
    test = drawn(20_000, 99, easy=3.0)
    full = float(test.quality()[-1].mean())
    drops = []
    for seed in range(3):
        table = drawn(3000, seed, easy=3.0)
        found = calibrate(table, budget=2.5, seed=seed)
        assert evaluate(test, found).mean_cost == pytest.approx(2.5, rel=0.03)
        drops.append(full - evaluate(test, calibrate(table, accuracy_drop=0.01, seed=seed)).accuracy)
    assert max(drops) < 0.01 + 0.003
    assert sum(drops) / 3 > 0.005  # and not for being too careful


@pytest.mark.filterwarnings("ignore:No sample leaves")
def test_temperatures_come_from_the_other_half(table: Table) -> None:
    found = calibrate(table, budget=3.0)
    assert found.temperatures != (1.0,) * 4
    assert all(one < other for one, other in zip(found.temperatures, found.temperatures[1:], strict=False))
    assert calibrate(table, budget=3.0) == found
    assert calibrate(table, budget=3.0, seed=1) != found
    state = torch.get_rng_state()
    calibrate(table, budget=3.0)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.filterwarnings("ignore:No sample leaves")
def test_the_frontier_is_a_few_points_that_a_budget_picks_from(table: Table) -> None:
    found = calibrate(table, budget=3.0)
    assert 10 <= len(found.frontier) <= 30
    assert found.frontier[0][0] == pytest.approx(2.1)
    assert found.frontier[0][1] == (-math.inf, math.inf, math.inf)
    accuracies = []
    right = table.quality()
    for i, (cost, thresholds) in enumerate(found.frontier):
        outcome = evaluate(table, replace(found, thresholds=thresholds, shares=()))
        assert outcome.mean_cost == pytest.approx(cost)
        assert found.within(cost).shares == found.frontier_shares[i] == outcome.shares
        for k, advantage in enumerate(found.within(cost).advantages):
            there = outcome.exit_index == k
            assert advantage == pytest.approx(float((right[k] - right[-1])[there].sum()) / table.samples)
        accuracies.append(outcome.accuracy)
    assert accuracies == sorted(accuracies)
    assert evaluate(table, found.within(2.6)).mean_cost == pytest.approx(2.6, rel=0.03)
    assert ExitRule.from_dict(json.loads(json.dumps(found.to_dict(), allow_nan=False))) == found


def test_exits_at_which_nobody_leaves_are_said_and_their_heads_are_not_paid(table: Table) -> None:
    dear = replace(table, heads=(0.1, 40.0, 0.05))
    with pytest.warns(UserWarning, match="No sample leaves at exit 2 of 3"):
        found = calibrate(dear, budget=3.0)
    assert found.thresholds[1] == math.inf
    assert found.open == (0, 2)
    assert evaluate(dear, found).mean_cost == pytest.approx(3.0, rel=0.01)


@pytest.mark.filterwarnings("ignore:No sample leaves")
def test_stages_that_measure_as_nothing_cost_nothing(table: Table) -> None:
    free = replace(table, stages=(0.0, 1.0, 0.0, 2.0))
    found = calibrate(free, budget=1.0)
    assert evaluate(free, found).mean_cost <= 1.0
    assert evaluate(free, found).accuracy > float(table.quality()[0].mean())


def test_ties_leave_together_and_the_budget_still_holds() -> None:
    table = drawn(300, 1)
    tied = replace(table, logits=[(z / 2).round() for z in table.logits])
    for budget in (2.3, 3.0, 4.0):
        assert evaluate(tied, calibrate(tied, budget=budget)).mean_cost <= budget + 1e-9


@pytest.mark.filterwarnings("ignore:No sample leaves")
def test_samples_without_finite_logits_go_to_the_end(table: Table) -> None:
    logits = [z.clone() for z in table.logits]
    for z in logits[:-1]:
        z[:50] = math.nan
    broken = replace(table, logits=logits)
    found = calibrate(broken, budget=2.6)
    assert bool((evaluate(broken, found).exit_index[:50] == 3).all())
    with pytest.raises(ValueError, match=r"cost 2\.\d+ in the mean"):
        calibrate(broken, budget=2.15)


def spread_scores(table: Table) -> tuple[Tensor, Tensor]:
    scores = torch.stack([score(z, "margin", 2.0) for z in table.logits[:-1]])
    return scores, table.quality()


@pytest.mark.filterwarnings("ignore:No sample leaves")
def test_scores_of_the_user_and_a_quality_need_no_logits(table: Table) -> None:
    scores, right = spread_scores(table)
    own = Table(stages=STAGES, heads=HEADS, scores=scores, right=right)
    found = calibrate(own, budget=3.0, rule="custom")
    outcome = evaluate(own, found)
    index = torch.full((600,), 3)
    for k in (2, 1, 0):
        index[scores[k] >= found.thresholds[k]] = k
    assert outcome.exit_index.tolist() == index.tolist()
    assert outcome.accuracy == pytest.approx(float(right.gather(0, index[None]).mean()))
    assert outcome.mean_cost == pytest.approx(3.0, rel=0.01)
    infinite = replace(own, scores=scores.masked_fill(scores > 0.9, math.inf))
    assert evaluate(infinite, calibrate(infinite, budget=3.0, rule="custom")).mean_cost == pytest.approx(3.0, rel=0.01)


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        ({}, "budget=None, accuracy_drop=None: pass exactly one"),
        ({"budget": 3.0, "accuracy_drop": 0.1}, "budget=3.0, accuracy_drop=0.1: pass exactly one"),
        ({"budget": 2.05}, r"budget=2.05 macs: where all samples leave as early as they can, they cost 2.1"),
        ({"budget": -1.0}, "budget is the largest .* got -1.0"),
        ({"budget": math.nan}, "budget is the largest .* got nan"),
        ({"accuracy_drop": 1.5}, r"accuracy_drop is a fraction .* 0.003 for 0.3 points; got 1.5"),
        ({"accuracy_drop": -0.1}, "accuracy_drop .* got -0.1"),
        ({"accuracy_drop": 0.1, "slack": -1.0}, "slack is .* got -1.0"),
        ({"budget": 3.0, "rule": "custom"}, "the table has no scores"),
        ({"budget": 3.0, "rule": "gut"}, "rule='gut'"),
        ({"budget": 3.0, "unit": "joule"}, "unit='joule'"),
    ],
)
def test_what_cannot_be_calibrated_is_refused(table: Table, arguments: dict[str, float], shown: str) -> None:
    with pytest.raises(ValueError, match=shown):
        calibrate(table, **arguments)  # type: ignore[arg-type]


def test_a_budget_above_the_full_network_is_said(table: Table) -> None:
    with pytest.warns(UserWarning, match="the full network costs 5, so that the budget bounds nothing"):
        found = calibrate(table, budget=5.5, temperature=False)
    assert evaluate(table, found).mean_cost <= 5
    assert evaluate(table, found).accuracy >= float(table.quality()[-1].mean())


def test_a_budget_that_the_most_accurate_thresholds_do_not_spend_is_said(
    table: Table, recwarn: pytest.WarningsRecorder
) -> None:
    most = calibrate(table, budget=5.5, temperature=False).frontier[-1][0]
    for budget, times in ((most * 0.9, 0), (most * 1.01, 0), ((most + 5) / 2, 1)):
        recwarn.clear()
        found = calibrate(table, budget=budget, temperature=False)
        said = [str(one.message) for one in recwarn if "stays unspent" in str(one.message)]
        assert len(said) == times
        assert all(f"{evaluate(table, found).mean_cost:.6g} in the mean" in one for one in said)


def test_where_a_drop_cannot_quite_be_shown_the_safest_thresholds_are_taken() -> None:
    table = drawn(600, 3)
    with pytest.warns(UserWarning, match=r"within it with 1.0 standard errors to spare. The safest ones lose -0.0033"):
        found = calibrate(table, accuracy_drop=0.0, temperature=False)
    assert evaluate(table, found).mean_cost < 4
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cheaper = calibrate(table, accuracy_drop=0.02, temperature=False)
    assert evaluate(table, cheaper).mean_cost < evaluate(table, found).mean_cost


def test_where_no_drop_can_be_shown_every_exit_is_closed() -> None:
    table = drawn(100, 7, easy=1.0)
    with pytest.warns(UserWarning, match=r"on 100 samples no thresholds .* Every exit is closed. Allow more") as said:
        found = calibrate(table, accuracy_drop=0.0, temperature=False)
    assert len(said) == 1
    assert found.thresholds == (math.inf,) * 3
    assert evaluate(table, found).mean_cost == 5
    assert found.frontier


def test_exits_that_are_all_wrong_are_closed(table: Table) -> None:
    wrong = replace(table, logits=[-z for z in table.logits[:-1]] + [table.logits[-1]])
    with pytest.warns(UserWarning, match="No sample leaves at exits 1, 2, 3 of 3"):
        found = calibrate(wrong, accuracy_drop=0.0, temperature=False)
    assert evaluate(wrong, found).accuracy == float(table.quality()[-1].mean())


@pytest.mark.parametrize("rule", ["confidence", "patience"])
def test_scores_of_the_user_want_the_rule_custom(table: Table, rule: Rule) -> None:
    scores, right = spread_scores(table)
    with pytest.raises(ValueError, match=f'rule="{rule}": the table has no logits'):
        calibrate(Table(stages=STAGES, heads=HEADS, scores=scores, right=right), budget=3.0, rule=rule)
    with pytest.raises(ValueError, match="no targets, which temperatures are fitted to"):
        calibrate(replace(table, targets=None, right=right), budget=3.0)


def test_too_few_samples_are_refused() -> None:
    with pytest.raises(ValueError, match="19 samples are too few"):
        calibrate(drawn(19, 0), budget=3.0)


@pytest.mark.parametrize(
    ("changes", "shown"),
    [
        ({"stages": (1.0, 2.0, 3.0)}, "one stage more than heads"),
        ({"heads": (1.0, -1.0, 1.0)}, "none negative"),
        ({"stages": (0.0, 0.0, 0.0, 0.0)}, "not all 0"),
        ({"logits": []}, "0 tensors of logits: pass 4"),
        ({"logits": [torch.zeros(600, 1)] * 4}, r"\(600, 1\)"),
        ({"logits": [torch.zeros(600, 3)] * 4}, "targets go from 0 to 4: expected classes from 0 to 2"),
        ({"targets": torch.zeros(600)}, "expected classes"),
        ({"targets": None}, "targets, or right="),
        ({"right": torch.full((4, 600), 2.0)}, "between 0 and 1"),
        ({"scores": torch.zeros(4, 600)}, r"expected \(3, 600\)"),
    ],
)
def test_a_table_that_does_not_fit_is_refused(table: Table, changes: dict[str, object], shown: str) -> None:
    with pytest.raises(ValueError, match=shown):
        replace(table, **changes)  # type: ignore[arg-type]
