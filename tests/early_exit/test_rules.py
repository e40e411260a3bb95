"""Scores against a loop by hand; what leaves, and what never does; a rule as plain data."""

from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_compress.early_exit.rules import ExitRule, Rule, exit_costs, leaves, predict, score

INF, NAN = math.inf, math.nan


def by_hand(row: list[float], rule: str, temperature: float) -> float:
    weights = [math.exp(z / temperature) for z in row]
    p = sorted((w / sum(weights) for w in weights), reverse=True)
    if rule == "entropy":
        return 1 - sum(-q * math.log(q) for q in p if q) / math.log(len(p))
    return p[0] if rule == "confidence" else p[0] - p[1]


def patient(*thresholds: float) -> ExitRule:
    return ExitRule(rule="patience", thresholds=thresholds, temperatures=(1.0,) * (len(thresholds) + 1))


@pytest.mark.parametrize("rule", ["confidence", "entropy", "margin"])
@settings(max_examples=30, deadline=None)
@given(
    rows=st.lists(st.lists(st.floats(-20, 20, width=32), min_size=3, max_size=3), min_size=1, max_size=5),
    temperature=st.floats(0.25, 4),
)
def test_scores_are_those_of_a_loop(rule: Rule, rows: list[list[float]], temperature: float) -> None:
    expected = [by_hand(row, rule, temperature) for row in rows]
    got = score(torch.tensor(rows), rule, temperature)
    torch.testing.assert_close(got, torch.tensor(expected), rtol=0, atol=2e-6)


@pytest.mark.parametrize("rule", ["confidence", "entropy", "margin"])
def test_half_precision_is_scored_in_float32(rule: Rule) -> None:
    logits = torch.randn(50, 10, generator=torch.Generator().manual_seed(0)).mul(5).bfloat16()
    got = score(logits, rule, 1.3)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, score(logits.double(), rule, 1.3), rtol=0, atol=0)


@pytest.mark.parametrize("rule", ["confidence", "entropy", "margin", "patience"])
@pytest.mark.parametrize("bad", [[NAN, 0.0], [INF, 0.0], [-INF, -INF], [NAN, NAN]])
def test_logits_that_are_no_numbers_never_leave(rule: Rule, bad: list[float]) -> None:
    lowest = 1.0 if rule == "patience" else -INF
    exits = ExitRule(rule=rule, thresholds=(lowest, lowest), temperatures=(1.0, 1.0, 1.0))
    logits = torch.tensor([bad, [1.0, 0.0]])
    left, before = leaves(exits, 0, logits)
    assert left.tolist() == [False, True]
    assert leaves(exits, 1, logits, before=before)[0].tolist() == [False, True]


def test_a_forbidden_class_is_a_class_of_probability_zero() -> None:
    logits = torch.tensor([[0.0, 0.0, -INF, -INF]])
    assert score(logits, "confidence").item() == pytest.approx(0.5)
    assert score(logits, "entropy").item() == pytest.approx(0.5)  # log 2 of log 4
    assert predict(logits).item() in (0, 1)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(st.integers(0, 2), min_size=4, max_size=4), min_size=1, max_size=6))
def test_patience_counts_equal_predictions_in_a_row(predictions: list[list[int]]) -> None:
    before: Tensor | None = None
    for k in range(4):
        lengths = []
        for row in predictions:
            length = 1
            while length <= k and row[k - length] == row[k]:
                length += 1
            lengths.append(length)
        left, before = leaves(patient(2, 2, 2, 2), k, torch.eye(3)[[row[k] for row in predictions]], before=before)
        assert before is not None
        assert before[:, 1].tolist() == lengths
        assert left.tolist() == [length >= 2 for length in lengths]


def test_a_callable_of_the_user_replaces_the_score() -> None:
    rule = ExitRule(rule="custom", thresholds=(-0.5,), temperatures=(1.0, 1.0))
    boxes = {"spread": torch.tensor([0.1, 0.9, NAN], dtype=torch.float64)}
    left, _ = leaves(rule, 0, boxes, confidence=lambda output: -output["spread"])
    assert left.tolist() == [True, False, False]


@pytest.mark.parametrize("rule", ["confidence", "entropy", "margin"])
@pytest.mark.parametrize(
    ("output", "shown"),
    [
        (torch.zeros(2, 5, 3), r"torch.float32 \(2, 5, 3\).*confidence="),
        (torch.zeros(2, 1), r"at least 2 classes"),
        (torch.zeros(2, 3, dtype=torch.long), "torch.int64"),
        ({"logits": 1}, "dict"),
    ],
)
def test_what_is_no_table_of_logits_is_refused(rule: Rule, output: object, shown: str) -> None:
    with pytest.raises(ValueError, match=shown):
        score(output, rule)


def test_a_callable_is_refused_where_none_is_wanted_and_missed_where_one_is() -> None:
    with pytest.raises(ValueError, match='rule="confidence" with confidence=<'):
        score(torch.zeros(2, 3), "confidence", confidence=lambda z: z[:, 0])
    with pytest.raises(ValueError, match='rule="custom" with confidence=None'):
        score(torch.zeros(2, 3), "custom")
    with pytest.raises(ValueError, match=r"returned \(2, 3\)"):
        score(torch.zeros(2, 3), "custom", confidence=lambda z: z)


def test_costs_count_the_heads_on_the_way() -> None:
    stages, heads = (10.0, 20.0, 30.0, 40.0), (1.0, 2.0, 3.0)
    for which in [(), (0,), (1,), (0, 2), (0, 1, 2)]:
        expected = []
        for k in range(4):
            on_the_way = sum(heads[j] for j in which if j < k)
            expected.append(sum(stages[: k + 1]) + on_the_way + (heads[k] if k < 3 else 0))
        assert exit_costs(stages, heads, which) == tuple(expected)


def rule_of_two(**changes: object) -> ExitRule:
    numbers = {
        "rule": "confidence",
        "thresholds": (0.9, INF),
        "temperatures": (1.5, 1.0, 1.25),
        "frontier": ((4.0, (-INF, INF)), (6.0, (0.9, INF)), (7.0, (INF, INF))),
        "unit": "ms",
        "stages": (4.0, 2.0, 1.0),
        "heads": (0.5, 0.25),
        "shares": (0.25, 0.0, 0.75),
    }
    return ExitRule(**(numbers | changes))  # type: ignore[arg-type]


def test_a_rule_survives_strict_json() -> None:
    rule = rule_of_two()
    record = json.loads(json.dumps(rule.to_dict(), allow_nan=False))
    assert ExitRule.from_dict(record) == rule
    assert hash(rule) == hash(ExitRule.from_dict(record))


@pytest.mark.parametrize(("budget", "first"), [(4.0, -INF), (5.9, -INF), (6.5, 0.9), (7.0, INF), (99.0, INF)])
def test_a_budget_picks_the_dearest_thresholds_that_it_pays_for(budget: float, first: float) -> None:
    assert rule_of_two().within(budget).thresholds[0] == first


def test_a_budget_below_the_frontier_is_refused() -> None:
    with pytest.raises(ValueError, match=r"budget=3.5: the cheapest thresholds cost 4 ms"):
        rule_of_two().within(3.5)
    with pytest.raises(ValueError, match="calibrate it first"):
        rule_of_two(frontier=()).within(5)


@pytest.mark.parametrize(
    ("changes", "shown"),
    [
        ({"rule": "certainty"}, "rule='certainty': pass one of confidence"),
        ({"unit": "s"}, "unit='s'"),
        ({"thresholds": (0.9, NAN)}, "nan"),
        ({"temperatures": (1.0, 1.0)}, "pass 3 numbers"),
        ({"temperatures": (1.0, 0.0, 1.0)}, "must be a positive number"),
        ({"heads": (1.0,)}, "heads=.*pass 2 numbers"),
        ({"frontier": ((2.0, (0.5, 0.5)), (1.0, (0.6, 0.6)))}, "must ascend"),
        ({"frontier": ((2.0, (0.5,)),)}, "each of 2 exits"),
        ({"rule": "patience"}, "exits in a row"),
    ],
)
def test_numbers_that_do_not_fit_are_refused(changes: dict[str, object], shown: str) -> None:
    with pytest.raises(ValueError, match=shown):
        rule_of_two(**changes)
