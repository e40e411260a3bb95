"""The budget's share of a loss, and what gates do to samples, in numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lightning_compress.skipping.gates import SkipGates

Budget = Literal["per_gate", "total"]
SELDOM, MOSTLY = 0.05, 0.95  # a gate with a rate outside is static: the same for almost all samples


def budget_loss(gates: SkipGates, runs: Tensor, target: float, budget: Budget) -> Tensor:
    """Return how far decisions are from a target.

        per_gate    sum over k of (m_k - r)^2      r = (t - least) / (1 - least), the rate at which t is met
        total       (u / t - 1)^2                  u the mean share of the MACs

    Args:
        gates: The gates, which know what the blocks cost.
        runs: Who ran which block, (N, K), with gradients; m_k is the mean of a column.
        target: t, the share of the network's MACs.
        budget: Which of the two.

    Paper:
        Veit and Belongie, ConvNet-AIG (1711.11503), section 3.3, for per_gate.
    """
    means = runs.mean(0)
    if budget == "total":
        return (gates.used(means) / target - 1.0).square()
    return (means - (target - gates.least) / (1.0 - gates.least)).square().sum()


@dataclass(frozen=True)
class Measured:
    """What gates do to samples.

    Attributes:
        rates: Share of the samples that run each block, by its name.
        used: Mean share of the network's MACs, without those of the gates.
        varying: Share of the gates that differ between samples: with a rate between 5 and 95 %.
        policies: How many different choices of blocks there are.
        entropy: Of these choices, in bits.
    """

    rates: dict[str, float]
    used: float
    varying: float
    policies: int
    entropy: float


def varying(rates: Tensor) -> float:
    """Return the share of gates with a rate between 5 and 95 %.

    Example:
        >>> varying(torch.tensor([0.0, 0.5, 0.96, 0.9]))
        0.5
    """
    return float(((rates > SELDOM) & (rates < MOSTLY)).double().mean())


def measured(gates: SkipGates, counts: dict[tuple[bool, ...], int]) -> Measured:
    """Return what gates do, from how many samples have made each choice of blocks."""
    choices = torch.tensor(list(counts), dtype=torch.float64)
    shares = torch.tensor(list(counts.values()), dtype=torch.float64)
    shares /= shares.sum()
    rates = (choices * shares[:, None]).sum(0)
    return Measured(
        rates={block.name: float(rate) for block, rate in zip(gates.blocks, rates, strict=True)},
        used=float(gates.used(rates)),
        varying=varying(rates),
        policies=len(counts),
        entropy=float(-(shares * shares.log2()).sum()) + 0.0,
    )


def most_used(gates: SkipGates) -> tuple[bool, ...]:
    """Return for each block whether it is among the most used ones that cost no more than the gates do on average.

    That is the static choice that gates are compared with.
    """
    left = float(gates.used(gates.rates)) - gates.least + 1e-9
    chosen = [False] * len(gates)
    for k in gates.rates.argsort(descending=True, stable=True).tolist():
        share = float(gates.shares[k])
        if share <= left:
            chosen[k], left = True, left - share
    return tuple(chosen)
