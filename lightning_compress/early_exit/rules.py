"""Which samples leave at an exit: scores of confidence, and the thresholds that a calibration has found.

    confidence   max_c p_c                            p = softmax(z / T), z the logits of the exit, T its temperature
    entropy      1 + sum_c p_c log p_c / log C        0 where all C classes are equally likely, 1 where one is certain
    margin       p_1 - p_2                            the two most likely classes
    patience     how many exits in a row, this one included, predicted the same class
    custom       what a callable of the user returns, a number per sample

A sample leaves at the first exit k whose score is at least its threshold. Exits with a threshold of infinity are
closed: nobody leaves there, and their heads are not run, so that patience does not count them either. Scores are
computed in float32. A sample whose logits are not finite numbers never leaves early.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor

Rule: TypeAlias = Literal["confidence", "entropy", "margin", "patience", "custom"]
Unit: TypeAlias = Literal["macs", "ms"]
Confidence: TypeAlias = Callable[[Any], Tensor]  # from the output of a head to one number per sample, higher = surer


@dataclass(frozen=True, kw_only=True)
class ExitRule:
    """The rule by which samples leave early, with the numbers that a calibration has found.

    Args:
        rule: How the score of a sample is computed.
        thresholds: One per exit 1..K. A sample leaves at an exit if its score is at least this; inf: a closed exit.
        temperatures: One per exit 1..K, and one for the full network; scores come from logits / temperature.
        frontier: Other thresholds, from cheap to dear: (mean cost per sample, thresholds). `within` picks from them.
        frontier_shares: The `shares` of each of them; empty where they are not known.
        frontier_advantages: The `advantages` of each of them; empty where they are not known.
        unit: Of all costs: multiply-accumulates, or milliseconds.
        stages: Cost per sample of the K + 1 stages of the network, between its exits and without their heads.
        heads: Cost per sample of the K heads.
        shares: Of the calibration's samples, the share that left at each exit, and at the full network.
        advantages: Of the calibration's samples, the share that an exit gets right and the full network does not, less
            the share with which it is the other way round, among those that left at each exit.

    Raises:
        ValueError: Numbers do not fit each other, or the rule.

    Example:
        >>> rule = ExitRule(rule="margin", thresholds=(0.9, math.inf), temperatures=(1.5, 1.0, 1.0),
        ...                 stages=(4.0, 2.0, 2.0), heads=(1.0, 1.0))
        >>> rule.open, rule.costs
        ((0,), (5.0, 8.0, 9.0))
        >>> leaves(rule, 0, torch.tensor([[9.0, 0.0], [1.0, 0.0], [math.nan, 0.0]]))[0]
        tensor([ True, False, False])
    """

    rule: Rule
    thresholds: tuple[float, ...]
    temperatures: tuple[float, ...]
    frontier: tuple[tuple[float, tuple[float, ...]], ...] = ()
    unit: Unit = "macs"
    stages: tuple[float, ...] = ()
    heads: tuple[float, ...] = ()
    shares: tuple[float, ...] = ()
    advantages: tuple[float, ...] = ()
    frontier_shares: tuple[tuple[float, ...], ...] = ()
    frontier_advantages: tuple[tuple[float, ...], ...] = ()

    def __post_init__(self) -> None:
        exits = len(self.thresholds)
        _one_of("rule", self.rule, get_args(Rule))
        _one_of("unit", self.unit, get_args(Unit))
        for name, expected in (
            ("temperatures", exits + 1),
            ("stages", exits + 1),
            ("heads", exits),
            ("shares", exits + 1),
            ("advantages", exits),
        ):
            if len(getattr(self, name)) not in ({expected} if name == "temperatures" else {0, expected}):
                raise ValueError(
                    f"{name}={getattr(self, name)} of a rule with {exits} thresholds: pass {expected} numbers"
                )
        if not all(0 < temperature < math.inf for temperature in self.temperatures):
            raise ValueError(f"temperatures={self.temperatures}: every one must be a positive number")
        for thresholds in (self.thresholds, *(thresholds for _, thresholds in self.frontier)):
            if len(thresholds) != exits or any(math.isnan(threshold) for threshold in thresholds):
                raise ValueError(f"thresholds={thresholds}: pass a number for each of {exits} exits, inf to close one")
            if self.rule == "patience" and not all(t == math.inf or (t >= 1 and t == int(t)) for t in thresholds):
                raise ValueError(
                    f"thresholds={thresholds} of patience: pass how many exits in a row must agree, or inf"
                )
        costs = [cost for cost, _ in self.frontier]
        if any(not one < other for one, other in pairwise(costs)):
            raise ValueError(f"The costs of frontier must ascend, and are {costs}")
        for name in ("frontier_shares", "frontier_advantages"):
            if len(getattr(self, name)) not in (0, len(costs)):
                raise ValueError(f"{name} has {len(getattr(self, name))} entries: pass one for each of {len(costs)}")

    @property
    def open(self) -> tuple[int, ...]:
        """The exits at which a sample can leave, counted from 0."""
        return tuple(k for k, threshold in enumerate(self.thresholds) if threshold < math.inf)

    @property
    def costs(self) -> tuple[float, ...]:
        """Cost per sample of leaving at each exit and at the full network, with the heads of open exits before it."""
        return exit_costs(self.stages, self.heads, self.open) if self.stages and self.heads else ()

    def within(self, budget: float) -> ExitRule:
        """Return the rule with the best thresholds of the frontier whose mean cost is at most the budget.

        Raises:
            ValueError: There is no frontier, or the budget is below all of it.
        """
        if not self.frontier:
            raise ValueError(f"budget={budget}: the rule has no frontier of thresholds; calibrate it first")
        within = sum(cost <= budget for cost, _ in self.frontier)
        if not within:
            raise ValueError(
                f"budget={budget}: the cheapest thresholds cost {self.frontier[0][0]:.6g} {self.unit} per sample "
                "in the mean; pass at least that"
            )
        one = slice(within - 1, within)
        return replace(
            self,
            thresholds=self.frontier[within - 1][1],
            shares=next(iter(self.frontier_shares[one]), ()),
            advantages=next(iter(self.frontier_advantages[one]), ()),
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the rule as strings, numbers, lists and dicts; infinity is a string, as JSON has no such number."""
        return {field.name: _plain(getattr(self, field.name)) for field in fields(self)}

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> ExitRule:
        """Return the rule that `to_dict` made the record of."""
        return cls(**{name: value if name in ("rule", "unit") else _numbers(value) for name, value in record.items()})


def exit_costs(stages: Sequence[float], heads: Sequence[float], open_exits: Sequence[int]) -> tuple[float, ...]:
    """Return the cost of leaving at each exit and at the full network: stages, open heads on the way, its own head.

    Example:
        >>> exit_costs((4.0, 2.0, 2.0), (1.0, 1.0), open_exits=(1,))
        (5.0, 7.0, 9.0)
    """
    costs, spent = [], 0.0
    for k, stage in enumerate(stages):
        spent += stage
        head = heads[k] if k < len(heads) else 0.0
        costs.append(spent + head)
        spent += head if k in open_exits else 0.0
    return tuple(costs)


def score(output: Any, rule: Rule, temperature: float = 1.0, *, confidence: Confidence | None = None) -> Tensor:
    """Return how sure an exit is of each sample, in float32: higher is surer, not a number if the logits are not.

    Args:
        output: Logits (N, C) of an exit; for the rule "custom", whatever the callable takes.
        rule: Any but "patience", which needs the predictions of earlier exits: see `leaves`.
        temperature: Logits are divided by it. A callable gets the output as it is.
        confidence: The callable of the rule "custom".

    Raises:
        ValueError: The output is no table of logits, or the callable is missing, not wanted, or returns another shape.

    Example:
        >>> z = torch.tensor([[2.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
        >>> [[round(s, 2) for s in score(z, rule).tolist()] for rule in ("confidence", "entropy", "margin")]
        [[0.79, 0.33], [0.39, 0.0], [0.68, 0.0]]
    """
    _one_of("rule", rule, get_args(Rule))
    if (confidence is not None) != (rule == "custom"):
        raise ValueError(
            f'rule="{rule}" with confidence={confidence}: pass a callable with the rule "custom" and no other'
        )
    if confidence is not None:
        scores = confidence(output)
        if not isinstance(scores, Tensor) or scores.dim() != 1:
            shape = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
            raise ValueError(
                f"confidence={confidence} returned {shape}: it must return a tensor (N,), a number per sample"
            )
        return scores.float()
    if rule == "patience":
        raise ValueError('rule="patience" has no score of one exit alone: use leaves(), which counts over exits')
    probabilities = (_logits(output) / temperature).softmax(1)
    if rule == "entropy":
        entropy: Tensor = torch.special.entr(probabilities).sum(1)
        return 1 - entropy / math.log(probabilities.shape[1])
    top = probabilities.topk(2, 1).values
    return top[:, 0] if rule == "confidence" else top[:, 0] - top[:, 1]


def predict(logits: Any) -> Tensor:
    """Return the likeliest class of each sample (N,), and -1 where logits are not finite numbers."""
    logits = _logits(logits)
    finite = logits.logsumexp(1).isfinite()  # single classes may have -inf: they are forbidden
    predicted: Tensor = logits.argmax(1).where(finite, -1)
    return predicted


def streak(predicted: Tensor, before: Tensor | None = None) -> Tensor:
    """Return the class that each sample is predicted, and how many exits in a row predicted it: integers (N, 2).

    Args:
        predicted: What `predict` returned at this exit.
        before: What this function returned for the exit before, for the same samples in the same order.

    Example:
        >>> one = streak(torch.tensor([0, 1, -1]))
        >>> streak(torch.tensor([0, 0, -1]), one)
        tensor([[ 0,  2],
                [ 0,  1],
                [-1,  0]])
    """
    length = torch.ones_like(predicted)
    if before is not None:
        length = length + before[:, 1] * (predicted == before[:, 0])
    return torch.stack([predicted, length.where(predicted >= 0, 0)], 1)


def leaves(
    rule: ExitRule, k: int, output: Any, *, before: Tensor | None = None, confidence: Confidence | None = None
) -> tuple[Tensor, Tensor | None]:
    """Return which samples leave at an exit, (N,) booleans, and what the next open exit needs to know of each sample.

    Args:
        rule: The rule.
        k: The exit, counted from 0; it must be open.
        output: Of the exit's head.
        before: What this function returned second at the open exit before, for the samples that went on.
        confidence: The callable of the rule "custom".
    """
    if rule.rule == "patience":
        after = streak(predict(output), before)
        return after[:, 1] >= rule.thresholds[k], after
    return score(output, rule.rule, rule.temperatures[k], confidence=confidence) >= rule.thresholds[k], None


def _logits(output: Any) -> Tensor:
    if not isinstance(output, Tensor) or not output.is_floating_point() or output.dim() != 2 or output.shape[1] < 2:
        got = f"{output.dtype} {tuple(output.shape)}" if isinstance(output, Tensor) else type(output).__name__
        raise ValueError(
            f"The output of an exit is {got}: expected logits (N, C) of at least 2 classes. For other outputs, as of "
            'tokens, pass confidence=, a callable that returns a number per sample, with rule="custom"'
        )
    return output.float()


def _one_of(name: str, value: Any, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{name}={value!r}: pass one of {', '.join(known)}")


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(one) for one in value]
    return str(value) if isinstance(value, float) and math.isinf(value) else value


def _numbers(value: Any) -> Any:
    return tuple(map(_numbers, value)) if isinstance(value, (list, tuple)) else float(value)
