"""Which exits save more time than they take, measured on this machine."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_compress.early_exit.answers import Answers
from lightning_compress.early_exit.rules import ExitRule
from lightning_compress.stages.extract import Stage
from lightning_compress.stages.stages import Stages

_ROUNDS = 5


@dataclass(frozen=True)
class Times:
    """Seconds of one batch.

    Attributes:
        stages: From the input, and from each exit, to the next exit or the output.
        exits: Of the head, the rule and the gathering of half the samples, at each exit.
    """

    stages: tuple[float, ...]
    exits: tuple[float, ...]


def measured(
    stages: Stages,
    execute: Callable[[Stage, Sequence[Tensor]], Any],
    answers: Answers,
    inputs: Sequence[Tensor],
) -> Times:
    """Run a batch through all stages a few times, and return the least times.

    Args:
        stages: Of the network.
        execute: As for `Stages.run`.
        answers: Whose exits are timed.
        inputs: The batch.
    """
    last = len(stages.layers) + 1
    rounds: list[tuple[list[float], list[float]]] = []
    for _ in range(_ROUNDS + 1):  # the first one warms up
        carried, clock = inputs, _now(inputs[0])
        of_stages, of_exits = [], []
        for end in range(1, last + 1):
            found = execute(stages.between(end - 1, end), carried)
            of_stages.append(-clock + (clock := _now(inputs[0])))
            if end == last:
                break
            feature, *carried = found
            answers.visit(end, feature)
            answers.reset()
            stages.gather(end, carried, torch.arange(0, feature.shape[0], 2, device=feature.device))
            of_exits.append(-clock + (clock := _now(inputs[0])))
        rounds.append((of_stages, of_exits))
    least = [tuple(map(min, zip(*part, strict=True))) for part in zip(*rounds[1:], strict=True)]
    return Times(*least)


def left_out(rule: ExitRule, times: Times, min_gain: float) -> dict[int, float]:
    """Return the open exits, counted from 0, that save less than a share of the full time, and what they save of it.

    The worst goes first, and the samples that left there are counted at the next one. An exit that is more often right
    than the full network, of the samples that left there, stays: without it the calibrated accuracy would fall.

    Example:
        >>> rule = ExitRule(rule="margin", thresholds=(0.9, 0.5), temperatures=(1.0, 1.0, 1.0), shares=(0.1, 0.5, 0.4))
        >>> left_out(rule, Times(stages=(1.0, 1.0, 2.0), exits=(0.5, 0.1)), min_gain=0.0)
        {0: -0.05}
    """
    open_exits = list(rule.open)
    shares = {k: rule.shares[k] for k in open_exits}
    full = sum(times.stages)
    rest = {k: sum(times.stages[k + 1 :]) for k in open_exits}
    found: dict[int, float] = {}
    while open_exits:
        gains, inside = {}, 1.0
        for k in open_exits:
            gains[k] = (shares[k] * rest[k] - inside * times.exits[k]) / full
            inside -= shares[k]
        able = [k for k in open_exits if not rule.advantages or rule.advantages[k] <= 0.0]
        worst = min(able, key=gains.__getitem__, default=None)
        if worst is None or gains[worst] >= min_gain:
            break
        found[worst] = round(gains[worst], 6)
        later = [k for k in open_exits if k > worst]
        if later:
            shares[later[0]] += shares[worst]
        open_exits.remove(worst)
    return found


def _now(tensor: Tensor) -> float:
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)
    return time.perf_counter()
