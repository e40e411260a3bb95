"""A site is what one decision replaces: a layer, or an embedding with the output matrix that has its weight."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from lightning_compress.low_rank.costs import Costs, costs_of
from lightning_compress.low_rank.forms import FORMS, LowRankForm
from lightning_compress.low_rank.splits import Moments, Splits
from lightning_compress.replacement.find import Layer
from lightning_compress.replacement.layer import dense_layer

Method = Literal["auto", "channel", "spatial", "tucker"]
METHODS = get_args(Method)
META = torch.device("meta")
Chosen = tuple[type[LowRankForm], dict[str, int], dict[str, Tensor]]  # a form, its numbers, the values of its parts


@dataclass(frozen=True)
class Seen:
    """A layer, and the moments of what it read."""

    layer: Layer
    moments: Sequence[Moments] | Tensor | None


class Site:
    """A layer that may become one of low rank.

    Attributes:
        name: The path of its layer.
        dense: What it costs now.
    """

    def __init__(self, name: str, seen: Seen, method: Method = "auto") -> None:
        self.name, self.seen, self.method = name, seen, method
        self.sizes = seen.layer.map.sizes
        self.splits = Splits(seen.layer.map, seen.moments)
        self.dense = costs_of([dense_layer(replace(self.sizes, device=META))], seen.layer.inputs)

    def forms(self) -> list[str]:
        """Return the forms that it may take; of convolutions with a kernel those of the method."""
        fits = [form for form in ("linear", "embedding", *METHODS[1:]) if FORMS[form].refused(self.sizes) is None]
        return (
            fits if self.method == "auto" or self.sizes.kind != "conv" else [one for one in fits if one == self.method]
        )

    def why_not(self) -> str:
        """Return why it can take no form; "" if it can."""
        return "" if self.forms() else FORMS[self.method].refused(self.sizes) or ""

    def numbers(self, form: str) -> list[tuple[int, ...]]:
        """Return the numbers of a form that are considered."""
        return self.splits.numbers(form)

    def of_rank(self, form: str, rank: int) -> tuple[int, ...] | None:
        """Return the numbers of a form for one rank; None if that is more than it can have."""
        most = FORMS[form].most(self.sizes)
        return None if rank > max(most) else tuple(min(rank, one) for one in most)

    def lost(self, form: str, numbers: Sequence[tuple[int, ...]]) -> list[float]:
        """Return the share of the variance of its outputs that it loses, for each of some numbers."""
        return self.splits.lost(form, numbers)

    def costs(self, form: str, numbers: tuple[int, ...]) -> Costs:
        """Return what it costs in a form."""
        chains = FORMS[form].chains(self._parts(form, numbers, META))
        found = [costs_of(chain, self.seen.layer.inputs) for chain in chains]
        return Costs(sum(one.parameters for one in found), sum(one.macs for one in found))

    def values(self, form: str, numbers: tuple[int, ...]) -> dict[str, Chosen]:
        """Return what its layers become, by path."""
        return {self.name: (FORMS[form], named(form, numbers), self.splits.values(form, numbers))}

    def timed(self) -> Layer:
        """Return the layer whose seconds are those of the site."""
        return self.seen.layer

    def timed_as(self, form: str, numbers: tuple[int, ...]) -> tuple[type[LowRankForm], dict[str, int]]:
        """Return the form of that layer."""
        return FORMS[form], named(form, numbers)

    def _parts(self, form: str, numbers: tuple[int, ...], device: torch.device) -> dict[str, nn.Module]:
        return FORMS[form].parts(replace(self.sizes, device=device), named(form, numbers))


def named(form: str, numbers: tuple[int, ...]) -> dict[str, int]:
    """Return the numbers of a form by name."""
    return dict(zip(FORMS[form].names, numbers, strict=True))
