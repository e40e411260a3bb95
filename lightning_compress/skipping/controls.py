"""What gates are compared with: the same rates at random, and one choice of blocks for all samples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_compress.skipping.gates import SkipGates


class Drawn:
    """Runs each block for a sample with the probability that is the rate of its gate; for `SkipGates.instead`.

    Args:
        gates: Whose rates are known.
    """

    def __init__(self, gates: SkipGates) -> None:
        self._rates = gates.rates.tolist()
        self._generator = torch.Generator().manual_seed(0)

    def __call__(self, k: int, x: Tensor) -> Tensor:
        runs: Tensor = torch.rand(len(x), generator=self._generator) < self._rates[k]
        return runs.float().to(x.device)


class DrawnGates(SkipGates):
    """Gates that decide at random, at the rates of others: for the time that this takes."""

    @classmethod
    def like(cls, gates: SkipGates) -> DrawnGates:
        """Return such gates."""
        made = cls(gates.blocks, gates.features, macs=gates.macs)
        made.rates = gates.rates
        return made

    def logit(self, k: int, x: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        return float(self.rates[k]) - torch.rand(len(x), device=x.device), None


class Fixed:
    """Runs the same blocks for all samples; for `SkipGates.instead`.

    Args:
        chosen: Whether each block runs.
    """

    def __init__(self, chosen: Sequence[bool]) -> None:
        self._chosen = tuple(chosen)

    def __call__(self, k: int, x: Tensor) -> Tensor:
        return torch.full((len(x),), float(self._chosen[k]), device=x.device)
