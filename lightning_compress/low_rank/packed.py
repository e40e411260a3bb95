"""A linear layer that returns queries, keys and values together, as GPT-2's `c_attn`: each may get a rank of its own.

The ranks of the three are spent as those of layers are: by one water level over their directions, which cost alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from lightning_compress.low_rank.forms import FORMS, PACKED
from lightning_compress.low_rank.ranks import rank_grid
from lightning_compress.low_rank.sites import Chosen, Method, Seen, Site, named
from lightning_compress.low_rank.splits import Splits

_FORM = "packed"


class PackedSite(Site):
    """A linear layer with three times as many outputs as inputs: one low rank for all of it, or one for each third."""

    def __init__(self, name: str, seen: Seen, method: Method = "auto") -> None:
        super().__init__(name, seen, method)
        layer = seen.layer.map
        biases = [None] * PACKED if layer.bias is None else layer.bias.chunk(PACKED)
        self.thirds = [
            Splits(replace(layer, weight=weight, bias=bias), seen.moments)
            for weight, bias in zip(layer.weight.chunk(PACKED), biases, strict=True)
        ]

    def forms(self) -> list[str]:
        return [*super().forms(), _FORM]

    def numbers(self, form: str) -> list[tuple[int, ...]]:
        if form != _FORM:
            return super().numbers(form)
        most = self.sizes.inputs
        kept = []  # by third: the share of the layer's variance that each further direction keeps
        for third in self.thirds:
            lost = torch.tensor([1.0, *third.lost("linear", [(rank,) for rank in range(1, most + 1)])])
            kept.append((lost[:-1] - lost[1:]) * third.total)
        order = torch.cat([one[1:] for one in kept]).argsort(descending=True, stable=True)  # each third has rank 1
        owners = torch.arange(PACKED).repeat_interleave(most - 1)[order]
        grid = rank_grid(PACKED * (most - 1))
        counts = torch.stack([(owners == k).cumsum(0) for k in range(PACKED)], 1)
        return [(1,) * PACKED, *(tuple((1 + counts[total - 1]).tolist()) for total in grid)]

    def lost(self, form: str, numbers: Sequence[tuple[int, ...]]) -> list[float]:
        if form != _FORM:
            return super().lost(form, numbers)
        total = sum(third.total for third in self.thirds)
        curves = [third.lost("linear", [(one[k],) for one in numbers]) for k, third in enumerate(self.thirds)]
        weights = [third.total / total if total > 0 else 0.0 for third in self.thirds]
        return [
            sum(share * weight for share, weight in zip(some, weights, strict=True))
            for some in zip(*curves, strict=True)
        ]

    def values(self, form: str, numbers: tuple[int, ...]) -> dict[str, Chosen]:
        if form != _FORM:
            return super().values(form, numbers)
        found = {}
        for k, (third, rank) in enumerate(zip(self.thirds, numbers, strict=True)):
            for name, value in third.values("linear", (rank,)).items():
                part, _, own = name.partition(".")
                found[f"{part}_{k}.{own}"] = value
        return {self.name: (FORMS[form], named(form, numbers), found)}
